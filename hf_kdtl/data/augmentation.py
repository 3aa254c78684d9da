"""Random changes to images, mixup and CutMix included: what each view of each image shows, drawn by its row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from hf_kdtl.data.columns import UNLABELLED
from hf_kdtl.utils.options import check_known, is_integer, is_number

VIEW_VERSION = 1
"""Changes whenever the same seed, view and row give other pixels than before."""
Box = tuple[float, float, float, float]
"""Top, left, bottom, right, in shares of the sides."""
_ASPECT = math.log(4 / 3)
_ERASED = 0.02, 0.33, math.log(3.3)


class Shift(NamedTuple):
    """Of the section that is shown: up to `most` pixels (int) or share of the side (float), at u in [0, 1)."""

    most: float
    down: float
    right: float

    def shares(self, size: tuple[int, int]) -> tuple[float, float]:
        """Down and right, in shares of the height and width; whole pixels of the height and width where `most` is."""
        if isinstance(self.most, float):
            return (2 * self.down - 1) * self.most, (2 * self.right - 1) * self.most
        if self.most >= min(size):
            raise ValueError(f"augmentation 'crop' is {self.most}, expected less than a side: {min(size)} pixels.")
        down, right = (math.floor(u * (2 * self.most + 1)) - self.most for u in (self.down, self.right))
        return down / size[0], right / size[1]


class Part(NamedTuple):
    """The part of an image that a random crop keeps: its share of the area, its width over its height (both in pixels
    of the file, changed as far as the image is too small for it), and where it lies, down and right in [0, 1]."""

    area: float
    aspect: float
    down: float
    right: float

    def box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in pixels of an image of that size."""
        area = self.area * width * height
        aspect = min(max(self.aspect, area / height**2), width**2 / area)
        wide, high = min(math.sqrt(area * aspect), width), min(math.sqrt(area / aspect), height)
        left, top = self.right * (width - wide), self.down * (height - high)
        return left, top, left + wide, top + high


class Mixing(NamedTuple):
    """With whom, as a place in [0, 1) among the candidates, and how: by `weight`, or by pasting its `box`."""

    partner: float
    weight: float
    box: Box | None


@dataclass(frozen=True)
class Changes:
    """What one view does to its image, in shares of the sides, so that it can be rendered at any size.

    Args:
        shift: of the section of the image that is shown.
        part: shown instead of the whole image.
        flip: left and right mirrored.
        factors: of brightness, contrast and saturation.
        erased: becomes grey.
        mixing: with another image, after all of these.
    """

    shift: Shift | None = None
    part: Part | None = None
    flip: bool = False
    factors: tuple[float, float, float] | None = None
    erased: Box | None = None
    mixing: Mixing | None = None


