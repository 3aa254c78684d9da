"""What a store keeps of the teacher itself: its config, image processor and classifier, and what identifies it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import skip_init

from hf_kdtl.models.teachers.own_pixels import OwnPixels
from hf_kdtl.models.teachers.store.manifest import Manifest
from hf_kdtl.models.teachers.teacher import Teacher

CLASSIFIER = "classifier.safetensors"


def teacher_record(teacher: Teacher | OwnPixels) -> dict[str, Any]:
    """What of a teacher its signals depend on, field by field."""
    processor = teacher.processing_class
    return {
        "teacher": teacher.fingerprint,
        "teacher_processor": None if processor is None else json.loads(processor.to_json_string()),
        "classes": teacher.provenance().class_names,
    }


def save_facts(teacher: Teacher | OwnPixels, manifest: Manifest, folder: Path) -> None:
    """Write config.json, the processor's file and the classifier's weights, where there are any."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[Any] = [getattr(teacher.model, "config", None), teacher.processing_class]
    for part in parts:
        if hasattr(part, "save_pretrained"):
            part.save_pretrained(folder)
    classifier = None if manifest.geometry is None else manifest.geometry.classifier
    if classifier is not None:
        save_file({name: value.detach().cpu().contiguous() for name, value in classifier.state_dict().items()},
                  folder / CLASSIFIER)  # fmt: skip


def load_classifier(folder: Path) -> nn.Linear | None:
    """The classifier, in the teacher's own class order; None where none was saved."""
    if not (folder / CLASSIFIER).exists():
        return None
    tensors = load_file(folder / CLASSIFIER)
    outputs, width = tensors["weight"].shape
    # Without drawing first weights: the run's random stream stays as it is with the live teacher.
    linear: Any = skip_init(nn.Linear, width, outputs, bias="bias" in tensors, dtype=tensors["weight"].dtype)
    linear.load_state_dict(tensors)
    return linear.requires_grad_(False)
