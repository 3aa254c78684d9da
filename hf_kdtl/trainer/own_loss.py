"""A user's `compute_loss_func`, which gives the value of the objective `task`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hf_kdtl.models.forward.capture import Capture
from hf_kdtl.trainer.batch import Counts, full_outputs


class OwnLoss:
    """`function(outputs, labels, num_items_in_batch=)`, called as Trainer calls it; None where there is none.

    Its contract is that of Trainer: the value is already divided by the labelled images of the window. A batch without
    labels has no such number: labels and num_items_in_batch are then None, and the value is a mean over its images.
    Rows that are unlabelled in a batch with labels reach it with the label -100, as from Trainer.
    """

    def __init__(self, function: Callable[..., Tensor] | None):
        self.function = function

    def gives(self, key: str) -> bool:
        """Whether it is the value of an objective."""
        return key == "task" and self.function is not None

    def counted(self, inputs: dict[str, Any]) -> str:
        """Which of the counts of a window its sum is divided by."""
        return "images" if inputs.get("labels") is None else "labelled"

    def __call__(self, student: Capture, inputs: dict[str, Any], counts: Counts) -> Tensor:
        """The value for a micro-batch of a window with these counts. Their number is a float, as Trainer gives it."""
        assert self.function is not None
        labels = inputs.get("labels")
        items = None if labels is None else counts["labelled"].clamp(min=1) / 1
        return self.function(full_outputs(student), labels, num_items_in_batch=items)

    def total(self, student: Capture, inputs: dict[str, Any], counts: Counts, here: Counts) -> Tensor:
        """The value as a sum over the micro-batch's images."""
        number = here["images"] if self.counted(inputs) == "images" else counts["labelled"].clamp(min=1)
        return self(student, inputs, counts) * number
