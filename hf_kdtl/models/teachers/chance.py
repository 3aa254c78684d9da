"""A teacher that answers at random is noticed on the first batches, not after a training run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers.utils import logging

from hf_kdtl.functional.divergences import labelled
from hf_kdtl.models.forward.capture import Capture
from hf_kdtl.models.teachers.source import called

logger = logging.get_logger(__name__)


class ChanceCheck:
    """Compares a teacher's predictions with the labels of the first images, once, and warns.

    Predictions that do not depend on the labels are right in e = sum_k p_k l_k of n images, with p_k and l_k the
    numbers of predictions and labels of class k, divided by n; its standard deviation is about sqrt(e (1 - e / n)). A
    teacher within two of them is at chance: a new head, classes in another order, or pixels of another kind.

    Args:
        images: labelled images to wait for.
        who: what the teacher is called.
    """

    def __init__(self, images: int = 128, who: str = "the teacher"):
        self.who, self.images, self._seen, self._parts = who, images, 0, list[tuple[Tensor, Tensor]]()

    def add(self, teacher: Capture | None, labels: Tensor | None) -> None:
        """Take in a batch: the teacher's logits (B, K), in the student's order, and labels (B,) or (B, K).

        Labels of other kinds are left to those who read them.
        """
        if teacher is None or teacher.logits is None or labels is None or self._seen >= self.images:
            return
        logits = teacher.logits
        if labels.shape != logits.shape and (labels.ndim != 1 or labels.is_floating_point()):
            return
        classes = labels if labels.ndim == 1 else labels.argmax(-1)
        kept = labelled(labels) & (classes >= 0) & (classes < logits.shape[-1])
        self._parts.append((logits.detach().argmax(-1)[kept], classes[kept]))
        self._seen += int(kept.sum())
        if self._seen >= self.images:
            self._report(logits.shape[-1])
            self._parts = []

    def _report(self, count: int) -> None:
        predicted, true = (torch.cat(column) for column in zip(*self._parts, strict=True))
        right, n = (predicted == true).sum().item(), len(true)
        shares = [torch.bincount(column, minlength=count).double() for column in (predicted, true)]
        expected = (shares[0] * shares[1]).sum().item() / n
        if n > expected and right <= expected + 2 * (expected * (1 - expected / n)) ** 0.5:
            logger.warning(
                f"{self.who} is right on {right} of the first {n} labelled images, and guessing would be on "
                f"{expected:.0f}: it answers at chance. Check that its head is trained for these classes (hf-kdtl "
                "evaluate --models <teacher>), that class names are in the order of its outputs, and that "
                "processing_class is its own image processor."
            )


class ChanceChecks:
    """A `ChanceCheck` for each of these teachers."""

    def __init__(self, names: Iterable[str] = ()):
        self.checks = {name: ChanceCheck(who=called(name)) for name in names}

    @torch.compiler.disable
    def add(self, captures: Mapping[str, Capture], labels: Tensor | None) -> None:
        """Take in a batch: what each source gave for it, and its labels."""
        for name, check in self.checks.items():
            check.add(captures.get(name), labels)
