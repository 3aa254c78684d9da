"""Opening what a folder holds: an image classifier, or a vision model without a head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, ViTConfig, ViTModel
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING, MODEL_MAPPING

from hf_kdtl.models.forward.embedding import is_headless
from hf_kdtl.models.teachers.file_names import describe_missing
from hf_kdtl.models.teachers.flat_patches import FlatPatches
from hf_kdtl.models.teachers.resolve import Opened, open_classifier, open_config, open_with

MASKED, FLAT = "vit_mae", "siglip2"
"""Model types that mask patches, and (as a prefix) that read flat ones."""
_CLASSIFIER = "ForImageClassification"
_POOLERS = ("pooler", "head", "visual_projection")
"""Modules of vision models that only a pooled output goes through."""


@dataclass(frozen=True)
class OpenedBackbone(Opened):
    """As `Opened`.

    Args:
        pooler: whether the weights that its pooled output goes through were in the file.
    """

    pooler: bool = True


def open_vision_model(path: str | Path, *, role: str = "the model", **options: Any) -> OpenedBackbone:
    """A classifier where the file has one; else the vision model alone, of two towers (CLIP, SigLIP) that of vision.

    A head that is not in the file is never used, and a pooler neither: `Opened.new_head` and `pooler` say so.

    Raises:
        OSError: when nothing is there, or it cannot be read.
        ValueError: when weights of the backbone are not in the file, or it is no vision model.
    """
    config = open_config(path, role=role, **options)
    if has_classifier(config) or {"num_labels", "id2label"} & options.keys():
        opened = open_classifier(path, role=role, keep_head=False, **options)
        return OpenedBackbone(opened.model, opened.new_head, opened.notes, opened.unread)
    return open_backbone(path, config, role=role, **options)


def has_classifier(config: Any) -> bool:
    """Whether a saved model of this config is an image classifier, and not a vision model without a head."""
    names = getattr(config, "architectures", None) or []
    return any(_CLASSIFIER in name for name in names) or (not names and not _is_vision_tower(config))


def is_headless_path(path: str | Path) -> bool:
    """Whether a folder or a Hub name holds a vision model without a head; False where it cannot be read."""
    try:
        return not has_classifier(open_config(path))
    except OSError:
        return False


def open_backbone(path: str | Path, config: Any = None, *, role: str = "the model", **options: Any) -> OpenedBackbone:
    """The vision model without a head that a folder or a Hub name holds.

    Args:
        config: that of the folder, where it was read before.

    Raises:
        OSError, ValueError: as `open_vision_model`.
    """
    config = open_config(path, role=role, **options) if config is None else config
    who = f"{role} {str(path)!r}"
    model, lacking, mismatched, unread = open_with(_opener(config, who), path, role=role, **options)
    if any("visual_projection" in key for key in lacking):  # CLIP's vision tower, saved without its projection
        model, lacking, mismatched, unread = open_with(MODEL_MAPPING[type(model.config)], path, role=role, **options)
    poolers = [key for key in lacking if {*key.split(".")} & {*_POOLERS}]
    if lost := [key for key in lacking if key not in poolers]:
        raise ValueError(
            f"{who} lacks {len(lost)} weights of {type(model).__name__}, which would be random: "
            f"{describe_missing(lost, mismatched)}. Expected a file with all of them: save the model again with "
            "model.save_pretrained(folder)."
        )
    check_reads_images(model, who)
    return OpenedBackbone(prepared(model), [], unread, unread, pooler=not poolers)


def open_student(path: str | Path, **options: Any) -> Opened:
    """The vision model without a head that a folder or a Hub name holds, to be trained; of ViT-MAE the ViT that it is
    when nothing is masked.

    Raises:
        OSError, ValueError: as `open_vision_model`, and `check_trainable`.
    """
    config = open_config(path, role="the student", **options)
    if config.model_type == MASKED:
        settings = {name: value for name, value in config.to_dict().items() if name != "model_type"}
        options = options | {"config": ViTConfig.from_dict(settings)}
        loaded = open_with(ViTModel, path, role="the student", **options)
        opened = Opened(loaded.model, [], loaded.unread, loaded.unread)
    else:
        opened = open_backbone(path, config, role="the student", **options)
    check_trainable(opened.model)
    return opened


def check_trainable(student: Any) -> None:
    """Raises ValueError for a vision model that reads images as a teacher, and is no student."""
    kind = str(getattr(getattr(student, "config", None), "model_type", ""))
    if kind == MASKED and is_headless(student):
        raise ValueError(
            "the student is a ViT-MAE, which masks three quarters of its patches, also when it is opened again. Train "
            "it as the ViT that it is, of the same weights: ViTModel.from_pretrained(<its folder>), or model_type vit."
        )
    if kind.startswith(FLAT):
        raise ValueError(
            f"the student is a {kind} (SigLIP 2, NaFlex), which reads flat patches and no pixel_values, so "
            "no pipeline and no head of transformers could use it afterwards. Use it as the teacher, and another "
            "family as the student, such as SigLIP, DINOv2 or ViT."
        )


def prepared(model: nn.Module) -> nn.Module:
    """A vision model that reads plain pixels: ViT-MAE with nothing masked, SigLIP 2 behind flat patches."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if kind == MASKED:
        _unmask(model)
    return FlatPatches(model) if kind.startswith(f"{FLAT}_vision") and not isinstance(model, FlatPatches) else model


