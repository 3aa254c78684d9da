"""Augmentation of batches of images with kornia, mixup and CutMix included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_kdtl.utils.options import check_known, is_integer, is_number

UNLABELLED = -100


class Augmentation:
    """Random changes to a batch, from a config such as `{"crop": 4, "flip": True, "mixup": 0.2}`.

    The keys, in the order in which they act; 0, false and null switch one off:

    - `crop`: pixels of black padding on each side, then a random crop back to the size. An integer.
    - `resized_crop`: [smallest, largest] part of the area, in (0, 1], that a random crop keeps before it is resized
      back (aspect ratio 3/4 to 4/3). Instead of `crop`.
    - `flip`: mirror left and right with probability 1/2.
    - `color_jitter`: brightness, contrast and saturation each by a factor in 1 +- this; in (0, 1].
    - `random_erasing`: probability that a box of 2 to 33 % of the area becomes grey; in (0, 1].
    - `mixup`: alpha of Zhang et al. 2018 (arXiv 1710.09412): images and labels are averaged with that of another image
      of the batch, weight ~ Beta(alpha, alpha) drawn for each image.
    - `cutmix`: alpha of Yun et al. 2019 (arXiv 1905.04899): a box of another image of the batch is pasted, and the
      labels are weighted by area. With both mixup and cutmix, one is drawn for each batch, with probability 1/2.

    Mixing happens here, before either model is called: teacher and student then see the same pixels, so that the
    teacher says what it makes of the mixture that the student has to explain, rather than of two other images.

    Draws come from torch's global CPU generator (kornia offers no other): seed it, or use `ImageDataset`, which does.

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
        self._sizes: dict[tuple[int, int], nn.Module] = {}
        # kornia draws all of lambda's range; _mixup applies mixup's alpha.
        self._mixup = K.RandomMixUpV2(data_keys=["input", "class"])
        self._cutmix = K.RandomCutMixV2(
            data_keys=["input", "class"], beta=self.config.get("cutmix"), use_correct_lambda=True
        )

    @property
    def mixes(self) -> bool:
        """Whether labels become distributions."""
        return "mixup" in self.config or "cutmix" in self.config

    def __repr__(self) -> str:
        return f"Augmentation({self.config})"

    @torch.no_grad()
    def __call__(self, pixels: Tensor, labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
        """Augmented pixels (B, 3, H, W), and labels.

        Args:
            pixels: (B, 3, H, W) floats in [0, 1], before normalisation. The result has the same shape and range.
            labels: (B,) int64, -100 for an unlabelled image.
            num_labels: K.

        Returns:
            pixels, and the labels as they came, or (B, K) float32 rows that sum to 1 when mixing. The row of a mixture
            with an unlabelled image in it is all -100.
        """
        height, width = pixels.shape[-2:]
        if (height, width) not in self._sizes:
            self._sizes[height, width] = _single_image_changes(self.config, (height, width))
        pixels = self._sizes[height, width](pixels)
        if not self.mixes:
            return pixels, labels
        mix = self._draw_mixup if self._mixup_is_next() else self._draw_cutmix
        pixels, partners, own_weight = mix(pixels, labels)
        return pixels, soft_labels(labels, partners, own_weight, num_labels)

    def _mixup_is_next(self) -> bool:
        if "mixup" in self.config and "cutmix" in self.config:
            return bool(torch.rand(()) < 0.5)
        return "mixup" in self.config

    def _draw_mixup(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # kornia draws lambda from U[0, 1] only, so that its draw is replaced by Beta(alpha, alpha).
        drawn = self._mixup.forward_parameters(pixels.shape)
        alpha = torch.tensor(float(self.config["mixup"]))
        drawn["mixup_lambdas"] = torch.distributions.Beta(alpha, alpha).sample((len(pixels),))
        mixed, classes = self._mixup(pixels, labels, params=drawn)
        return mixed, classes[:, 1].long(), 1 - classes[:, 2]  # kornia's lambda is the partner's weight in mixup ...

    def _draw_cutmix(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixed, classes = self._cutmix(pixels, labels)
        return mixed, classes[0, :, 1].long(), classes[0, :, 2]  # ... and, with use_correct_lambda, the own in CutMix


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


def _single_image_changes(config: Mapping[str, Any], size: tuple[int, int]) -> nn.Module:
    changes: list[nn.Module] = []
    if "crop" in config:
        changes.append(K.RandomCrop(size, padding=config["crop"]))
    if "resized_crop" in config:
        changes.append(K.RandomResizedCrop(size, scale=tuple(config["resized_crop"])))
    if "flip" in config:
        changes.append(K.RandomHorizontalFlip())
    if "color_jitter" in config:
        factor = config["color_jitter"]
        changes.append(K.ColorJitter(factor, factor, factor, 0.0))
    if "random_erasing" in config:
        # Grey: the value that normalisation takes closest to 0.
        changes.append(K.RandomErasing(p=config["random_erasing"], value=0.5))
    return nn.Sequential(*changes)


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: is_number(value) and low < value <= high


def _is_area_range(value: Any) -> bool:
    ok = isinstance(value, list | tuple) and len(value) == 2 and all(map(_number(0, 1), value))
    return ok and value[0] <= value[1]


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "crop": (is_integer, "a whole number of pixels, such as 4"),
    "resized_crop": (_is_area_range, "[smallest, largest] part of the area in (0, 1], such as [0.6, 1.0]"),
    "flip": (lambda value: value is True, "true or false"),
    "color_jitter": (_number(0, 1), "a number in [0, 1]"),
    "random_erasing": (_number(0, 1), "a probability in [0, 1]"),
    "mixup": (_number(0, 1e3), "an alpha in [0, 1000], such as 0.2"),
    "cutmix": (_number(0, 1e3), "an alpha in [0, 1000], such as 1.0"),
}


def _is_off(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and value == 0)
