"""What a pass over a model may change and has to put back, to be compared before and after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from hf_kdtl.models.blocks import find_blocks
from hf_kdtl.models.forward import attention_hooks

_HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


def state_of(*models: nn.Module) -> dict[str, Any]:
    """Hooks, modes, classes, attributes, gradients, what is trainable, buffers and settings of models, and torch's."""
    found: dict[str, Any] = {
        "recorders": len(attention_hooks._active),
        "functions": len(_get_current_function_mode_stack()),
        "grad": torch.is_grad_enabled(),
        "random": torch.get_rng_state().tolist(),
        "kernels": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()),
    }
    for number, model in enumerate(models):
        for name, module in model.named_modules():
            own = {attribute: list(getattr(module, attribute)) for attribute in _HOOKS}
            own |= {"class": type(module), "training": module.training, "attributes": sorted(vars(module))}
            if (config := getattr(module, "config", None)) is not None:
                own["config"] = config.to_dict(), getattr(config, "_attn_implementation", None)
            found[f"{number}/{name}"] = own
        for name, parameter in model.named_parameters():
            grad = None if parameter.grad is None else parameter.grad.tolist()
            found[f"{number}/{name}/parameter"] = parameter.requires_grad, grad, parameter._version
        found |= {f"{number}/{name}/buffer": buffer.tolist() for name, buffer in model.named_buffers()}
    return found


def mixed(model: nn.Module) -> nn.Module:
    """In train mode but for its first block, whose first tensor is frozen: what one switch for all would not keep."""
    block = find_blocks(model.train())[0][1].eval()
    next(block.parameters()).requires_grad_(False)
    return model


class Broken(RuntimeError):
    """What a model raises whose last block is broken."""


def broken(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the last block of a model fail."""

    def forward(*args: Any, **kwargs: Any) -> None:
        raise Broken("a block failed")

    monkeypatch.setattr(find_blocks(model)[-1][1], "forward", forward)
