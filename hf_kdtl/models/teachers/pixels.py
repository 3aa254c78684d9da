"""From the pixels one model was prepared for to the pixels another one expects.

What an image processor does is measured, not read off its attributes: every class has attributes of its own (a second
division by std, a channel flip, crop_pct, a size that is enlarged before the crop), and code in a
model's folder may have others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hf_kdtl.models.blocks import vision_config

# torch's names of PIL's resampling filters. The others have none: for them bicubic, and the distance is noted.
_MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
SIDE = 256  # of the images that are shown to a processor, in pixels
_NEAR = 0.005  # shares of an image that are closer than this are the same: ramps are measured to about 0.001
_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL converts to grey


@dataclass(frozen=True)
class PixelFormat:
    """How an image processor turns 8-bit values v into pixel_values: x = (v * scale - mean) / std, per channel.

    Args:
        scale, mean, std: of the channels in the order R, G, B; one of each for grey images.
        size: (height, width) of the pixels; None keeps the image's.
        mode: torch's name of the filter that resizes.
        flipped: whether the channels come in the order B, G, R.
        box: the central part of a square image that is left after cropping, (height, width), each in (0, 1].
        processor: where images of other proportions are measured.
    """

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None
    mode: str
    flipped: bool = False
    box: tuple[float, float] = (1.0, 1.0)
    processor: Any = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        size = " x ".join(map(str, self.size)) if self.size else "the image's size"
        mean, std = (" ".join(f"{v:.3g}" for v in values) for values in (self.mean, self.std))
        crop = f" of the central {min(self.box):.1%}" if min(self.box) < 1 else ""
        return f"{size}{crop}{', B G R' if self.flipped else ''}, mean {mean}, std {std}"

    @classmethod
    def of(cls, processor: Any) -> PixelFormat:
        """Measure an image processor on single colors and ramps.

        Raises:
            ValueError: for a processor that does anything but rescale, normalize, reorder channels, resize and crop.
        """
        mean, std, flipped = _colors(processor)
        size, box = _view(processor, SIDE, SIDE)
        kept = size == (SIDE, SIDE) and _view(processor, SIDE * 3 // 4, SIDE * 3 // 4)[0] != size
        mode = _MODES.get(resampling(processor), "bicubic")
        return cls(1 / 255, mean, std, None if kept else size, mode, flipped, box, processor)

    def view(self, height: int, width: int) -> tuple[tuple[int, int], tuple[float, float]]:
        """(size, box) for an image of height x width."""
        if self.processor is None or height == width:
            return self.size or (height, width), self.box
        larger = max(1, SIDE // min(height, width))  # of the same proportions, for short ramps are coarse
        shape = larger * height, larger * width
        size, box = _view(self.processor, *shape)
        return ((height, width), (1.0, 1.0)) if size == shape else (size, box)


class PixelAdapter:
    """x of the student's format -> x of the teacher's: re-normalized (affine, per channel), resized, and cropped.

    All steps are differentiable any number of times, so a teacher's derivative is one with respect to the student's
    pixels. Resizing is antialiased, by the teacher's own filter where torch has it (bilinear, bicubic, nearest).
    """

    def __init__(self, source: PixelFormat, target: PixelFormat):
        self.source, self.target = source, target
        std = torch.tensor(source.std) / source.scale * target.scale
        mean = torch.tensor(source.mean) / source.scale * target.scale
        self.gain = std / torch.tensor(target.std)
        self.offset = (mean - torch.tensor(target.mean)) / torch.tensor(target.std)
        self.to_grey = len(source.mean) == 3 and len(target.mean) == 1
        self._views: dict[tuple[int, int], tuple[tuple[int, int], tuple[int, int]]] = {}

    def __call__(self, pixel_values: Tensor) -> Tensor:
        if not pixel_values.is_floating_point():  # of a processor that neither rescales nor normalizes
            pixel_values = pixel_values.float()
        if self.source.flipped:
            pixel_values = pixel_values.flip(1)
        gain, offset = (v.to(pixel_values)[:, None, None] for v in (self.gain, self.offset))
        same = torch.allclose(self.gain, torch.ones(())) and torch.allclose(self.offset, torch.zeros(()))
        if not same or len(self.target.mean) != len(self.source.mean):
            pixel_values = pixel_values * gain + offset
        if self.to_grey:
            pixel_values = (pixel_values * pixel_values.new_tensor(_LUMINANCE)[:, None, None]).sum(1, keepdim=True)
        if self.target.flipped:
            pixel_values = pixel_values.flip(1)
        size, resized = self._sizes(pixel_values)
        if resized != tuple(pixel_values.shape[-2:]):
            smooth = {} if self.target.mode == _MODES[0] else {"antialias": True, "align_corners": False}
            pixel_values = F.interpolate(pixel_values, size=resized, mode=self.target.mode, **smooth)
        if size == resized:
            return pixel_values
        top, left = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
        return pixel_values[..., top : top + size[0], left : left + size[1]]

    def output_size(self, pixel_values: Tensor) -> tuple[int, int]:
        """(height, width) the teacher will see."""
        return self._sizes(pixel_values)[0]

    def _sizes(self, pixel_values: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) that the teacher sees, and those before the crop."""
        shape: Any = tuple(pixel_values.shape[-2:])
        if shape not in self._views:
            size, box = self.target.view(*shape)
            # The student's pixels are cropped already: what it does not see, the teacher cannot be shown.
            part = [its / mine if its < mine - _NEAR else 1.0 for its, mine in zip(box, self.source.box, strict=True)]
            self._views[shape] = size, (round(size[0] / part[0]), round(size[1] / part[1]))
        return self._views[shape]


