"""SigLIP 2's inputs: an image as a row of flat patches, with a mask and their grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FlatPatches(nn.Module):
    """A model that reads flat patches (B, N, 3 p^2), a mask (B, N) and their grid (B, 2), given pixels (B, 3, h, w).

    Patches are cut row by row, each as rows of pixels of three channels, as Siglip2ImageProcessor cuts them. No patch
    is padding, so all images of a batch have one size, a multiple of p. Differentiable by the pixels.

    Args:
        model: a Siglip2VisionModel.
    """

    headless = True

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, pixel_values: Tensor, **inputs: Any) -> Any:
        """The model's own outputs for pixels (B, 3, h, w).

        Raises:
            ValueError: for a height or width that is no multiple of the patch size.
        """
        patches, grid = cut(pixel_values, self.config.patch_size)
        mask = torch.ones(patches.shape[:2], dtype=torch.int64, device=patches.device)
        shapes = torch.tensor([grid] * len(patches), device=patches.device)
        return self.model(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes, **inputs)


class SquareProcessor:
    """Siglip2ImageProcessor as one that gives pixels (B, 3, h, w), for pixels to be matched with."""

    def __init__(self, processor: Any):
        self.processor, self.resample = processor, getattr(processor, "resample", None)

    def __call__(self, images: Any, return_tensors: str = "pt") -> dict[str, Tensor]:
        """Pixels of images of one size, as the processor resizes and normalizes them."""
        found = self.processor(images=images, return_tensors="pt")
        rows, columns = found["spatial_shapes"][0].tolist()
        side = self.processor.patch_size
        flat = found["pixel_values"][:, : rows * columns]
        cells = flat.reshape(len(flat), rows, columns, side, side, -1)
        return {"pixel_values": cells.permute(0, 5, 1, 3, 2, 4).reshape(len(flat), -1, rows * side, columns * side)}

    def to_dict(self) -> dict[str, Any]:
        """The processor's settings."""
        return self.processor.to_dict()

    def save_pretrained(self, folder: Any) -> Any:
        """Save the processor."""
        return self.processor.save_pretrained(folder)


def cut(pixel_values: Tensor, side: int) -> tuple[Tensor, tuple[int, int]]:
    """Flat patches (B, N, 3 p^2) of pixels (B, 3, h, w), and their grid.

    >>> patches, grid = cut(torch.arange(4.0).reshape(1, 1, 1, 4), 1)
    >>> patches.flatten().tolist(), grid
    ([0.0, 1.0, 2.0, 3.0], (1, 4))
    """
    images, channels, height, width = pixel_values.shape
    if height % side or width % side:
        raise ValueError(f"pixels of {height} x {width} cannot be cut into patches of {side}; expected multiples.")
    grid = height // side, width // side
    cells = pixel_values.reshape(images, channels, grid[0], side, grid[1], side)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(images, grid[0] * grid[1], side * side * channels), grid
