"""Models of several labels an image on the images of one split. For hf-kdtl evaluate."""

from __future__ import annotations

from typing import Any

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common import builders, runs
from hf_kdtl.commands.common.candidates import Candidate
from hf_kdtl.data.loading import ImageData
from hf_kdtl.evaluation.metrics import paired_scores

UNUSED = ("degradations", "severities", "images", "max_drop", "speed")
"""Settings of hf-kdtl evaluate that are about one label an image."""


def check(typed: set[str]) -> None:
    """Raises ValueError for settings that are about one label an image."""
    if found := sorted({*UNUSED} & typed):
        raise ValueError(
            f"{found[0]} is of models with one label an image; of several, mAP and F1 on all images of a split are "
            f"measured, parameters and images/s. Leave {found[0]} out."
        )


def section(candidates: list[Candidate], data: ImageData, split: str, config: DistillationConfig) -> dict[str, Any]:
    """The section `evaluation` of results.json: map, micro_f1 and macro_f1 of each model, its size and speed."""
    datasets = {one.name: builders.pixels(getattr(data, split), one.processor) for one in candidates}
    models: dict[str, dict[str, Any]] = {}
    for one in candidates:
        scores = paired_scores(*one.answers(datasets[one.name], config))
        models[one.name] = {"role": one.role, "path": one.path, "runs": {one.name: {split: scores}}}
    cost = runs.measure({one.name: (one.model, datasets[one.name]) for one in candidates}, config)
    found = {name: model | cost[name] for name, model in models.items()}
    return {"models": found, "batch_size": config.per_device_eval_batch_size}
