"""Colors, erasing and mixing of a whole batch at once, on the device that trains."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_kdtl.data.augmentation import Changes, Mixing
from hf_kdtl.data.rendering import GREY, LUMINANCE, Renderer, inside

CHANGES, PARTNERS = "view_changes", "partner_pixel_values"
"""What an item holds beside the pixels of its crop and flip: (19,) numbers, and (C, H, W) of whom it is mixed with."""
_FACTORS, _ERASED, _THEIRS, _MIXED = slice(0, 3), slice(3, 7), slice(7, 14), slice(14, 19)


class Scale(NamedTuple):
    """From 8 bits to the model's pixels: gain * value + offset, (C, 1, 1) each; whether channels are reversed."""

    gain: Tensor
    offset: Tensor
    flipped: bool

    @classmethod
    def of(cls, renderer: Renderer) -> Scale:
        """The one that a renderer applies."""
        return cls(torch.from_numpy(renderer.gain), torch.from_numpy(renderer.offset), renderer.format.flipped)


def described(changes: Changes, partner: Changes | None, mixing: Mixing | None, size: tuple[int, int]) -> Tensor:
    """(19,) float32: factors and erased rows and columns of an image, the same of its partner, and how they are mixed:
    the weight of the image, and the rows and columns that are pasted."""
    numbers = [*_own(changes, size), *_own(partner or Changes(), size), 1.0 if mixing is None else mixing.weight]
    return torch.tensor([*numbers, *_edges(None if mixing is None else mixing.box, size)])


def finished(pixels: Tensor, changes: Tensor, partners: Tensor | None, scale: Scale) -> Tensor:
    """What `Renderer.draw` and `mix` make of images one by one, of a batch that was cropped and flipped.

    Colors, and the mean grey about which contrast acts, are not rounded to 8 bits in between, which is the whole
    difference: at most one level of 256.

    Args:
        pixels: (B, C, H, W) normalised.
        changes: (B, 19), of `described`.
        partners: (B, C, H, W) normalised; None where nothing is mixed.
    """
    scale = Scale(scale.gain.to(pixels), scale.offset.to(pixels), scale.flipped)
    changes = changes.to(pixels)
    own = _changed((pixels - scale.offset) / scale.gain, changes[:, _FACTORS], changes[:, _ERASED], scale)
    if partners is not None:
        theirs, edges = changes[:, _THEIRS], changes[:, _MIXED][:, 1:]
        other = _changed((partners - scale.offset) / scale.gain, theirs[:, :3], theirs[:, 3:], scale)
        box, weight = _mask(edges, pixels), changes[:, _MIXED][:, :1, None, None]
        pasted = (edges[:, 1] > edges[:, 0])[:, None, None, None]
        own = torch.where(pasted, torch.where(box, other, own), weight * own + (1 - weight) * other)
    return own * scale.gain + scale.offset


def _own(changes: Changes, size: tuple[int, int]) -> list[float]:
    return [*(changes.factors or (1.0, 1.0, 1.0)), *_edges(changes.erased, size)]


def _edges(box: Any, size: tuple[int, int]) -> list[float]:
    rows, columns = (slice(0, 0), slice(0, 0)) if box is None else inside(box, size)
    return [float(edge) for edge in (rows.start, rows.stop, columns.start, columns.stop)]


def _changed(values: Tensor, factors: Tensor, erased: Tensor, scale: Scale) -> Tensor:
    """Of 8-bit values: the colors multiplied, then a box made grey."""
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    luminance = torch.from_numpy(LUMINANCE if values.shape[1] == 3 else LUMINANCE.sum(keepdims=True)).to(values)
    luminance = (luminance.flip(0) if scale.flipped else luminance)[:, None, None]
    grey = (luminance * values).sum(1, keepdim=True)
    mean = brightness * grey.mean((2, 3), keepdim=True)
    recolored = brightness * contrast * (saturation * values + (1 - saturation) * grey) + (1 - contrast) * mean
    same = (factors == 1).all(1)[:, None, None, None]
    values = torch.where(same, values, recolored.clamp(0, 255))
    return values.masked_fill(_mask(erased, values), GREY)


def _mask(edges: Tensor, images: Tensor) -> Tensor:
    """(B, 1, H, W) what is inside of [top, bottom, left, right)."""
    rows, columns = (torch.arange(n, device=images.device) for n in images.shape[-2:])
    top, bottom, left, right = edges[:, :, None].unbind(1)
    down, across = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return (down[:, :, None] & across[:, None, :])[:, None]
