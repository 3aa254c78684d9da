"""The former place of `hf_kdtl.data.augmentation`, kept for imports."""

from hf_kdtl.data.augmentation import Augmentation

__all__ = ["Augmentation"]
