"""Images and labels from wherever they are, as what Trainer feeds a model."""

from hf_kdtl.data.loading import ImageData, ImageDataset, load_images

__all__ = ["ImageData", "ImageDataset", "load_images"]
