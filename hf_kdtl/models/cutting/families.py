"""What each family of vision transformers can lose, and the config of what is left."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from hf_kdtl.models.blocks import find_blocks, stated_depth, vision_config
from hf_kdtl.utils.versions import DINOV2_HEAD_DIM

ATTENTION_HEADS = "ViT, DeiT, BEiT, ViT-MSN, I-JEPA and, with transformers 5.18 and later, DINOv2"


@dataclass(frozen=True)
class Family:
    """What the config of a family lets go, besides whole blocks.

    Args:
        heads: "any": `config.head_dim` is read, so heads go one by one. "width": a head is width // heads, so they go
            with the width alone. "none": heads differ by stage.
        mlp: the field that the MLP's size is; None where the code fixes it.
        whole_ratio: whether `mlp_ratio` must be a whole number.
        width: whether the residual width can be cut.
        alternate: whether every second block does something else (Swin shifts its windows): the blocks kept then
            alternate, too.
    """

    heads: Literal["any", "width", "none"] = "none"
    mlp: Literal["intermediate_size", "mlp_ratio"] | None = None
    whole_ratio: bool = False
    width: bool = False
    alternate: bool = False


_VIT = Family("any", "intermediate_size", width=True)
_DINOV2 = Family("any" if DINOV2_HEAD_DIM else "width", "mlp_ratio", whole_ratio=True, width=True)
_TOWER = Family("width", "intermediate_size", width=True)
_SWIN = Family(mlp="mlp_ratio", alternate=True)

# By the model_type of the vision config. Others can lose blocks where their depth is one number.
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("vit", "deit", "beit", "vit_msn", "ijepa"), _VIT),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _DINOV2),
    **dict.fromkeys(("siglip_vision_model", "clip_vision_model", "dinov3_vit"), _TOWER),
    **dict.fromkeys(("swin", "swinv2"), _SWIN),
    **dict.fromkeys(("convnext", "convnextv2"), Family()),
}


def family_of(config: Any) -> Family | None:
    """The family of a config; None for one that can lose blocks at most."""
    return FAMILIES.get(vision_config(config).model_type)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that a cut changes, as its config holds them.

    Args:
        depths: blocks, of each stage; one number where there are no stages.
        heads: of a block; 0 where they differ by stage.
        mlp: `intermediate_size`, or `mlp_ratio`; 0 where the config has none.
        width: of the residual stream; 0 where it differs by stage.
    """

    depths: tuple[int, ...]
    heads: int = 0
    mlp: float = 0
    width: int = 0


def sizes_of(model: nn.Module) -> Sizes:
    """The sizes of a model.

    Raises:
        ValueError: for a model built in stages whose blocks cannot be left out.
    """
    config: Any = model.config
    family, vision, found = family_of(config), vision_config(config), len(find_blocks(model))
    depths, depth = stated_depth(config)
    if depths is None and depth == found:
        if family is None:
            return Sizes((depth,))
        mlp = getattr(vision, family.mlp) if family.mlp else 0
        return Sizes((depth,), vision.num_attention_heads, mlp, vision.hidden_size)
    if family is not None and depths is not None and sum(depths) == found:
        return Sizes(tuple(depths), mlp=getattr(vision, family.mlp) if family.mlp else 0)
    name, kind = type(model).__name__, type(config).__name__
    raise ValueError(
        f"{name} is built in stages ({f'depths {depths}' if depths else f'{found} entries, no single depth'}), so "
        "blocks cannot be left out by number; layers= works where config.num_hidden_layers is the depth (ViT, DeiT, "
        f"DINOv2, BEiT, CLIP ...), and for Swin and ConvNeXt. Type student_config=<a {kind} file with smaller depths "
        f"or widths> in a recipe, or {name}({kind}(...)) in Python."
    )


def head_width(config: Any) -> int:
    """Width of one attention head."""
    vision = vision_config(config)
    return getattr(vision, "head_dim", None) or vision.hidden_size // vision.num_attention_heads


def cut_config(config: Any, sizes: Sizes, blocks: list[int]) -> Any:
    """A copy of `config` for a model of these sizes that keeps the teacher's blocks `blocks`."""
    config = copy.deepcopy(config)
    config.name_or_path = ""  # it is no longer what was loaded from there
    vision, family = vision_config(config), family_of(config)
    if len(sizes.depths) > 1:
        vision.depths = list(sizes.depths)
    else:
        _keep_blocks(vision, blocks)
    if family is not None and family.mlp:
        setattr(vision, family.mlp, sizes.mlp)
    if sizes.heads and (sizes.heads, sizes.width) != (vision.num_attention_heads, vision.hidden_size):
        if family is not None and family.heads == "any":
            vision.head_dim = head_width(vision)
        if getattr(vision, "pooler_output_size", None) == vision.hidden_size:
            vision.pooler_output_size = sizes.width
        vision.num_attention_heads, vision.hidden_size = sizes.heads, sizes.width
    type(config).from_dict(config.to_dict())  # a config that could not be read back fails now, not after training
    return config


def _keep_blocks(vision: Any, picks: list[int]) -> None:
    outputs = vision.num_hidden_layers + 1
    vision.num_hidden_layers = len(picks)
    for key in ("layer_types", "mlp_layer_types"):
        if types := getattr(vision, key, None):
            setattr(vision, key, [types[pick] for pick in picks])
    if getattr(vision, "stage_names", None):
        vision.stage_names = vision.stage_names[: len(picks) + 1]
    if getattr(vision, "out_indices", None):
        # Output 0 is the embeddings, output i block i - 1: it becomes the last kept block up to there. Backbone
        # configs (BEiT, DINOv2) rename out_features when out_indices is set.
        vision.out_indices = sorted({sum(pick < index % outputs for pick in picks) for index in vision.out_indices})


def sizes_between(config: Any, full: Sizes, final: Sizes, part: float) -> Sizes:
    """Sizes on the way from `full` (part 0) to `final` (part 1); equal steps are equal factors."""

    def between(start: float, end: float) -> float:
        return start * (end / start) ** part if start else start

    family, depths = family_of(config), zip(full.depths, final.depths, strict=True)
    mlp = between(full.mlp, final.mlp)
    if family is not None and (family.whole_ratio or family.mlp == "intermediate_size"):
        mlp = round(mlp)
    heads, width = round(between(full.heads, final.heads)), round(between(full.width, final.width))
    if family is not None and family.heads == "width":
        width = heads * head_width(config)
    return Sizes(tuple(round(between(*pair)) for pair in depths), heads, mlp, width)
