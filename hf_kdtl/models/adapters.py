"""A model with adapters (PEFT), and what it is without them: the same weights serve as student and as teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from hf_kdtl.models.passes import evaluating


def adapted(model: Any) -> bool:
    """Whether it is a model of PEFT, whose adapters can be turned off for a while."""
    return hasattr(model, "disable_adapter")


_off: WeakSet[nn.Module] = WeakSet()


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The model as it was before it was adapted, in eval mode. Modes and what is trainable are put back.

    No backward pass may run inside: PEFT makes the adapters untrainable there.
    """
    if model in _off:  # already: under torch.func PEFT's switches cannot be moved
        yield
        return
    # PEFT turns every adapter trainable again, also those that were frozen.
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    _off.add(model)
    try:
        with evaluating(model), model.disable_adapter():
            yield
    finally:
        _off.discard(model)
        for parameter, before in trainable:
            parameter.requires_grad_(before)


def plain_state(model: Any) -> dict[str, Tensor]:
    """The state_dict of the model without its adapters, under the names that it had before it was adapted."""
    base = model.get_base_model()
    # PEFT wraps a layer, and keeps it by one of these names.
    kept = {name: word for name, module in base.named_modules() for word in ("base_layer", "original_module")
            if isinstance(getattr(module, word, None), nn.Module)}  # fmt: skip
    state = {}
    for name, value in base.state_dict().items():
        for wrapped, word in kept.items():
            if not name.startswith(f"{wrapped}."):
                continue
            rest = name.removeprefix(f"{wrapped}.")
            if not rest.startswith(f"{word}."):
                break  # of the adapter
            name = f"{wrapped}.{rest.removeprefix(f'{word}.')}"
        else:
            state[name] = value
    return state
