"""Students without a classifier: what is refused, what is frozen, and what keeps processes in step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_kdtl.models.blocks import find_blocks
from hf_kdtl.models.forward.capture import Needs, capture
from hf_kdtl.models.forward.embedding import SENTENCES, is_headless
from hf_kdtl.models.forward.modes import evaluating
from hf_kdtl.models.pairing import PairingPlan
from hf_kdtl.objectives.base import Objective


def check_class_outputs(objective: Objective, student: nn.Module, needs: Needs) -> None:
    """Raises ValueError for an objective that reads class outputs of a student that has none."""
    if is_headless(student) and (needs.logits or objective.compares_classes or objective.needs_labels):
        raise ValueError(
            f"it reads class outputs, and the student, {type(student).__name__}, has no classifier. Use objectives on "
            "features (feature_kd, similarity, hidden_states, attention_map, relation), or give it a head: "
            "AutoModelForImageClassification.from_pretrained."
        )


def freeze_unread(student: nn.Module, pixel_values: Tensor) -> list[str]:
    """Freeze what of a headless student leads to nothing that an objective could read; name it.

    That is a pooler that the heads of its family do not read, and a mask token. Blocks are left alone.
    """
    if not is_headless(student):
        return []
    inside = {id(p) for _, block in find_blocks(student) for p in block.parameters()}
    outside = {n: p for n, p in student.named_parameters() if p.requires_grad and id(p) not in inside}
    with evaluating(student), torch.enable_grad():
        found = capture(student, pixel_values.to(next(student.parameters()).dtype), Needs(pooled=True))
        read = [found.pooled, *_tensors(found.outputs, "last_hidden_state")]
        total = torch.stack([x.float().sum() for x in read if x is not None and x.requires_grad]).sum()
        reached = torch.autograd.grad(total, list(outside.values()), allow_unused=True)
    unread = [name for (name, _), g in zip(outside.items(), reached, strict=True) if g is None]
    for name in unread:
        outside[name].requires_grad_(False)
    return unread


def embedding_notes(source: str, plan: PairingPlan | None, student: Needs, needs: Needs) -> list[str]:
    """Which embedding of each model is compared."""
    sides = [("student", plan.student, student), (source, plan.teacher, needs)] if plan is not None else []
    return [
        f"the embedding of the {who} is {SENTENCES[model.pooling]} ({model.pooled} wide)."
        for who, model, wanted in sides
        if wanted.pooled and model.pooling
    ]


class ZeroTouch:
    """Gives a gradient of 0 to every trainable parameter that no term reaches, by the graph of the first step.

    DDP waits for every parameter of a container; FSDP2 does not, and nothing is touched there. Nor where blocks are
    recomputed by reentrant checkpointing, which hides what lies inside.
    """

    def __init__(self) -> None:
        self.unreached: list[nn.Parameter] | None = None

    def __call__(self, loss: Tensor, model: nn.Module) -> Tensor:
        """The same loss, with all parameters in its graph."""
        if self.unreached is None and loss.requires_grad:
            self.unreached = [] if isinstance(model, FSDPModule) else _unreached(loss, model)
        for parameter in (self.unreached or ()) if loss.requires_grad else ():
            loss = loss + 0.0 * parameter.sum().to(loss)
        return loss


def _unreached(loss: Tensor, model: nn.Module) -> list[nn.Parameter]:
    reached: set[int] = set()
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "CheckpointFunctionBackward":
            return []
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return [p for p in model.parameters() if p.requires_grad and id(p) not in reached]


def _tensors(outputs: Any, name: str) -> list[Tensor]:
    found = getattr(outputs, name, None)
    return [found] if isinstance(found, Tensor) else []
