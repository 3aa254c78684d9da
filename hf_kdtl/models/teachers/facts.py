"""What a model is, as plain data: for the card, and for files that belong to one teacher."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hf_kdtl.models.adapters import adapter_kinds
from hf_kdtl.models.blocks import vision_config
from hf_kdtl.models.forward.embedding import plain_model
from hf_kdtl.models.forward.geometry import ModelGeometry
from hf_kdtl.models.labels import class_names
from hf_kdtl.models.teachers.flat_patches import FlatPatches
from hf_kdtl.models.teachers.source import SourceInfo
from hf_kdtl.utils.distributed import unsharded_class


def source_info(model: Any) -> SourceInfo:
    """Read off a model and its config."""
    base = plain_model(model)
    base = base.model if isinstance(base, FlatPatches) else base
    config = base.config
    size = getattr(vision_config(config), "image_size", None)
    return SourceInfo(
        architecture=unsharded_class(base).__name__,
        name_or_path=str(getattr(config, "_name_or_path", "") or ""),
        revision=getattr(config, "_commit_hash", None),
        model_type=config.model_type,
        num_labels=config.num_labels,
        class_names=class_names(config),
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        image_size=[size, size] if isinstance(size, int) else size,
        adapters=adapter_kinds(model),
    )


def in_order(geometry: ModelGeometry, order: Sequence[int] | None) -> ModelGeometry:
    """A geometry whose classifier answers in another order of classes."""
    if order is None or geometry.classifier is None:
        return geometry
    head = copy.deepcopy(geometry.classifier)
    for parameter in head.parameters():
        parameter.data = parameter.data[order]
    return replace(geometry, classifier=head)
