"""An optimizer's class, with a multiplier of the learning rate for each param group."""

from __future__ import annotations

from typing import Any

import torch


class _Layerwise:
    """Before an optimizer's class in the order of inheritance: its step, at the rates of the groups."""

    _base: type[torch.optim.Optimizer]
    param_groups: list[dict[str, Any]]

    def step(self, closure=None):
        held = [group["lr"] for group in self.param_groups]
        try:
            for group, lr in zip(self.param_groups, held, strict=True):
                group["lr"] = lr * group.get("lr_multiplier", 1.0)  # a new tensor, where lr is one
            return _unhooked(self._base.step)(self, closure)
        finally:
            for group, lr in zip(self.param_groups, held, strict=True):
                group["lr"] = lr

    def __reduce__(self):
        # A class made at run time is found again by its base.
        return _empty, (self._base,), self.__getstate__()


_made: dict[type[torch.optim.Optimizer], type[torch.optim.Optimizer]] = {}


def layerwise(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The subclass of an optimizer's class whose `step` uses `lr * lr_multiplier` of each param group.

    `group["lr"]` is put back after the step, also when it raises: for schedulers, logs and state_dict the rate is the
    schedule's. A group without an `lr_multiplier` has 1.
    """
    if kind not in _made:
        _made[kind] = type(f"Layerwise{kind.__name__}", (_Layerwise, kind), {"_base": kind, "__doc__": kind.__doc__})
    return _made[kind]


def is_layerwise(optimizer: Any) -> bool:
    """Whether an optimizer (also one that Accelerate wrapped) applies the multipliers of its param groups."""
    return isinstance(getattr(optimizer, "optimizer", optimizer), _Layerwise)


def check_layerwise(optimizer: Any) -> None:
    """Raises ValueError unless the optimizer applies multipliers and has the student's groups of `layer_groups`; what
    a user adds besides, without a layer, has a multiplier of 1."""
    if is_layerwise(optimizer) and any(g.get("layer", "objectives") != "objectives" for g in optimizer.param_groups):
        return
    kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
    raise ValueError(
        f"the optimizer is {kind}, whose step does not know the layers' rates, so layer_rates would do nothing. Make "
        "it with hf_kdtl.optim.create_layerwise_optimizer(student, args, objectives), or let the trainer make it: "
        "leave optimizers out and name it in optim=... (With DistillationTrainer the objectives are "
        "trainer.distiller.objectives.)"
    )


def _empty(kind: type[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    made = layerwise(kind)
    return made.__new__(made)


def _unhooked(step):
    # torch wraps `step` of every class it has made an optimizer of, to call the step hooks: ours and its base's, so
    # hooks would run twice.
    return step.__wrapped__ if getattr(step, "hooked", False) else step
