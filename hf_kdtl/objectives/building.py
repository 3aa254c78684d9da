"""Objectives that pair layers, given the pair of models; and which others would work where one does not."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from hf_kdtl.models.pairing import PairingPlan
from hf_kdtl.models.run_context import RunContext
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.objectives.base import Objective


def prepare_objective(objective: Objective, context: RunContext) -> list[str]:
    """`prepare`, for a student with one label an image or several. Raises ValueError where it does not fit."""
    objective.multi_label = context.multi_label
    if context.multi_label and (problem := objective.multi_label_problem()):
        raise ValueError(f"the student has several labels an image, and {problem}")
    return objective.prepare(context)


def build_objective(objective: Objective, plan: PairingPlan | None, dtype: torch.dtype = torch.float32) -> None:
    """Give an objective its widths; where this pair of models cannot serve it, say what can. `dtype` is the student's:
    projectors are float64 for float64, and float32 else, to which they cast what a student of half precision gives
    them (as it is loaded, or for an evaluation under bf16_full_eval).

    Raises:
        ValueError: with the objectives that work for this pair.
    """
    try:
        objective.build(plan)
    except ValueError as error:
        of_start = objective.source == "start"
        alike = {n: k for n, k in OBJECTIVES.items() if pairs_layers(k) and (k.source == "start") == of_start}
        serving = [name for name, kind in alike.items() if _serves(kind, plan)]
        others = ", ".join(serving) or "none that pairs layers"
        raise ValueError(f"{error} For this pair these work: {others}.") from error
    if dtype == torch.float64:
        objective.double()
    for module in objective.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            module.register_forward_pre_hook(_in_own_dtype)


def _in_own_dtype(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (x,) = args
    own = next(module.parameters()).dtype
    return (x if torch.is_autocast_enabled(x.device.type) else x.to(own),)


def pairs_layers(kind: type[Objective]) -> bool:
    """Whether an objective has a choice of `layers`; others need a plan for its widths alone."""
    return "layers" in inspect.signature(kind).parameters


def _serves(kind: type[Objective], plan: PairingPlan | None) -> bool:
    try:
        kind().build(plan)
    except ValueError:
        return False
    return True
