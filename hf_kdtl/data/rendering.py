"""What an image processor makes of an image, or of a part of it: cut at the image's own resolution, resized once."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_kdtl.data.augmentation import Box, Changes, Mixing
from hf_kdtl.data.decoding import SIDEWAYS, decode_row, orientation, to_reduced_rgb
from hf_kdtl.models.teachers.pixels import SIDE, PixelFormat, UnknownSteps, process, resampling, test_image
from hf_kdtl.utils.text import some

LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow converts to grey
GREY = 128  # close to what normalisation takes to 0
_SHAPES = (SIDE, SIDE), (SIDE // 2, SIDE), (SIDE, SIDE // 2)
"""Height and width of the images by which steps are measured: no size is rounded in them."""
_FIT = 0.05
"""So far may the replayed steps be from the processor's own pixels on a test image, in their standard deviations."""


class Region(NamedTuple):
    """What to show of an image: `box` (left, top, right, bottom; in its pixels, it may reach beyond them) at `size`
    (height, width), from a JPEG decoded at 1/factor."""

    size: tuple[int, int]
    box: tuple[float, float, float, float]
    factor: int


class Renderer:
    """The steps of an image processor, replayed on augmented images.

    They are measured (`PixelFormat`), not read off its attributes: the size, the filter, whether an image is stretched
    to it or its center is cut out, mean and std of each channel and their order.

    Raises:
        ValueError: for a processor with other steps, saying which.
    """

    def __init__(self, processor: Any):
        self.processor = processor
        try:
            self.resample = resampling(processor)
            self.format = PixelFormat.of(processor)
            self.way = _way(self.format)
            std, mean = (np.array(v, np.float64)[:, None, None] for v in (self.format.std, self.format.mean))
            order = slice(None, None, -1 if self.format.flipped else 1)
            self.gain, self.offset = ((v / std)[order].astype(np.float32) for v in (self.format.scale, -mean))
            self._check()
        except UnknownSteps as error:
            raise ValueError(
                f"augmentation replays the steps of the image processor, and {error.reason}; expected one that "
                "resizes, crops centrally, rescales and normalizes. Set these, or train without augmentation."
            ) from error

    def region(self, image: Image.Image, changes: Changes, student: Renderer) -> Region:
        """Of an image that is opened and not read yet; a `crop` counts in pixels of the student's."""
        turned = orientation(image)
        width, height = image.size[::-1] if turned in SIDEWAYS else image.size
        (rows, columns), box = self._shown(width, height)
        if changes.part is not None:
            box = changes.part.box(width, height)
        across, along = (box[2] - box[0]) / columns, (box[3] - box[1]) / rows  # pixels of the image for one shown
        if changes.shift is not None:
            down, right = changes.shift.shares(student._shown(width, height)[0])
            x, y = round(right * columns) * across, round(down * rows) * along
            box = box[0] + x, box[1] + y, box[2] + x, box[3] + y
        # A smaller decoding that still has a pixel for each that is shown: measured to be as sharp.
        reducible = image.format in ("JPEG", "MPO") and turned == 1
        fits = [factor for factor in (2, 4, 8) if reducible and factor <= min(across, along)]
        return Region((rows, columns), box, max(fits, default=1))

    def _shown(self, width: int, height: int) -> tuple[tuple[int, int], tuple[float, float, float, float]]:
        """Size and box of the processor's own view of an image."""
        size, short = self.format.size, min(width, height)
        if size is None:
            return (height, width), (0, 0, width, height)
        if self.way == "proportional":
            scale = min(size)
            return (scale * height // short, scale * width // short), (0, 0, width, height)
        # Which part of the side is left after the central crop: of whole pixels before it.
        part = [side / round(side / share) for side, share in zip(size, self.format.box, strict=True)]
        across, along = (short, short) if self.way == "center" else (width, height)
        wide, high = part[1] * across, part[0] * along
        left, top = (width - wide) / 2, (height - high) / 2
        return size, (left, top, left + wide, top + high)

    def draw(self, image: Image.Image, region: Region, changes: Changes) -> np.ndarray:
        """(h, w, C) of 8 bits, of an image that was decoded at the region's factor."""
        if len(self.format.mean) == 1:
            image = image.convert("L")
        image = _resized(image, region, self.resample)
        if changes.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if changes.factors is not None:
            image = _recolored(image, *changes.factors).convert(image.mode)
        pixels = np.array(image).reshape(*region.size, -1)
        if changes.erased is not None:
            pixels[inside(changes.erased, region.size)] = GREY
        return pixels

    def values(self, pixels: np.ndarray, weight: float = 1.0, partner: np.ndarray | None = None) -> Tensor:
        """(C, h, w) float32, normalised: weight * pixels + (1 - weight) * partner, both (h, w, C) of 8 bits."""
        mixed = pixels if partner is None else pixels * np.float32(weight) + partner * np.float32(1 - weight)
        mixed = mixed.transpose(2, 0, 1).astype(np.float32, order="C")
        if self.format.flipped:
            mixed = np.ascontiguousarray(mixed[::-1])
        mixed *= self.gain
        mixed += self.offset
        return torch.from_numpy(mixed)

    def _check(self) -> None:
        for height, width in _SHAPES:
            image = Image.fromarray(test_image(height, width))
            own = process(self.processor, np.asarray(image))
            mine = self.values(self.draw(image, self.region(image, Changes(), self), Changes())).double()
            apart = (mine - own).abs().mean() / own.std() if mine.shape == own.shape else torch.inf
            if not apart < _FIT:
                raise UnknownSteps(
                    f"of a test image {type(self.processor).__name__} gives pixels of shape {tuple(own.shape)} that "
                    f"differ by {apart:.2f} of their standard deviation from those of the steps that were found"
                )


def render(
    cell: dict[str, Any], index: int, count: int, renderers: Sequence[Renderer], changes: Changes
) -> list[np.ndarray]:
    """The image of a cell of an image column as each renderer shows it, (h, w, C) of 8 bits each; the first one is the
    student's."""
    decoded: dict[int, Image.Image] = {}

    def drawn(renderer: Renderer) -> np.ndarray:
        def read(image: Image.Image) -> np.ndarray:
            region = renderer.region(image, changes, renderers[0])
            if region.factor not in decoded:
                decoded[region.factor] = to_reduced_rgb(image, region.factor)
            return renderer.draw(decoded[region.factor], region, changes)

        return decode_row(cell, index, count, read)

    return [drawn(renderer) for renderer in renderers]


def mix(renderer: Renderer, mixing: Mixing, own: np.ndarray, partner: np.ndarray) -> tuple[Tensor, float]:
    """The mixture of two images as `Renderer.values`, and the weight of the first one in it."""
    if mixing.box is None:
        return renderer.values(own, mixing.weight, partner), mixing.weight
    rows, columns = inside(mixing.box, own.shape[:2])
    own[rows, columns] = partner[rows, columns]
    return renderer.values(own), own_weight(mixing, own.shape[:2])


def own_weight(mixing: Mixing, size: tuple[int, ...]) -> float:
    """Of the first image in a mixture of that height and width: by the area where a box is pasted."""
    if mixing.box is None:
        return mixing.weight
    rows, columns = inside(mixing.box, size)
    return 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (size[0] * size[1])


def check_sizes(shapes: Sequence[tuple[int, ...]], processor: Any) -> None:
    """Raises ValueError for images of different shapes."""
    if len(different := {tuple(shape) for shape in shapes}) > 1:
        raise ValueError(
            f"{type(processor).__name__} returns images of different sizes ({some(sorted(different))}), expected one: "
            "set do_resize and a size of height and width, or do_center_crop."
        )


def inside(box: Box, size: tuple[int, ...]) -> tuple[slice, slice]:
    """The rows and columns of a box."""
    top, left, bottom, right = (round(share * side) for share, side in zip(box, 2 * tuple(size), strict=True))
    return slice(top, bottom), slice(left, right)


def _recolored(image: Image.Image, brightness: float, contrast: float, saturation: float) -> Image.Image:
    """One affine map of the colors: contrast about the mean grey, saturation about each pixel's grey; then clipped."""
    image = image.convert("RGB") if image.mode == "L" else image
    mean = brightness * float(LUMINANCE @ image.reduce(image.size).getpixel((0, 0)))
    colors = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * LUMINANCE)
    offset = (1 - contrast) * mean
    return image.convert("RGB", tuple(np.column_stack([colors, 3 * [offset]]).ravel().tolist()))