def resampling(processor: Any) -> Image.Resampling:
    """The filter by which an image processor resizes; bilinear where it names none.

    Raises:
        UnknownSteps: for what names no filter.
    """
    found = getattr(processor, "resample", None)
    try:
        return Image.Resampling(2 if found is None else int(found))
    except (TypeError, ValueError) as error:
        raise _refuse(
            processor, f"has resample {found!r}, and filters are numbers from 0 to 5 (2: bilinear)"
        ) from error


def match_pixels(student: Any, teacher: Any) -> tuple[PixelAdapter | None, str]:
    """What takes pixels of the student's image processor to those of the teacher's, and a sentence about it.

    Returns:
        (adapter, note): adapter is None where the pixels are the same; the note is empty where there is nothing to
        say, else it gives the mean distance to the teacher's own processor on test images, in standard deviations of
        its pixels.

    Raises:
        ValueError: when a processor is not one that can be described, or the description does not hold.
    """
    if student is teacher or (hasattr(student, "to_dict") and _settings(student) == _settings(teacher)):
        return None, ""
    source, target = PixelFormat.of(student), PixelFormat.of(teacher)
    adapter = None if source == target else PixelAdapter(source, target)
    square, wide = (_distance(source, target, adapter, height) for height in (SIDE, SIDE * 3 // 4))
    hidden = any(its > mine + _NEAR for its, mine in zip(target.box, source.box, strict=True))
    if square > 0.5 and not hidden:
        raise ValueError(
            f"{_name(teacher)} cannot be reproduced from the pixels of {_name(student)}: on a test image they differ "
            f"by {square:.2f} standard deviations from what it gives itself. {_WAY_OUT}"
        )
    if adapter is None and max(square, wide) < 0.02:
        return None, ""
    lost = " The student's processor crops more than the teacher's: the teacher misses the border." if hidden else ""
    return adapter, (
        f"the teacher sees {target} (the student {source}). Distance to the teacher's own processor on a test image: "
        f"{square:.3f} standard deviations of its pixels for a square image, {wide:.3f} for one of 4:3.{lost}"
    )


_WAY_OUT = "Pass Teacher(model) without its processor if both see the same pixels, or give both models one processor."


def check_channels(pixel_values: Tensor, model: Any, who: str) -> None:
    """Raises ValueError for pixels of another number of channels than the model reads."""
    channels = getattr(vision_config(getattr(model, "config", None)), "num_channels", None)
    if isinstance(channels, int) and pixel_values.ndim == 4 and pixel_values.shape[1] != channels:
        raise ValueError(
            f"{who} reads {channels} channels and is given pixel_values of shape {tuple(pixel_values.shape)}; "
            f"expected (B, {channels}, height, width). For grey and color models pass both image processors: "
            "Teacher(model, processing_class=...) and the trainer's processing_class."
        )


def _settings(processor: Any) -> Any:
    return processor.to_dict() if hasattr(processor, "to_dict") else processor


def _name(processor: Any) -> str:
    return f"the image processor {type(processor).__name__}"


class UnknownSteps(ValueError):
    """An image processor does more than can be described; `reason` says what, in half a sentence."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(f"{reason}, so its pixels cannot be matched to another model's. {_WAY_OUT}")


def _refuse(processor: Any, what: str) -> UnknownSteps:
    return UnknownSteps(f"{_name(processor)} {what}")


def process(processor: Any, image: np.ndarray) -> Tensor:
    """(C, h, w) of an (H, W, 3) image of 8 bits; of its grey version where the processor takes no colors."""
    shown, failure = Image.fromarray(image), None
    for mode in ("RGB", "L"):
        try:
            pixels = processor(images=[shown.convert(mode)], return_tensors="pt")["pixel_values"]
        except Exception as error:  # whatever its code raises on an image it was not made for
            failure = failure or error
            continue
        if not isinstance(pixels, Tensor):
            raise _refuse(processor, f"gives pixel_values as a {type(pixels).__name__} where asked for tensors")
        if pixels.ndim == 4 and pixels.shape[1] in (1, 3):
            return pixels[0].double()
        raise _refuse(processor, f"gives pixel_values of shape {tuple(pixels.shape)}, expected (1, 3, height, width)")
    raise _refuse(processor, f"fails on a test image ({type(failure).__name__}: {failure})") from failure


def _center(pixels: Tensor) -> Tensor:
    return pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2]


def _colors(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Mean and std by the channels R, G, B for values in [0, 1], and whether B comes first."""

    colors = (0, 0, 0), (255, 255, 255), (255, 0, 0), (17, 101, 203)
    shown = (np.full((SIDE, SIDE, 3), color, np.uint8) for color in colors)
    black, white, red, other = (_center(process(processor, image)) for image in shown)
    span = white - black
    if not span.isfinite().all() or (span == 0).any():
        raise _refuse(processor, "gives black and white the same value")
    share = ((red - black) / span).round(decimals=2).tolist()
    if len(share) == 3 and share not in ([1, 0, 0], [0, 0, 1]):
        raise _refuse(processor, "mixes the color channels")
    flipped = share == [0, 0, 1]
    values = torch.tensor([17.0, 101.0, 203.0])
    values = values if len(share) == 3 else (values * torch.tensor(_LUMINANCE)).sum()[None]
    expected = black + span * (values.flip(0) if flipped else values) / 255
    if ((other - expected) / span).abs().max() > 0.01:
        raise _refuse(processor, "is not linear in the color values")
    # Six digits: those of a processor's file, which float32 does not blur.
    std = [float(f"{1 / v:.6g}") for v in span.tolist()]
    mean = [float(f"{-b / v:.6g}") + 0.0 for b, v in zip(black.tolist(), span.tolist(), strict=True)]
    return (tuple(mean[::-1]), tuple(std[::-1]), True) if flipped else (tuple(mean), tuple(std), False)


def _view(processor: Any, height: int, width: int) -> tuple[tuple[int, int], tuple[float, float]]:
    """(size, box): the size of the pixels, and which central part of a height x width image they show."""
    box, size = [], (0, 0)
    for axis, length in enumerate((height, width)):
        ramp = np.linspace(0, 255, length).round().astype(np.uint8)
        image = np.broadcast_to(ramp[:, None] if axis == 0 else ramp[None, :], (height, width))
        black, white = (_center(process(processor, np.full((height, width, 3), v, np.uint8))) for v in (0, 255))
        pixels = process(processor, np.stack([image] * 3, -1))
        size = pixels.shape[1], pixels.shape[2]
        seen = ((pixels - black[:, None, None]) / (white - black)[:, None, None]).mean(0)
        seen = seen if axis == 0 else seen.T
        rows, columns = (slice(n // 4, n - n // 4) for n in seen.shape)
        at, seen = ((np.arange(len(seen)) + 0.5) / len(seen))[rows], seen[rows, columns]
        where = ((seen.mean(1) * (length - 1) + 0.5) / length).numpy()
        part, start = np.polyfit(at, where, 1) if len(at) > 1 else (1.0, 0.0)
        straight = np.abs(part * at + start - where).max() < 0.02 and seen.std(1, correction=0).max() < 0.02
        if not straight or part <= 0 or abs(part / 2 + start - 0.5) > 0.02:
            raise _refuse(processor, "does more than resize and crop centrally")
        if part > 1.02:
            raise _refuse(processor, "pads images")
        box.append(1.0 if part > 0.995 else round(float(part), 4))
    return size, (box[0], box[1])


def _distance(source: PixelFormat, target: PixelFormat, adapter: PixelAdapter | None, height: int) -> float:
    """Mean |adapted - own| on a test image, in standard deviations of the teacher's own pixels."""
    image = test_image(height, SIDE)
    if min(len(source.mean), len(target.mean)) == 1:  # one of the models sees no colors
        image = np.asarray(Image.fromarray(image).convert("L").convert("RGB"))
    shown = process(source.processor, image)[None].float()
    own = process(target.processor, image)
    adapted = (shown if adapter is None else adapter(shown))[0].double()
    if adapted.shape != own.shape:  # a processor that keeps the image's size
        adapted = F.interpolate(adapted[None], size=own.shape[-2:], mode="bilinear", antialias=True)[0]
    return ((adapted - own).abs().mean() / own.std()).item()


def test_image(height: int, width: int) -> np.ndarray:
    """Random colors at every scale, the coarse ones strongest, as in photographs."""
    draws, image = np.random.default_rng(0), np.zeros((height, width, 3))
    for cells in (2, 4, 8, 16, 32, 64):
        grid = Image.fromarray(draws.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image += (np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC), float) - 127.5) / cells
    return np.clip(127.5 + image, 0, 255).astype(np.uint8)
