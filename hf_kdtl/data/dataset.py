"""A split of the data as what Trainer feeds a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_kdtl.data.columns import as_split, source_rows
from hf_kdtl.data.decoding import decode_row
from hf_kdtl.data.indexed import TEACHER_PIXELS, RowPass
from hf_kdtl.data.labelled_share import LabelledShareSampler
from hf_kdtl.data.rendering import check_sizes
from hf_kdtl.data.several import labels_of
from hf_kdtl.data.views import Views
from hf_kdtl.models.teachers.processor_files import check_processor
from hf_kdtl.utils.options import check_option, is_integer

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_kdtl.data.augmentation import Augmentation


class ImageDataset(torch.utils.data.Dataset):
    """A split of `ImageData` as what Trainer feeds a model: {"pixel_values": (3, H, W) float32, "labels": ...}.

    `labels` is an int, or (K,) float32 when the augmentation mixes images.

    Without augmentation the image processor is called as `pipeline("image-classification")` calls it, so that the
    pixels are the same. With augmentation its steps are replayed (`hf_kdtl.data.rendering`): the crop is cut from the
    image at its own resolution and resized once.

    What an image shows depends on (view_seed, view, row) alone, its row in the split as it was loaded: not on the
    batch, the order, the number of workers, the training seed or what else was selected; no global generator is used.
    (The partners of mixup and cutmix are drawn among the images of this split that have a label, or have none, as the
    image does: there, other selections are other views.) DistillationTrainer calls `set_epoch`; a plain Trainer needs
    `hf_kdtl.trainer.callbacks.SetDatasetEpoch`.

    Args:
        split: columns `image`, `label` and, where it is one of `ImageData`, `row`.
        image_processor: of the student; all images must come out in one size.
        augmentation: only for training.
        num_labels: K; by default the number of classes of the split.
        view_seed: of the augmentation. Not the training seed: runs of other seeds see the same views.
        views: V, how many views there are of each image: its n-th pass shows view n mod V. None: a new one each pass.
        seed: of the order where there is a `labelled_share`.
        labelled_share: of the images in each training batch, where the split has images without a label (-100). By
            default a batch has as many of them as chance will have it. DistillationTrainer takes the order from
            `train_sampler`.
        teacher_processor: the teacher's, for `teacher_pixels: own`: items then also hold `teacher_pixel_values`, the
            same crop, flip, colors and mixture at the teacher's size, from the same decoded file.

    Cost: with augmentation, decoding, one resize and about 0.2 ms an image of 224 pixels; color_jitter 0.6 ms; mixing
    renders a second image. A JPEG that is much larger than what is shown of it is decoded smaller.

    Raises:
        ValueError: here, for what is no split of `ImageData`, and when the processor has steps that cannot be
            replayed; when an item is read, for an image that cannot be decoded, naming it.

    Example:
        >>> images = load_images("digits")  # doctest: +SKIP
        >>> augmentation = Augmentation({"resized_crop": [0.6, 1.0], "flip": True})  # doctest: +SKIP
        >>> train = ImageDataset(images.train, processor, augmentation=augmentation)  # doctest: +SKIP
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
        teacher_processor: Any = None,
    ):
        self.split = split = as_split(split, num_labels)
        self.image_processor = check_processor(image_processor)
        self.augmentation = augmentation
        self.num_labels = num_labels or split.features["label"].num_classes
        for name, given in (("view_seed", view_seed), ("seed", seed)):
            check_option("ImageDataset", name, given, is_integer(given, 0), "a whole number from 0")
        check_option("ImageDataset", "views", views, views is None or is_integer(views), "None, or 1 and more")
        self.view_seed, self.views, self.seed = view_seed, views, seed
        self._rows = source_rows(split)
        self.labelled_share = labelled_share
        # In shared memory, because persistent workers keep the copy of the dataset that they were started with.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.teacher_processor = teacher_processor
        self._processors = {"pixel_values": image_processor}
        if teacher_processor is not None:
            self._processors[TEACHER_PIXELS] = teacher_processor
        self._augmented: Views | None = None
        if augmentation is not None:
            self._augmented = Views(split, augmentation, self._processors, view_seed, self.num_labels)

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
        plain = [int(index) for index in indices]  # a sampler may give numpy's integers
        if self._augmented is not None:
            return self._augmented.items(plain, [self.image_view(index) for index in indices])
        rows = self.split[plain]
        images = [decode_row(image, i, len(self)) for image, i in zip(rows["image"], plain, strict=True)]
        items: list[dict[str, Any]] = [{"labels": label} for label in labels_of(rows)]
        for key, processor in self._processors.items():
            arrays = processor(images)["pixel_values"]
            check_sizes([array.shape for array in arrays], processor)
            for item, array in zip(items, arrays, strict=True):
                item[key] = torch.as_tensor(array, dtype=torch.float32)
        return items

    @property
    def finishes_later(self) -> bool:
        """Whether the augmentation has colors, erasing or mixing, which a trainer can do for a whole batch."""
        return self.augmentation is not None and self.augmentation.after_crop

    def unfinished_items(self, indices: list[int]) -> list[dict[str, Any]]:
        """As `__getitems__`, without colors, erasing and mixing: `finish` does these for a batch."""
        assert self._augmented is not None
        return self._augmented.items([int(index) for index in indices], [self.image_view(i) for i in indices], True)

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of unfinished items with these, on the device of its pixels."""
        assert self._augmented is not None
        return self._augmented.finish(batch)

    def view_facts(self) -> dict[str, Any]:
        """What decides which pixels view v of row i has, in addition to the images and the image processors: plain
        data, equal for data sets that show the same."""
        return {"augmentation": {}} if self._augmented is None else self._augmented.facts()
