"""What of a Capture is stored, under which name, and how it is put back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_kdtl.models.forward.capture import Capture
from hf_kdtl.models.forward.needs import Needs
from hf_kdtl.models.forward.perturbations import Sketch
from hf_kdtl.models.teachers.store.manifest import Kind, Manifest

WHOLE = ("logits", "pooled", "patches")
"""Fields of Needs and Capture with one tensor."""
LAYERED = ("hidden_states", "attention_rows", "sketches")
"""Those with one tensor for each block, or each sketch, that is asked for."""
TOP, TOP_INDEX = "logits.top", "logits.top_index"


class Signal(NamedTuple):
    """One tensor of a Capture: its field, and which of it."""

    field: str
    key: Any = None

    @property
    def name(self) -> str:
        """Of its kind, and of the folder of its shards."""
        return self.field if self.key is None else f"{self.field}-{self.key}"

    def of(self, captured: Capture) -> Tensor:
        """Its tensor."""
        found = getattr(captured, self.field)
        return found if self.key is None else found[self.key]


def signals(needs: Needs) -> list[Signal]:
    """The tensors that serve these needs."""
    found = [Signal(name) for name in WHOLE if getattr(needs, name)]
    return found + [Signal(name, key) for name in LAYERED for key in sorted(getattr(needs, name))]


def unstorable(needs: Needs) -> str:
    """Why these needs can never be served from a store; empty where they can."""
    if needs.weights:
        return "the student's weights at the start are needed, which only the start has"
    if needs.directions:
        return (
            "the teacher runs at pixels that are shifted by draws of the step (noise, finite differences), which no "
            "two epochs share"
        )
    if needs.input_gradient:
        instead = 'add "sketch": 64 to the entry of jacobian' if needs.order < 3 else "take jacobian with a sketch"
        return (
            "the teacher's derivative by the pixels has as many numbers as an image has, or is of draws of the step; "
            f"{instead}, or train with the live teacher"
        )
    if needs.attention:
        return (
            "queries, keys and values of every token are needed; take attention_map with rows cls and heads mean, "
            "whose row of the class token is stored, or train with the live teacher"
        )
    if needs.block_calls:
        return "the teacher's blocks are called again with other weights, which needs the live teacher"
    return ""


def missing(needs: Needs, manifest: Manifest) -> list[str]:
    """The names of what these needs ask for and the store does not have."""
    return [one.name for one in signals(needs) if not set(kind_names(one, manifest.top_k)) <= manifest.kinds.keys()]


def kind_names(signal: Signal, top_k: int | None) -> list[str]:
    """The kinds that hold a signal: one, or of class outputs with `top_k` two."""
    return [TOP, TOP_INDEX] if signal.field == "logits" and top_k is not None else [signal.name]


def pack(captured: Capture, needs: Needs, precision: str, top_k: int | None) -> dict[str, np.ndarray]:
    """{kind: (B, ...)} of what these needs ask for.

    Raises:
        ValueError: for values that float16 cannot hold, or that are not finite.
    """
    found = {}
    for one in signals(needs):
        value = one.of(captured).detach().float()
        if one.field == "logits" and top_k is not None:
            for name, part in zip((TOP, TOP_INDEX), top(value, top_k), strict=True):
                found[name] = part
        else:
            found[one.name] = value
    return {name: _as_array(value, name, precision) for name, value in found.items()}


def _as_array(value: Tensor, name: str, precision: str) -> np.ndarray:
    if not value.is_floating_point():
        return value.int().cpu().numpy()
    if not value.isfinite().all():
        raise ValueError(f"the teacher's {name} are not finite (nan or inf); check its weights and the images.")
    array = value.cpu().numpy()
    if precision == "float16" and np.abs(array).max(initial=0) > np.finfo(np.float16).max:
        raise ValueError(
            f"the teacher's {name} reach {np.abs(array).max():.3g}, more than float16 holds (65504); type --precision "
            "float32."
        )
    return array.astype(precision)


def kinds_of(arrays: dict[str, np.ndarray]) -> dict[str, Kind]:
    """What to write in the manifest for such arrays."""
    return {name: Kind(tuple(array.shape[1:]), str(array.dtype)) for name, array in arrays.items()}


def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(B, k + 1): the k largest, and the log-sum-exp of the rest; (B, k): their indices.

    Raises:
        ValueError: where k leaves no rest.
    """
    if k >= logits.shape[-1]:
        raise ValueError(
            f"top_k is {k} and the teacher has {logits.shape[-1]} classes; leave it out to store them all."
        )
    values, index = logits.topk(k, dim=-1)
    rest = logits.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([values, rest], -1), index


def spread(values: Tensor, index: Tensor, classes: int) -> Tensor:
    """(B, K) from `top`: the rest's probability spread evenly over the classes that are not named.

    >>> spread(torch.tensor([[2.0, 1.0]]), torch.tensor([[1]]), 3)  # e^1 over two classes: 1 - ln 2 each
    tensor([[0.3069, 2.0000, 0.3069]])
    """
    k = index.shape[-1]
    rest = values[:, k:] - float(np.log(classes - k))
    return rest.expand(-1, classes).scatter(-1, index.long(), values[:, :k])


def unpack(arrays: dict[str, np.ndarray], needs: Needs, classes: int, like: Tensor) -> Capture:
    """The Capture of what was read, on the device of `like`, floats in float32."""
    read = {name: torch.from_numpy(array) for name, array in arrays.items()}
    values = {n: v.to(like.device).float() if v.is_floating_point() else v.to(like.device) for n, v in read.items()}
    captured = Capture()
    for one in signals(needs):
        whole = values.get(one.name)
        value = spread(values[TOP], values[TOP_INDEX], classes) if whole is None else whole
        if one.key is None:
            setattr(captured, one.field, value)
        else:
            getattr(captured, one.field)[one.key] = value
    return captured


def storable(needs: Needs) -> Needs:
    """What the writer captures for these needs: an ordinary forward, and sketches."""
    return replace(needs.plain(), sketches=needs.sketches)


def names(needs: Needs, top_k: int | None) -> Iterator[str]:
    """The kinds that serve these needs."""
    for one in signals(needs):
        yield from kind_names(one, top_k)


def needs_of(kinds: Iterable[str]) -> Needs:
    """The needs that kinds of these names serve."""
    found: dict[str, Any] = {}
    for kind in kinds:
        name, _, key = kind.partition("-")
        if name in LAYERED:
            found.setdefault(name, set()).add(Sketch.named(key) if name == "sketches" else int(key))
        else:
            found[kind.partition(".")[0]] = True
    options: dict[str, Any] = {name: frozenset(v) if isinstance(v, set) else v for name, v in found.items()}
    return Needs(**options)
