"""One forward of one model, and what objectives may read of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Needs:
    """What an objective must have captured of one model. `a | b` is what serves both.

    Args:
        logits: the class outputs.
    """

    logits: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(*(getattr(self, f.name) | getattr(other, f.name) for f in fields(self)))

    def __bool__(self) -> bool:
        return any(getattr(self, f.name) for f in fields(self))


@dataclass
class Capture:
    """What one forward gave.

    Args:
        logits: (B, K) class outputs, as the model gave them. A teacher's columns are in the student's class order.
        pixel_values: (B, C, h, w) the pixels this model saw.
        outputs: the model's own output object (the student's only).
    """

    logits: Tensor
    pixel_values: Tensor | None = None
    outputs: Any = None


def capture(model: nn.Module, pixel_values: Tensor, needs: Needs, **inputs: Any) -> Capture:
    """Run one forward and keep what is needed.

    Args:
        model: an image classifier of transformers, or anything called with `pixel_values=` that gives `.logits`.
        pixel_values: (B, C, h, w).
        needs: what must be captured; an empty `Needs` still runs the model and gives its logits.
        inputs: further keyword arguments of the model's forward.

    Raises:
        ValueError: when the model gives no logits, or cannot take pixels of this size.
    """
    try:
        outputs = model(pixel_values=pixel_values, **inputs)
    except (ValueError, RuntimeError) as error:
        raise _explained(error, model, pixel_values) from error
    logits = getattr(outputs, "logits", None)
    if logits is None:
        raise ValueError(
            f"{type(model).__name__} gave no logits; expected an image classifier. Load it with "
            "AutoModelForImageClassification.from_pretrained."
        )
    return Capture(logits=logits, pixel_values=pixel_values, outputs=outputs)


def _explained(error: Exception, model: nn.Module, pixel_values: Tensor) -> Exception:
    """Say what to type when a model refuses pixels of another size than its own; other errors pass unchanged."""
    size = getattr(getattr(model, "config", None), "image_size", None)
    if size is None:
        return error
    expected = (size, size) if isinstance(size, int) else tuple(size)
    found = tuple(pixel_values.shape[-2:])
    if found == expected:
        return error
    return ValueError(
        f"{type(model).__name__} was given pixels of {found[0]} x {found[1]} and is made for {expected[0]} x "
        f"{expected[1]} (it said: {error}). Resize them, with an image processor of size={{'height': {expected[0]}, "
        f"'width': {expected[1]}}}, or make the model with image_size={found[0]}."
    )
