"""Images and labels from wherever they are, as what Trainer feeds a model."""

from hf_kdtl.data.dataset import ImageDataset
from hf_kdtl.data.loading import ImageData, load_images

__all__ = ["ImageData", "ImageDataset", "load_images"]
