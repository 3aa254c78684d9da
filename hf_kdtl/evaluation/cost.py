"""What a model costs: parameters, and images per second."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median

import torch
from torch import Tensor, nn


def parameters(model: nn.Module) -> int:
    """Number of parameters, each counted once where it is shared."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def images_per_second(models: Mapping[str, tuple[nn.Module, Tensor]], repeats: int = 7) -> dict[str, float]:
    """Images per second of a forward in eval mode, as the median of `repeats` timings.

    The models take turns, so that a machine that slows down slows all of them; a first turn is not measured.

    Args:
        models: name -> (model, its pixel_values (B, C, h, w) on its device). B is the batch size to be named beside
            the numbers.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    modes = {name: model.training for name, (model, _) in models.items()}
    for turn in range(repeats + 1):
        for name, (model, pixel_values) in models.items():
            elapsed = _forward(model.eval(), pixel_values)
            if turn:
                seconds[name].append(elapsed)
    for name, (model, _) in models.items():
        model.train(modes[name])
    return {name: len(models[name][1]) / median(taken) for name, taken in seconds.items()}


def _forward(model: nn.Module, pixel_values: Tensor) -> float:
    start = time.perf_counter()
    model(pixel_values=pixel_values)
    if pixel_values.is_cuda:
        torch.cuda.synchronize(pixel_values.device)
    return time.perf_counter() - start
