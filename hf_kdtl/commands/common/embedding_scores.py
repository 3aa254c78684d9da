"""Embeddings of a teacher and a student on held-out and labelled images: scores, and a picture of patch features."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import default_data_collator

from hf_kdtl.commands.common import builders, runs
from hf_kdtl.evaluation import embeddings as ee
from hf_kdtl.evaluation.cost import parameters
from hf_kdtl.models import Needs, Teacher, capture
from hf_kdtl.reports.figures.patches import PATCHES, patch_figure
from hf_kdtl.reports.figures.saliency import unnormalized

SHOWN = 4
SPLITS = ("train", "validation", "test")


def scores(study: Any, before: Any, after: Any) -> dict[str, Any]:
    """Agreement with the teacher on images that were held out; kNN, probe and recall where a labelled set is given."""
    size = study.config.per_device_eval_batch_size
    sides = {"teacher": study.teacher, "student before": before, "student": after}
    found: dict[str, dict[str, Any]] = {name: {"parameters": parameters(_model(one))} for name, one in sides.items()}
    held_out = builders.pixels(study.held_out, study.processor)
    seen = {name: embeddings(one, held_out, size)[0] for name, one in sides.items()}
    for name in ("student before", "student"):
        found[name]["agreement"] = ee.agreement(seen[name], seen["teacher"])
        found[name]["cka"] = ee.linear_cka(seen[name], seen["teacher"])
    if study.labelled is not None:
        for name, one in sides.items():
            found[name] |= labelled_scores(one, study.labelled, study.processor, size)
    return {"images": len(study.held_out), "models": found}


def labelled_scores(model: Any, data: Any, processor: Any, size: int) -> dict[str, Any]:
    """kNN and probe (answered by train, C by validation) and recall on the test images."""
    splits = {name: embeddings(model, builders.pixels(getattr(data, name), processor), size) for name in SPLITS}
    known = {name: (x[labels >= 0], labels[labels >= 0]) for name, (x, labels) in splits.items()}
    probe = ee.probe_accuracy(known["train"], known["validation"], known["test"])
    return {
        "knn": ee.knn_accuracy(*known["train"], *known["test"]),
        "probe": probe["test"],
        "probe_c": probe["C"],
        "recall": {str(rank): share for rank, share in ee.recall_at(*known["test"]).items()},
    }


@torch.no_grad()
def embeddings(model: Any, dataset: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(embeddings (n, D), labels (n,)) of a dataset of the student's pixels, by a student or a Teacher."""
    device, found, labels = next(_model(model).parameters()).device, [], []
    for first in range(0, len(dataset), size):
        batch = default_data_collator(dataset.__getitems__([*range(first, min(first + size, len(dataset)))]))
        captured = _captured(model, batch["pixel_values"].to(device), Needs(pooled=True))
        found.append(captured.pooled.float().cpu().numpy())
        labels.append(batch["labels"].numpy())
    return np.concatenate(found), np.concatenate(labels)


def _model(model: Any) -> Any:
    return model.model if isinstance(model, Teacher) else model


def _captured(model: Any, pixels: torch.Tensor, needs: Needs) -> Any:
    return model.capture(pixels, needs) if isinstance(model, Teacher) else capture(model, pixels, needs)


@torch.no_grad()
def picture(study: Any, before: Any, after: Any) -> None:
    """The principal components of the patch tokens of some held-out images, where both models have patches."""
    rows = builders.pixels(study.held_out, study.processor).__getitems__([*range(min(SHOWN, len(study.held_out)))])
    pixels = torch.stack([row["pixel_values"] for row in rows])
    sides, seen = {"teacher": study.teacher, "student before": before, "student after": after}, {}
    for name, one in sides.items():
        try:
            device = next(_model(one).parameters()).device
            captured = _captured(one, pixels.to(device), Needs(patches=True))
        except ValueError as error:
            return runs.say(study.config, f"no picture of patches: {error}")
        if captured.patch_grid is None:
            return None
        colors = ee.principal_colors(captured.patches.float().cpu().numpy())
        seen[name] = colors.reshape(len(pixels), *captured.patch_grid, 3)
    patch_figure(study.folder / PATCHES, unnormalized(pixels, study.processor), seen)
