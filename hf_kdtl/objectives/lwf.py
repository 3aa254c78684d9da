"""Learning without forgetting: a second head that keeps answering as the source model does."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from hf_kdtl.functional.divergences import kl, log_probabilities
from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.pairing import PairingPlan
from hf_kdtl.objectives.base import SOFTMAX_ONLY, Batch, Objective, check_option
from hf_kdtl.utils.options import is_number


class LwF(Objective):
    """A second head that answers as the source, per image: tau^2 KL(softmax(z / tau) || softmax(head(f) / tau)), nats.

    z are the source's logits (B, K_src) for the same image, f (B, D_S) the student's feature that its own classifier
    reads. So the source's classes may be others than the student's: what the student could do is kept while it
    learns the new classes, and the new images need no old labels (Li & Hoiem 2017, arXiv 1606.09282 [paper]). The head
    belongs to this objective: it is trained, saved and resumed with it, and is not in the student's checkpoint. It
    starts as the source's own head where the widths agree, and at random otherwise.

    Prefer `logit_kd` where source and student have the same classes.

    Args:
        source: "teacher", or "start": the student at the start, or the model of the config's `start`. It must have
            learned something to keep: a start with a new random head has only noise to say.
        temperature: tau > 0.
        freeze_head: keep the source's head as it is, so that the features alone must keep its answers. [ours]

    Cost: one forward of the source; O(B D_S K_src).

    Raises:
        ValueError: for a wrong option; and when the models are known, for one without a single linear classifier, or
            freeze_head where the widths differ (a random head would be frozen).
    """

    needs_plan = True
    citation = """@article{li2017learning,
  title = {Learning without Forgetting},
  author = {Zhizhong Li and Derek Hoiem},
  journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
  year = {2017}, eprint = {1606.09282}, archivePrefix = {arXiv}
}"""
    head: nn.Linear

    def __init__(
        self,
        *,
        source: Literal["teacher", "start"] = "teacher",
        temperature: float = 4.0,
        freeze_head: bool = False,
    ):
        super().__init__()
        check_option("lwf", "source", source, source in ("teacher", "start"), "'teacher' or 'start'")
        positive = is_number(temperature) and temperature > 0
        check_option("lwf", "temperature", temperature, positive, "a number greater than 0")
        check_option("lwf", "freeze_head", freeze_head, isinstance(freeze_head, bool), "true or false")
        self.source = source
        self.needs_teacher = source == "teacher"
        self.temperature, self.freeze_head = temperature, freeze_head

    def build(self, plan: PairingPlan | None) -> None:
        if plan is None:
            raise ValueError(f"it keeps the answers of the {self.source}, and there is none.")
        width, own = plan.student.pooled, plan.teacher.classifier
        if own is None or not width:
            name = plan.teacher.name if own is None else plan.student.name
            raise ValueError(
                f"{name} has no single linear classifier with one output a class, which a second head is made after. "
                "Use logit_kd where the classes are the same, or hidden_states."
            )
        self.head = nn.Linear(width, own.out_features, bias=own.bias is not None)
        if width == own.in_features:
            with torch.no_grad():
                for mine, its in zip(self.head.parameters(), own.parameters(), strict=True):
                    mine.copy_(its)
        elif self.freeze_head:
            raise ValueError(
                f"freeze_head is true, and the student's feature has {width} channels where the {self.source}'s head "
                f"reads {own.in_features}: it cannot be copied, and a random one would be frozen. Set freeze_head to "
                "false."
            )
        self.head.requires_grad_(not self.freeze_head)

    def needs(self, plan: PairingPlan | None) -> tuple[Needs, Needs]:
        return Needs(pooled=True), Needs(logits=True)

    def multi_label_problem(self) -> str:
        return SOFTMAX_ONLY

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        assert student.pooled is not None
        log_t = log_probabilities(teacher.logits.detach(), self.temperature)
        log_s = log_probabilities(self.head(student.pooled), self.temperature)
        return self.temperature**2 * kl(log_t, log_s)