def check_reads_images(model: Any, who: str) -> None:
    """Raises ValueError for a model that reads text, alone or in addition to images."""
    if not is_headless(model):
        return
    main = getattr(model, "main_input_name", "pixel_values")
    if getattr(model, "text_model", None) is not None or main == "input_ids":
        tower = " Pass its folder or Hub name, of which the vision tower is opened alone, or model.vision_model."
        raise ValueError(
            f"{who} is a {type(model).__name__}, which reads text; expected a model whose forward takes pixel_values "
            f"alone.{tower if hasattr(model, 'vision_model') else ''}"
        )
    if main != "pixel_values":
        raise ValueError(f"{who} is a {type(model).__name__}, which reads {main}; expected pixel_values.")


def no_classifier(who: str, architecture: str, path: str = "") -> str:
    """The error for class outputs that are wanted of a model without a head."""
    return (
        f"{who}, {architecture}, has no classifier, so it gives no class outputs. Expected objectives on features: "
        "feature_kd, similarity, hidden_states, attention_map, relation; or train a head for it first: "
        f"hf-kdtl train-teacher --model {quote(path) if path else '<its folder>'} --dataset <labelled images>. A "
        "model of images and texts needs class names alone: Teacher.from_pretrained(path, class_names=[...])."
    )


def _opener(config: Any, who: str) -> Any:
    """The class that opens it: with CLIP's projection, where there may be one."""
    vision = config.vision_config if _has_towers(config) else config
    backbone = any(name.endswith("Backbone") for name in getattr(config, "architectures", None) or [])
    if type(vision) in MODEL_FOR_BACKBONE_MAPPING and (backbone or type(vision) not in MODEL_MAPPING):
        return MODEL_FOR_BACKBONE_MAPPING[type(vision)]
    if type(vision) in MODEL_MAPPING:
        plain: Any = MODEL_MAPPING[type(vision)]
        return getattr(transformers, f"{plain.__name__}WithProjection", plain)
    if vision is config:
        return AutoModel  # whose class may be code in the model's folder
    raise ValueError(
        f"{who} is a {config.model_type} with the vision tower {getattr(vision, 'model_type', vision)!r}, which "
        "transformers does not open alone. Expected CLIP, SigLIP, SigLIP 2, MetaCLIP 2 or another whose vision tower "
        "AutoModel knows: save that one apart, model.vision_model.save_pretrained(folder)."
    )


def _has_towers(config: Any) -> bool:
    return hasattr(config, "vision_config") and hasattr(config, "text_config")


def _is_vision_tower(config: Any) -> bool:
    return _has_towers(config) or str(getattr(config, "model_type", "")).endswith("_vision_model")


def _unmask(model: Any) -> None:
    """Nothing masked, and the patches in their order: ViT-MAE shuffles them by noise, of which an increasing one is
    given."""
    model.config.mask_ratio = 0.0

    def in_order(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        patches = module.embeddings.patch_embeddings.num_patches
        return args, {"noise": torch.arange(patches, device=pixels.device).expand(len(pixels), -1) / patches} | kwargs

    model.register_forward_pre_hook(in_order, with_kwargs=True)
