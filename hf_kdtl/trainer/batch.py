"""What a batch holds, and what the student gave for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_kdtl.data.indexed import INDEX, NOT_THE_STUDENTS, VIEW
from hf_kdtl.functional.divergences import labelled
from hf_kdtl.functional.random import Draws
from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.teachers.source import called

Counts = dict[str, Tensor]
"""{"images": n, "labelled": m}: what a window of micro-batches holds, over all ranks. Tensors, so that a GPU need not
wait for the CPU to read them."""


def of_student_alone(inputs: dict[str, Any], sources: Mapping[str, Any]) -> dict[str, Any]:
    """Further keyword arguments of the student's forward.

    Raises:
        ValueError: for one that the sources would need too.
    """
    rest = {k: v for k, v in inputs.items() if k not in ("labels", "pixel_values", *NOT_THE_STUDENTS)}
    if sources and rest.get("interpolate_pos_encoding"):
        raise ValueError(
            f"the batch has 'interpolate_pos_encoding', which would reach the student and not "
            f"{' or '.join(map(called, sources))}. Leave it out, and resize the images to the student's image_size "
            "with its image processor; the teacher's size may be another, where its processor is known."
        )
    return rest


def full_outputs(student: Capture) -> Any:
    """The student's outputs, for what a user reads them with."""
    if student.outputs is None:
        raise ValueError(
            "compute_loss and compute_loss_func read the model's outputs, and those of a part of the batch cannot be "
            "joined to the rest: the model gives no ModelOutput. Use fraction=1."
        )
    return student.outputs


def given(inputs: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """What of these a batch has. Class indices of any integer type, or booleans, are int64: torch reads no others."""
    found = {name: inputs[name] for name in names if inputs.get(name) is not None}
    return found | ({"labels": as_indices(found["labels"])} if "labels" in found else {})


def as_indices(labels: Tensor) -> Tensor:
    """Labels (B,) of an integer type or booleans as int64; others as they are."""
    return labels if labels.ndim != 1 or labels.is_floating_point() else labels.long()


def by_view(known: Mapping[str, Any], seed: int, needs: Iterable[Needs]) -> dict[str, Draws]:
    """The draws that belong to the views of the images of a batch, where a sketch needs them and it knows them."""
    if INDEX not in known or not any(one.sketches for one in needs):
        return {}
    rows = known[INDEX].tolist()
    views = known[VIEW].tolist() if VIEW in known else [0] * len(rows)
    return {"view_draws": Draws(seed, 0, tuple(zip(views, rows, strict=True)))}


def micro_batch_counts(inputs: dict[str, Any]) -> Counts:
    """How many images a micro-batch holds, and how many of them have a label.

    Not `labels != -100` alone, as transformers counts: soft labels (B, K) would count K times, and an objective
    without labels counts images.
    """
    if not isinstance(inputs, Mapping) or not isinstance(inputs.get("pixel_values"), Tensor):
        found: Any = type(inputs).__name__
        if isinstance(inputs, Mapping):
            found = ", ".join(f"{name!r} ({type(inputs[name]).__name__})" for name in sorted(inputs))
        raise ValueError(
            f"the data_collator made a batch of {found}, expected a dict with tensors 'pixel_values' (B, C, H, W) "
            "and 'labels' (B,)."
        )
    pixels, labels = inputs["pixel_values"], inputs.get("labels")
    if isinstance(labels, Tensor) and labels.ndim and len(labels) != len(pixels):
        raise ValueError(f"the batch has {len(pixels)} images and {len(labels)} labels; expected one for each image.")
    images = torch.tensor(pixels.shape[0], device=pixels.device)
    return {"images": images, "labelled": torch.zeros_like(images) if labels is None else labelled(labels).sum()}