def _resized(image: Image.Image, region: Region, resample: Image.Resampling) -> Image.Image:
    """The region; black where it is outside the image."""
    (rows, columns), box = region.size, [edge / region.factor for edge in region.box]
    spans = []
    for low, high, number, length in zip(box[:2], box[2:], (columns, rows), image.size, strict=True):
        step = (high - low) / number  # 1e-6: of a pixel, for rounding
        first, last = max(0, ceil(-low / step - 1e-6)), min(number, floor((length - low) / step + 1e-6))
        spans.append((first, last, max(low + first * step, 0.0), min(low + last * step, float(length))))
    (first, last, left, right), (top, bottom, upper, lower) = spans
    shown = image.resize((last - first, bottom - top), resample, box=(left, upper, right, lower))
    if shown.size == (columns, rows):
        return shown
    whole = Image.new(image.mode, (columns, rows))
    whole.paste(shown, (first, top))
    return whole


def _way(form: PixelFormat) -> str:
    """How an image that is no square is fitted: "keep", "stretch", "center" (of the short side), "proportional"."""
    if form.size is None:
        return "keep"
    found = set()
    for height, width in _SHAPES[1:]:
        size, box = form.view(height, width)
        short = min(height, width)
        center = form.box[0] * short / height, form.box[1] * short / width
        whole = min(form.size) * height // short, min(form.size) * width // short
        ways = {"stretch": (form.size, form.box), "center": (form.size, center), "proportional": (whole, (1.0, 1.0))}
        near = [way for way, (its, part) in ways.items() if size == its and np.allclose(box, part, atol=0.01)]
        found.add(near[0] if near else "")
    if len(found) > 1 or "" in found:
        raise UnknownSteps(f"{type(form.processor).__name__} neither stretches images nor shows their center")
    return found.pop()
