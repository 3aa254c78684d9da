"""From what a user asks for, numbers and shares, to the sizes of the student and the blocks it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from hf_kdtl.models.blocks import uniform_layers
from hf_kdtl.models.cutting.families import ATTENTION_HEADS, Family, Sizes, family_of, head_width

Number = int | float


def requested_sizes(
    model: Any,
    full: Sizes,
    layers: Number | Sequence[int] | None,
    heads: Number | None,
    mlp: Number | None,
    width: Number | None,
) -> Sizes:
    """The sizes of the student; what is None stays the teacher's.

    Raises:
        ValueError: for what the family cannot lose, a number out of range, or one that does not divide.
    """
    family, sizes = family_of(model.config), full
    for name, value in (("heads", heads), ("mlp", mlp), ("width", width)):
        if value is not None:
            _check_can_lose(model, family, name)
    if layers is not None:
        sizes = replace(sizes, depths=_depths(model, full.depths, layers))
    if width is not None:
        sizes = replace(sizes, width=_whole("width", width, full.width))
    if heads is not None:
        sizes = replace(sizes, heads=_whole("heads", heads, full.heads, exact=True))
    if mlp is not None:
        assert family is not None
        sizes = replace(sizes, mlp=_mlp(model, family, mlp, full.mlp))
    return with_heads_of_width(model, family, sizes, full)


def with_heads_of_width(model: Any, family: Family | None, sizes: Sizes, full: Sizes) -> Sizes:
    """The same sizes with as many heads as the width holds, where a head is width // heads."""
    if family is None or family.heads != "width" or sizes.width == full.width:
        return sizes
    one = head_width(model.config)
    if sizes.width % one:
        near = [n * one for n in (sizes.width // one, sizes.width // one + 1) if n]
        raise ValueError(
            f"width {sizes.width} is not a whole number of {type(model).__name__}'s heads, of {one} each; type width="
            f"{' or width='.join(map(str, near))}."
        )
    return replace(sizes, heads=sizes.width // one)


def kept_blocks(full: Sizes, sizes: Sizes, alternate: bool, scores: Tensor | None) -> list[int]:
    """The teacher's blocks that stay: of each stage every k-th, or with `scores` (L,) those that score highest.

    Where the blocks of a stage alternate (Swin's windows, shifted or not), each student block takes the nearest one
    of its own kind; scores are not asked there.
    """
    kept, first = [], 0
    for depth, of in zip(sizes.depths, full.depths, strict=True):
        picks = uniform_layers(depth, of)
        if alternate:
            picks = [pick - (pick - s) % 2 for s, pick in enumerate(picks)]
        elif scores is not None:
            picks = sorted(scores[first : first + of].topk(depth).indices.tolist())
        kept += [first + pick for pick in picks]
        first += of
    return kept


def _check_can_lose(model: Any, family: Family | None, what: str) -> None:
    name, config = type(model).__name__, type(model.config).__name__
    if family is None:
        reason = f"{name} can lose blocks alone"
    elif what == "heads" and family.heads != "any":
        each = "differ by stage" if family.heads == "none" else "are width // heads wide in its code"
        reason = f"the heads of {name} {each}, so none can be removed"
    elif what == "mlp" and family.mlp is None:
        reason = f"{config} has no intermediate_size and no mlp_ratio: the code of {name} fixes its MLP"
    elif what == "width" and not family.width:
        reason = f"the width of {name} differs by stage and is not cut"
    else:
        return
    works = [f"{key}=" for key, able in (("layers", True), ("mlp", family and family.mlp),
                                         ("width", family and family.width)) if able and key != what]  # fmt: skip
    where = f" heads= works for {ATTENTION_HEADS}." if what == "heads" else ""
    raise ValueError(f"{what}= : {reason}. Leave it out; type {' or '.join(works)}.{where}")


def _depths(model: Any, full: tuple[int, ...], layers: Number | Sequence[int]) -> tuple[int, ...]:
    if len(full) == 1:
        if isinstance(layers, float):
            return (_whole("layers", layers, full[0], exact=True),)
        uniform_layers(layers, full[0])  # type: ignore[arg-type]  # raises
        return (layers,)  # type: ignore[return-value]
    if isinstance(layers, float) and 0 < layers <= 1:
        return tuple(max(1, round(layers * depth)) for depth in full)
    wanted = tuple(layers) if isinstance(layers, list | tuple) else ()
    if len(wanted) == len(full) and all(type(n) is int and 1 <= n <= of for n, of in zip(wanted, full, strict=True)):
        return wanted
    half = [max(1, depth // 2) for depth in full]
    raise ValueError(
        f"{type(model).__name__} is built in stages (depths {list(full)}); found layers={layers!r}, expected one "
        f"number for each stage, such as layers={half}, or a share of each, such as layers=0.5."
    )


def _whole(name: str, value: Number, full: int, exact: bool = False) -> int:
    """A count from 1 to `full`, from a whole number or a share; with `exact` the share must give a whole number."""
    share = isinstance(value, float) and 0 < value <= 1
    count = value * full if share else value
    if type(value) not in (int, float) or not 0 < count <= full or not (share or float(value).is_integer()):
        raise ValueError(
            f"found {name}={value!r} for a teacher of {full}; type a whole number from 1 to {full}, or a share above "
            "0 and up to 1.0."
        )
    near = max(1, round(count))
    if exact and abs(count - near) > 1e-3:
        low, high = max(1, int(count)), min(full, int(count) + 1)
        raise ValueError(
            f"{name}={value!r} does not divide: of {full} it is {count:.4g}. Type {name}={low} or {name}={high}."
        )
    return near


def _mlp(model: Any, family: Family, value: Number, full: float) -> float:
    if family.mlp == "intermediate_size":
        return _whole("mlp", value, int(full))
    kind = type(model.config).__name__
    if not isinstance(value, float) or not 0 < value <= 1:
        raise ValueError(
            f"mlp={value!r}: {kind} holds mlp_ratio {full:g}, no number of neurons; type a share, such as mlp=0.5."
        )
    ratio = value * full
    if not family.whole_ratio:
        return ratio
    if abs(ratio - round(ratio)) > 1e-3 or round(ratio) < 1:
        shares = ", ".join(f"{n / full:.4g}" for n in range(1, int(full)))
        raise ValueError(
            f"mlp={value!r} makes mlp_ratio {ratio:.4g}; {kind} holds whole numbers alone. Type one of mlp={shares}."
        )
    return round(ratio)
