"""Arithmetic, parameters and time of a forward in eval mode; `hf_kdtl.evaluation.cost` adds memory and disk."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_kdtl.functional.derivatives import math_attention

Models = Mapping[str, tuple[nn.Module, Tensor]]
WARM_UP = 2  # turns that are not timed: the first ones choose kernels and fill the allocator


def parameters(model: nn.Module) -> int:
    """Number of parameters, each counted once where it is shared."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model: nn.Module, pixel_values: Tensor) -> int:
    """Floating-point operations of a forward of one image, a multiply-add counted as 2. [ours]

    Of matrix products, convolutions and attention, as torch counts them; norms, activations and softmax are left out.
    For a ViT of L blocks of width D and inner width M, over T tokens of which P are patches of p x p pixels:

        2 P D C p^2 + L (8 T D^2 + 4 T^2 D + 4 T D M) + 2 D K.

    Args:
        model: with attention of torch ("eager" or "sdpa"); other kernels (flash_attention_2) are not seen.
        pixel_values: (B, C, h, w) on its device; the first image is used.

    Cost: one forward of one image.
    """
    counter = FlopCounterMode(display=False)
    # torch counts the CPU's fused attention as 0.
    with measuring([model]), math_attention(), counter:
        model(pixel_values=pixel_values[:1])
    return counter.get_total_flops()


def latency(models: Models, repeats: int = 30) -> dict[str, dict[str, float]]:
    """{name: {"median": ..., "p95": ...}}: milliseconds of a forward pass of the batch, after a warm-up. [ours]

    Args:
        models: name -> (model, its pixel_values (B, C, h, w) on its device).
        repeats: timings for each model. The 95th percentile is interpolated between them.

    Raises:
        ValueError: when `repeats` is below 1.
    """
    timings = seconds(models, repeats)
    return {
        name: {"median": 1000 * median(taken), "p95": 1000 * float(np.percentile(taken, 95))}
        for name, taken in timings.items()
    }


def seconds(models: Models, repeats: int) -> dict[str, list[float]]:
    """Timings of each model. They take turns, so that a machine that slows down slows all of them."""
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, expected 1 or more.")
    timings: dict[str, list[float]] = {name: [] for name in models}
    with measuring([model for model, _ in models.values()]):
        for turn in range(WARM_UP + repeats):
            for name, (model, pixel_values) in models.items():
                elapsed = _forward(model, pixel_values)
                if turn >= WARM_UP:
                    timings[name].append(elapsed)
    return timings


def _forward(model: nn.Module, pixel_values: Tensor) -> float:
    start = time.perf_counter()
    model(pixel_values=pixel_values)
    if pixel_values.is_cuda:  # else only the launch of its kernels was timed
        torch.cuda.synchronize(pixel_values.device)
    return time.perf_counter() - start


@contextmanager
def measuring(models: list[nn.Module]) -> Iterator[None]:
    """Inside: eval mode and no graph; the mode of each module is put back."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        with torch.no_grad():
            for model in models:
                model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
