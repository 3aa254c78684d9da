"""How fast each model is, in the forms in which it may be served: eager, compiled, bfloat16, ONNX, int8."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from hf_kdtl.evaluation.cost import latency
from hf_kdtl.export import OnnxModel, check_installed, export_onnx, quantize_onnx
from hf_kdtl.utils.text import one_line

FORMS = ("eager", "compiled", "bf16", "onnx", "int8")
DEFAULT = ("eager", "bf16", "onnx")  # compiling takes half a minute a model, int8 is not always wanted
SECONDS = 4.0  # of timing, for each batch size
LEAST, MOST = 5, 30  # timings of each


def speeds(
    models: dict[str, tuple[nn.Module, Tensor]],
    forms: Sequence[str],
    ready: Mapping[tuple[str, str], nn.Module] | None = None,
) -> dict[str, Any]:
    """Milliseconds of a batch of 1 and of N, for each model in each form; all forms of all models take turns.

    Args:
        models: {name: (model, its pixel_values (N, C, h, w) on its device)}.
        forms: some of FORMS; int8 is calibrated on these pixels, which does not change its speed.
        ready: {(name, form): the model in this form}, where it has been made.

    Returns:
        {"batch_size": N, "latency_ms": {name: {form: {"1": median, "N": median}}}, "reasons": {"name, form": why not}}
    """
    reasons: dict[str, str] = {}
    with TemporaryDirectory() as folder:
        made: dict[tuple[str, str], tuple[nn.Module, Tensor]] = {}
        for name, (model, pixels) in models.items():
            for form in forms:
                try:
                    if (name, form) in (ready or {}):
                        made[name, form] = (ready or {})[name, form], pixels
                        continue
                    made[name, form] = _form(form, model, pixels, Path(folder, f"{len(made)}.onnx"))
                except Exception as error:  # no form that fails, by whatever error, may end an evaluation
                    first = one_line(str(error).strip().split("\n")[0])[:160]
                    reasons[f"{name}, {form}"] = first or type(error).__name__
        found: dict[str, Any] = {name: {form: {} for form in forms if (name, form) in made} for name in models}
        size = max(len(pixels) for _, pixels in models.values())
        for number in dict.fromkeys((1, size)):
            batches = {" ".join(key): (model, pixels[:number]) for key, (model, pixels) in made.items()}
            taken = latency(batches, _repeats(batches))
            for name, form in made:
                found[name][form][str(number)] = taken[f"{name} {form}"]["median"]
    return {"batch_size": size, "latency_ms": found, "reasons": reasons}


def _form(form: str, model: nn.Module, pixels: Tensor, path: Path) -> tuple[nn.Module, Tensor]:
    """The model in a form, after one forward of it."""
    made: Any = model.eval()
    if form == "compiled":
        made = torch.compile(model)
    elif form == "bf16":
        made, pixels = copy.deepcopy(model).to(torch.bfloat16), pixels.to(torch.bfloat16)
    elif form in ("onnx", "int8"):
        check_installed()
        if pixels.device.type != "cpu":
            raise ValueError("measured on the CPU only")
        export_onnx(model, pixels[:1], path)
        if form == "int8":
            quantize_onnx(path, pixels, path.with_suffix(".int8"))
            path = path.with_suffix(".int8")
        made = OnnxModel(path)
    with torch.no_grad():
        made(pixel_values=pixels[:1])
        made(pixel_values=pixels)
    return made, pixels


def _repeats(batches: dict[str, tuple[nn.Module, Tensor]]) -> int:
    begun = time.perf_counter()
    with torch.no_grad():
        for model, pixels in batches.values():
            model(pixel_values=pixels)
    turn = time.perf_counter() - begun
    return int(min(MOST, max(LEAST, SECONDS / max(turn, 1e-6))))
