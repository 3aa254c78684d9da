"""What a model costs: parameters, arithmetic, time, memory, size on disk. All of a forward in eval mode."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.autograd.profiler import profile

from hf_kdtl.models.measure import Models, flops, latency, measuring, parameters, seconds

__all__ = ["cost", "device_name", "file_size", "flops", "images_per_second", "latency", "parameters", "peak_memory"]


def cost(models: Models, repeats: int = 30) -> dict[str, dict[str, Any]]:
    """What each model costs, as results.json holds it. [ours]

    Returns {name: {
        "device"             "NVIDIA H200", or "x86_64 CPU, 2 threads",
        "batch_size"         N, the number of images given,
        "dtype"              of the pixels, such as "float32",
        "parameters"         `parameters`,
        "flops"              `flops`, of one image,
        "images_per_second"  N / the median seconds of a batch of N,
        "latency_ms"         {"1": {"median": ..., "p95": ...}, "N": the same}, milliseconds of a batch,
        "peak_memory_bytes"  `peak_memory` of a batch of N,
        "file_bytes"         `file_size`}}.

    Args:
        models: name -> (model, its pixel_values (N, C, h, w) on its device).
        repeats: timings for each model and batch size; with fewer than 20 the 95th percentile says little.

    Cost: 2 (repeats + 2) + 3 forwards of each model, half of them of one image; and a copy of its weights on disk.

    Raises:
        ValueError: where a model is given no images, or `repeats` is below 1.
    """
    for name, (_, pixel_values) in models.items():
        if not len(pixel_values):
            raise ValueError(f"{name} has pixel_values {tuple(pixel_values.shape)}; expected one image or more.")
    single = latency({name: (model, pixels[:1]) for name, (model, pixels) in models.items()}, repeats)
    full = latency(models, repeats)
    found = {}
    for name, (model, pixels) in models.items():
        found[name] = {
            "device": device_name(pixels.device),
            "batch_size": len(pixels),
            "dtype": str(pixels.dtype).removeprefix("torch."),
            "parameters": parameters(model),
            "flops": flops(model, pixels),
            "images_per_second": 1000 * len(pixels) / full[name]["median"],
            "latency_ms": {"1": single[name], str(len(pixels)): full[name]},
            "peak_memory_bytes": peak_memory(model, pixels),
            "file_bytes": file_size(model),
        }
    return found


def images_per_second(models: Models, repeats: int = 7) -> dict[str, float]:
    """Images per second of a forward in eval mode, as the median of `repeats` timings after a warm-up.

    Args:
        models: name -> (model, its pixel_values (B, C, h, w) on its device). B is the batch size to be named with
            the numbers.
        repeats: timings for each model.

    Raises:
        ValueError: when `repeats` is below 1.
    """
    return {name: len(models[name][1]) / median(taken) for name, taken in seconds(models, repeats).items()}


def peak_memory(model: nn.Module, pixel_values: Tensor) -> int:
    """Bytes that must be free for a forward: weights, buffers, pixels, and the most that it allocates at once. [ours]

    What torch's allocator hands out, on a GPU and on a CPU. Not seen: Python and torch themselves, and the work space
    that libraries such as cuDNN and oneDNN take past the allocator. A first forward is not measured.

    Args:
        model: the model.
        pixel_values: (B, C, h, w) on its device.

    Cost: two forwards; on a CPU under torch's profiler.
    """
    held = sum(t.nbytes for t in chain(model.parameters(), model.buffers(), [pixel_values]))
    allocated = _allocated_on_gpu if pixel_values.is_cuda else _allocated_on_cpu
    with measuring([model]):
        model(pixel_values=pixel_values)
        return held + allocated(model, pixel_values)


def file_size(model: nn.Module) -> int:
    """Bytes of the model's weights and persistent buffers as a safetensors file, which is written and removed."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_model(model, str(path))
        return path.stat().st_size


def _allocated_on_gpu(model: nn.Module, pixel_values: Tensor) -> int:
    device = pixel_values.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    model(pixel_values=pixel_values)
    return torch.cuda.max_memory_allocated(device) - before


def _allocated_on_cpu(model: nn.Module, pixel_values: Tensor) -> int:
    # The CPU's allocator keeps no record, but tells the profiler of each block that it gives and takes back.
    with _silent_profiler(), profile(profile_memory=True) as run:
        output = model(pixel_values=pixel_values)
    del output
    blocks = [event for event in run.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(blocks, key=lambda event: event.start_ns())]
    return int(np.cumsum(changes).max(initial=0))


@contextmanager
def _silent_profiler() -> Iterator[None]:
    """Inside: what torch's C++ profiler writes to the terminal at its start and stop goes nowhere."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def device_name(device: torch.device) -> str:
    """A device for reports: a GPU's name, or the CPU's kind and torch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"
