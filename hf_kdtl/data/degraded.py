"""A split of the data whose images are degraded when they are read."""

from __future__ import annotations

import io
from typing import Any

from datasets import Dataset
from PIL import Image

from hf_kdtl.data.dataset import ImageDataset
from hf_kdtl.data.decoding import decode_row
from hf_kdtl.data.degradations import degradation, degrade_image


def degraded(split: Dataset, image_processor: Any, name: str, severity: int, side: int) -> ImageDataset:
    """A split of the data as what Trainer feeds a model, its images degraded.

    The image is degraded as a file, before any image processor sees it, so models with different processors look at
    the same pixels. Larger images are first scaled down to a shorter side of `side`: noise on a photograph of 12
    megapixels would be averaged away by the resizing to 224 px, and severities would mean nothing. The result is
    rounded to 8 bits, as in a file.

    Args:
        split: columns as in `ImageData`. The index that seeds an image's draws is its row here.
        image_processor: of the model that will see the images.
        name: of `hf_kdtl.data.degradations.DEGRADATIONS`.
        severity: 1 to 5.
        side: the shorter side, in pixels, of the largest input among all the models that are compared; the same for
            all of them.

    Cost: nothing now. At each reading: decoding, the degradation, and an uncompressed file in memory.

    Raises:
        ValueError: for an unknown name, another severity, or a `side` below 1; when read, for an image that cannot
            be decoded.
    """
    degradation(name).check(severity)
    if type(side) is not int or side < 1:
        raise ValueError(f"side is {side!r}; expected the shorter side of the models' input in pixels, such as 224.")
    rows: Any = _Degraded(split, name, severity, side)
    return ImageDataset(rows, image_processor)


class _Degraded:
    """As much of a `datasets.Dataset` as ImageDataset reads. (Dataset.with_transform does not receive the rows, and a
    column of row numbers would copy a split that was selected from another.)"""

    def __init__(self, split: Dataset, name: str, severity: int, side: int):
        self.split, self.name, self.severity, self.side = split, name, severity, side
        self.features = {
            name: split.features[name] for name in ("image", "label")
        }  # not its `row`s: augmentation is for training

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, indices: list[int]) -> dict[str, list[Any]]:
        rows = self.split[indices]
        images = [self._file(image, index) for image, index in zip(rows["image"], indices, strict=True)]
        return rows | {"image": images}

    def _file(self, image: dict[str, Any], index: int) -> dict[str, Any]:
        opened = _at_most(decode_row(image, index, len(self)), self.side)
        degrade_image(opened, self.name, self.severity, index).save(file := io.BytesIO(), "bmp")
        return {"bytes": file.getvalue(), "path": image["path"]}


def _at_most(image: Image.Image, side: int) -> Image.Image:
    ratio = side / min(image.size)
    if ratio >= 1:
        return image
    width, height = image.size
    return image.resize((round(ratio * width), round(ratio * height)), Image.Resampling.BICUBIC)