class Augmentation:
    """Random changes to images, from a config such as `{"crop": 4, "flip": True, "mixup": 0.2}`.

    The keys, in the order in which they act; 0, false and null switch one off:

    - `crop`: shift up to that far, up or down and left or right; what is outside the image is black. A whole number
      of pixels (of the student's), or a share of the side below 1, such as 0.125.
    - `resized_crop`: [smallest, largest] part of the area, in (0, 1], that a random crop keeps (aspect ratio 3/4 to
      4/3, in pixels of the file). Instead of `crop`.
    - `flip`: mirror left and right with probability 1/2.
    - `color_jitter`: brightness, contrast and saturation each by a factor in 1 +- this; in (0, 1].
    - `random_erasing`: probability that a box of 2 to 33 % of the area becomes grey; in (0, 1].
    - `mixup`: alpha of Zhang et al. 2018 (arXiv 1710.09412): images and labels are averaged with those of another
      image, weight ~ Beta(alpha, alpha).
    - `cutmix`: alpha of Yun et al. 2019 (arXiv 1905.04899): a box of another image is pasted, and the labels are
      weighted by area. With both mixup and cutmix, each image takes one of them, with probability 1/2.

    The crop is cut from the image at its own resolution and resized once. Mixing happens before either model is
    called: teacher and student then see the same pixels, so that the teacher says what it makes of the mixture that
    the student has to explain. Labelled images are mixed with labelled ones, unlabelled with unlabelled ones.

    Every draw depends on (view_seed, view, row of the image) alone, and no key changes the draws of another.
    `ImageDataset` renders them.

    Raises:
        ValueError: no mapping, unknown key, value outside its range, or both crops.
    """

    def __init__(self, config: Mapping[str, Any]):
        if not isinstance(config, Mapping):
            raise ValueError(f"augmentation is {config!r}, expected a mapping such as {{'crop': 4, 'flip': true}}.")
        self.config = {key: value for key, value in config.items() if not _is_off(value)}
        for key in config:
            check_known("key of augmentation", key, _VALUES)
        for key, value in self.config.items():
            accepts, expected = _VALUES[key]
            if not accepts(value):
                raise ValueError(f"augmentation {key!r} is {value!r}, expected {expected}.")
        if "crop" in self.config and "resized_crop" in self.config:
            raise ValueError("augmentation has both 'crop' and 'resized_crop', expected one; set the other to null.")

    @property
    def mixes(self) -> bool:
        """Whether labels become distributions."""
        return "mixup" in self.config or "cutmix" in self.config

    @property
    def after_crop(self) -> bool:
        """Whether anything is done to the pixels of a crop: colors, erasing, mixing."""
        return self.mixes or "color_jitter" in self.config or "random_erasing" in self.config

    def __repr__(self) -> str:
        return f"Augmentation({self.config})"

    def draw(self, view_seed: int, view: int, row: int) -> Changes:
        """What the image of `row` shows in that view."""
        # One stream of numbers for each (view, row), and each key reads its own place in it.
        bits = np.random.Philox(key=[view_seed, VIEW_VERSION], counter=[0, 0, view, row])
        stream = np.random.Generator(bits)
        u = stream.random(17).tolist()
        of = self.config
        return Changes(
            shift=Shift(of["crop"], u[2], u[3]) if "crop" in of else None,
            part=_part(*of["resized_crop"], *u[:4]) if "resized_crop" in of else None,
            flip="flip" in of and u[4] < 0.5,
            factors=_factors(of["color_jitter"], *u[5:8]) if "color_jitter" in of else None,
            erased=_erased(*u[9:13]) if u[8] < of.get("random_erasing", 0) else None,
            mixing=self._mixing(stream, u[13:]) if self.mixes else None,
        )

    def _mixing(self, stream: np.random.Generator, u: list[float]) -> Mixing:
        key = "mixup" if "mixup" in self.config else "cutmix"
        if "mixup" in self.config and "cutmix" in self.config:
            key = "mixup" if u[1] < 0.5 else "cutmix"
        weight, half = float(stream.beta(self.config[key], self.config[key])), 0.0
        if key == "mixup":
            return Mixing(u[0], weight, None)
        half = math.sqrt(1 - weight) / 2
        low, high = ([min(max(at + step, 0.0), 1.0) for at in u[2:4]] for step in (-half, half))
        return Mixing(u[0], weight, (*low, *high))  # type: ignore[arg-type]


def soft_labels(labels: Tensor, partners: Tensor, own_weight: Tensor, num_labels: int) -> Tensor:
    """w onehot(labels) + (1 - w) onehot(partners), (B, K) float32; a row of -100 where either is -100.

    >>> soft_labels(torch.tensor([0, 2]), torch.tensor([1, -100]), torch.tensor([0.75, 0.5]), 3)
    tensor([[   0.7500,    0.2500,    0.0000],
            [-100.0000, -100.0000, -100.0000]])
    """
    weight = own_weight[:, None].float()
    own, other = (F.one_hot(classes.clamp(min=0), num_labels) for classes in (labels, partners))
    unknown = (labels == UNLABELLED) | (partners == UNLABELLED)
    return (weight * own + (1 - weight) * other).masked_fill(unknown[:, None], UNLABELLED)


def _part(low: float, high: float, area: float, aspect: float, down: float, right: float) -> Part:
    return Part(low + area * (high - low), math.exp((2 * aspect - 1) * _ASPECT), down, right)


def _factors(most: float, *u: float) -> tuple[float, float, float]:
    brightness, contrast, saturation = (1 + (2 * one - 1) * most for one in u)
    return brightness, contrast, saturation


def _erased(area: float, aspect: float, down: float, right: float) -> Box:
    least, most, widest = _ERASED
    area, aspect = least + area * (most - least), math.exp((2 * aspect - 1) * widest)
    high, wide = min(math.sqrt(area / aspect), 1.0), min(math.sqrt(area * aspect), 1.0)
    top, left = down * (1 - high), right * (1 - wide)
    return top, left, top + high, left + wide


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: is_number(value) and low < value <= high


def _is_area_range(value: Any) -> bool:
    ok = isinstance(value, list | tuple) and len(value) == 2 and all(map(_number(0, 1), value))
    return ok and value[0] <= value[1]


def _is_crop(value: Any) -> bool:
    return is_integer(value) or (isinstance(value, float) and 0 < value < 1)


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "crop": (_is_crop, "a whole number of pixels, such as 4, or a share of the side below 1, such as 0.125"),
    "resized_crop": (_is_area_range, "[smallest, largest] part of the area in (0, 1], such as [0.6, 1.0]"),
    "flip": (lambda value: value is True, "true or false"),
    "color_jitter": (_number(0, 1), "a number in [0, 1]"),
    "random_erasing": (_number(0, 1), "a probability in [0, 1]"),
    "mixup": (_number(0, 1e3), "an alpha in [0, 1000], such as 0.2"),
    "cutmix": (_number(0, 1e3), "an alpha in [0, 1000], such as 1.0"),
}


def _is_off(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and value == 0)
