"""A split of the data as what Trainer feeds a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from hf_kdtl.data.columns import source_rows
from hf_kdtl.data.decoding import decode_row
from hf_kdtl.data.indexed import RowPass
from hf_kdtl.data.labelled_share import LabelledShareSampler
from hf_kdtl.utils.options import check_option, is_integer
from hf_kdtl.utils.text import some

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_kdtl.data.augmentation import Augmentation


class ImageDataset(torch.utils.data.Dataset):
    """A split of `ImageData` as what Trainer feeds a model: {"pixel_values": (3, H, W) float32, "labels": ...}.

    `labels` is an int, or (K,) float32 when the augmentation mixes images.

    The image processor decides about size and values. Without augmentation it is called as
    `pipeline("image-classification")` calls it, so that the pixels are the same; with augmentation it stops before
    normalisation, the batch is augmented in [0, 1], and then normalised with the processor's mean and std.

    A batch is read and augmented as one (`__getitems__`, which torch's DataLoader calls). Its draws depend on seed,
    epoch and the indices in it, and on nothing else: not on the number of workers, and torch's generator is left as it
    was. DistillationTrainer calls `set_epoch`; a plain Trainer needs
    `hf_kdtl.trainer.callbacks.SetDatasetEpoch`.

    Args:
        split: columns `image` and `label`, as in `ImageData`.
        image_processor: of the student; all images must come out in one size.
        augmentation: only for training.
        num_labels: K; by default the number of classes of the split.
        view_seed: of the augmentation. Not the training seed: runs of other seeds see the same views.
        views: V, how many views there are of each image: its n-th pass shows view n mod V. None: a new one each pass.
        seed: of the order where there is a `labelled_share`.
        labelled_share: of the images in each training batch, where the split has images without a label (-100). By
            default a batch has as many of them as chance will have it. DistillationTrainer takes the order from
            `train_sampler`.

    Raises:
        ValueError: here, when the processor does something that cannot be done after augmentation; when an item is
            read, for an image that cannot be decoded, naming it.
    """

    def __init__(
        self,
        split: Dataset,
        image_processor: Any,
        *,
        augmentation: Augmentation | None = None,
        num_labels: int | None = None,
        view_seed: int = 0,
        views: int | None = None,
        seed: int = 0,
        labelled_share: float | None = None,
    ):
        self.split = split
        self.image_processor = image_processor
        self.augmentation = augmentation
        self.num_labels = num_labels or split.features["label"].num_classes
        check_option("ImageDataset", "view_seed", view_seed, is_integer(view_seed, 0), "a whole number from 0")
        check_option("ImageDataset", "views", views, views is None or is_integer(views), "None, or 1 and more")
        self.view_seed, self.views, self.seed = view_seed, views, seed
        self._rows = source_rows(split)
        self.labelled_share = labelled_share
        # In shared memory, because persistent workers keep the copy of the dataset that they were started with.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        if augmentation is not None:
            self._check_processor()

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, the pass over each image that a plain index means."""
        self._epoch.fill_(epoch)

    def source_index(self, index: int) -> int:
        """The row of item `index` in the split as it was loaded, before any selection."""
        return int(self._rows[index])

    def image_view(self, index: int) -> int:
        """The view that item `index` shows: the number of its pass, mod V with `views=V`."""
        number = index.number if isinstance(index, RowPass) else int(self._epoch)
        return number if self.views is None else number % self.views

    def train_sampler(self, batch_size: int) -> LabelledShareSampler | None:
        """The order of training for batches of that many images; None where there is no `labelled_share`."""
        if self.labelled_share is None:
            return None
        labelled = np.array(self.split["label"][:]) >= 0
        return LabelledShareSampler(labelled, batch_size, self.labelled_share, self.seed, lambda: int(self._epoch))

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        shown = [(self.source_index(index), self.image_view(index)) for index in indices]
        indices = [int(index) for index in indices]  # a sampler may give numpy's integers
        rows = self.split[indices]
        images = [decode_row(image, i, len(self)) for image, i in zip(rows["image"], indices, strict=True)]
        labels: Iterable[Any] = rows["label"]
        if self.augmentation is None:
            pixels = self._pixels(images)
        else:
            pixels, mixed = self._augment(self._pixels(images, do_normalize=False), torch.tensor(labels), shown)
            labels = mixed if mixed.ndim == 2 else mixed.tolist()
        return [{"pixel_values": p, "labels": label} for p, label in zip(pixels, labels, strict=True)]

    def _augment(self, pixels: Tensor, labels: Tensor, shown: list[Any]) -> tuple[Tensor, Tensor]:
        assert self.augmentation is not None
        key = f"{self.view_seed}/{shown}".encode()
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the accelerator's generators too, fork_rng or not.
            torch.default_generator.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=7).digest()))
            pixels, labels = self.augmentation(pixels, labels, self.num_labels)
        return self._normalised(pixels), labels

    def _pixels(self, images: list[Any], **options: Any) -> Tensor:
        arrays = self.image_processor(images, **options)["pixel_values"]
        sizes = {tuple(array.shape) for array in arrays}
        if len(sizes) > 1:
            raise ValueError(
                f"{type(self.image_processor).__name__} returns images of different sizes ({some(sorted(sizes))}), "
                "expected one: set do_resize and a size of height and width, or do_center_crop."
            )
        return torch.stack([torch.as_tensor(array, dtype=torch.float32) for array in arrays])

    def _normalised(self, pixels: Tensor) -> Tensor:
        if not self.image_processor.do_normalize:
            return pixels
        mean, std = (
            torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1)
            for value in (self.image_processor.image_mean, self.image_processor.image_std)
        )
        return (pixels - mean) / std

    def _check_processor(self) -> None:
        # Blocks of black and white in each channel: both ends of the range survive resizing and cropping.
        blocks = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (6, 6, 3))
        image = PIL.Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1))
        plain = self._pixels([image], do_normalize=False)
        ordinary = plain.min() >= 0 and plain.max() <= 1
        if not (ordinary and torch.allclose(self._normalised(plain), self._pixels([image]), atol=1e-4)):
            raise ValueError(
                f"{type(self.image_processor).__name__} gives pixels in [{plain.min():.4g}, {plain.max():.4g}] before "
                "normalisation, or changes them after it; augmentation expects [0, 1] (do_rescale=True) and nothing "
                "but (x - image_mean) / image_std afterwards. Set these, or train without augmentation."
            )
