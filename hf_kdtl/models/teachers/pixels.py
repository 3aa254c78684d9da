"""From the pixels one model was prepared for to the pixels another one expects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# PIL's numbers for resampling filters, which image processors use. The others have no counterpart in torch.
_MODES = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class PixelFormat:
    """How an image processor turns 8-bit values v into pixel_values: x = (v * scale - mean) / std, per channel."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | int | None  # (height, width); an int is the shorter side; None keeps the size
    mode: str

    def __str__(self) -> str:
        size = self.size if isinstance(self.size, tuple) else (self.size or "?",)
        mean, std = (" ".join(f"{v:.3g}" for v in values) for values in (self.mean, self.std))
        return f"{' x '.join(map(str, size))}, mean {mean}, std {std}"

    @classmethod
    def of(cls, processor: Any) -> PixelFormat:
        """Read an image processor.

        Raises:
            ValueError: for a processor whose arithmetic this does not describe.
        """
        if getattr(processor, "rescale_offset", False):
            raise ValueError(
                f"{type(processor).__name__} has rescale_offset=True, which cannot be matched between teacher and "
                "student; pass Teacher(model) without its processor if both see the same pixels."
            )
        normalise = bool(getattr(processor, "do_normalize", False))
        scale = float(processor.rescale_factor) if getattr(processor, "do_rescale", True) else 1.0
        mean = tuple(map(float, processor.image_mean)) if normalise else (0.0, 0.0, 0.0)
        std = tuple(map(float, processor.image_std)) if normalise else (1.0, 1.0, 1.0)
        return cls(
            scale, mean, std, _size(processor), _MODES.get(int(getattr(processor, "resample", 2) or 2), "bicubic")
        )


def _size(processor: Any) -> tuple[int, int] | int | None:
    cropped = getattr(processor, "do_center_crop", False) and getattr(processor, "crop_size", None)
    size = processor.crop_size if cropped else getattr(processor, "size", None)
    if not cropped and not getattr(processor, "do_resize", True):
        return None
    if not size:
        return None
    if "height" in size:
        return size["height"], size["width"]
    return size.get("shortest_edge")


class PixelAdapter:
    """x of the student's format -> x of the teacher's: re-normalised (affine, per channel), then resized.

    Both steps are differentiable any number of times, so a teacher's derivative is one with respect to the student's
    pixels. Resizing is antialiased, by the teacher's own filter where torch has it (bilinear, bicubic).
    """

    def __init__(self, source: PixelFormat, target: PixelFormat):
        self.target = target
        std = torch.tensor(source.std) / source.scale * target.scale
        mean = torch.tensor(source.mean) / source.scale * target.scale
        self.gain = std / torch.tensor(target.std)
        self.offset = (mean - torch.tensor(target.mean)) / torch.tensor(target.std)

    def __call__(self, pixel_values: Tensor) -> Tensor:
        gain, offset = (v.to(pixel_values)[:, None, None] for v in (self.gain, self.offset))
        if not torch.allclose(self.gain, torch.ones(())) or not torch.allclose(self.offset, torch.zeros(())):
            pixel_values = pixel_values * gain + offset
        size = self.output_size(pixel_values)
        if size == tuple(pixel_values.shape[-2:]):
            return pixel_values
        return F.interpolate(pixel_values, size=size, mode=self.target.mode, antialias=True, align_corners=False)

    def output_size(self, pixel_values: Tensor) -> tuple[int, int]:
        """(height, width) the teacher will see."""
        height, width = pixel_values.shape[-2:]
        if self.target.size is None:
            return height, width
        if isinstance(self.target.size, int):
            ratio = self.target.size / min(height, width)
            return round(height * ratio), round(width * ratio)
        return self.target.size
