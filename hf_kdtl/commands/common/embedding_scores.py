"""Embeddings of a teacher and a student on held-out and labelled images: scores, and a picture of patch features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import default_data_collator

from hf_kdtl.commands.common import builders
from hf_kdtl.evaluation import embeddings as ee
from hf_kdtl.evaluation.cost import parameters
from hf_kdtl.models import Needs, Teacher, capture
from hf_kdtl.reports.figures.patches import PATCHES, patch_figure
from hf_kdtl.reports.figures.saliency import unnormalized

SHOWN = 4
SPLITS = ("train", "validation", "test")


Sides = dict[str, tuple[Any, Any]]
"""{name: (a model or a Teacher, the image processor that makes its pixels)}; the teacher's name is "teacher"."""


def check_labels(data: Any) -> None:
    """Raises ValueError for labels that embeddings are not scored by."""
    if data.multi_label:
        raise ValueError(
            "kNN, probe and recall of a student without a head are of one label an image, and the data has several. "
            "Leave multi_label out and name images with one, or give the student a head: hf-kdtl train-teacher "
            "--model <student> --dataset <these images> --multi_label true."
        )


def scores(sides: Sides, images: Any, labelled: Any, size: int) -> dict[str, Any]:
    """Agreement with the teacher on images of any kind; kNN, probe and recall where a labelled set is given."""
    found: dict[str, dict[str, Any]] = {
        name: {"parameters": parameters(_model(model))} for name, (model, _) in sides.items()
    }
    if "teacher" in sides:
        seen = {
            name: embeddings(model, builders.pixels(images, processor), size)[0]
            for name, (model, processor) in sides.items()
        }
        for name in sides.keys() - {"teacher"}:
            found[name]["agreement"] = ee.agreement(seen[name], seen["teacher"])
            found[name]["cka"] = ee.linear_cka(seen[name], seen["teacher"])
    if labelled is not None:
        for name, (model, processor) in sides.items():
            found[name] |= labelled_scores(model, labelled, processor, size)
    return {"images": len(images), "models": found}


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
def picture(folder: Path, sides: Sides, images: Any) -> str:
    """The principal components of the patch tokens of some images, where all models have patches; or why not."""
    seen: dict[str, Any] = {}
    shown: Any = None
    for name, (model, processor) in sides.items():
        pixels = builders.batch_of(builders.pixels(images, processor), range(min(SHOWN, len(images))))
        shown = unnormalized(pixels, processor) if shown is None else shown
        try:
            captured = _captured(model, pixels.to(next(_model(model).parameters()).device), Needs(patches=True))
        except ValueError as error:
            return f"no picture of patches: {error}"
        if captured.patch_grid is None:
            return f"no picture of patches: those of the {name} are on no grid."
        colors = ee.principal_colors(captured.patches.float().cpu().numpy())
        seen[name] = colors.reshape(len(pixels), *captured.patch_grid, 3)
    folder.mkdir(parents=True, exist_ok=True)
    patch_figure(folder / PATCHES, shown, seen)
    return ""
