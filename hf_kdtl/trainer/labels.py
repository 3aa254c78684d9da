"""The labels of a batch, where objectives read them: present, and class indices or distributions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_kdtl.functional.divergences import check_labels
from hf_kdtl.functional.multi_label import check_multi_labels
from hf_kdtl.objectives.base import Objective


class LabelCheck:
    """Refuses a batch whose labels the objectives cannot read.

    Args:
        objectives: by key; those that need no labels do not count.
        own_loss: whether a user's `compute_loss_func` reads them in their place; their values are then its business.
        multi_label: whether an image has several labels.
    """

    def __init__(self, objectives: Mapping[str, Objective], own_loss: bool, multi_label: bool = False):
        own = ("task",) if own_loss else ()
        self.needing = [key for key, objective in objectives.items() if objective.needs_labels and key not in own]
        self.own_loss, self._checked = own_loss, False
        self._check = check_multi_labels if multi_label else check_labels

    @torch.compiler.disable
    def present(self, inputs: dict[str, Any]) -> None:
        """Raises ValueError when the batch has no labels and an objective needs them."""
        if self.needing and inputs.get("labels") is None:
            raise ValueError(
                f"objective {self.needing[0]!r} needs labels and the batch has only {sorted(inputs)}. Give the "
                "dataset a column 'labels' (-100 marks an unlabelled image), or remove the objective."
            )

    @torch.compiler.disable
    def __call__(self, labels: Tensor | None, classes: int) -> None:
        """Raises ValueError for labels that are neither indices of `classes` nor distributions over them.

        On an accelerator, where it would wait for the device, only those of the first batch are looked at.
        """
        if labels is not None and not self.own_loss and (labels.device.type == "cpu" or not self._checked):
            self._check(labels, classes)
            self._checked = True
