"""The task itself: cross-entropy with the labels."""

from torch import Tensor

from hf_kdtl.functional.divergences import cross_entropy
from hf_kdtl.functional.multi_label import binary_cross_entropy
from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.objectives.base import Batch, Objective, check_head, check_option, head_logits
from hf_kdtl.utils.options import is_number


class Task(Objective):
    """Cross-entropy with the labels, per image: -sum_k t_k log softmax(z_S)_k, in nats, >= 0.

    Labels are class indices (B,), with -100 for an unlabelled image (it counts 0, and is not counted), or
    distributions (B, K) as mixup and CutMix make them. Averaged over the labelled images of the effective batch:
    exactly what Trainer computes for hard labels. Trainer itself takes float labels for a multi-label problem (binary
    cross-entropy); here they are distributions over the classes.

    A student with several labels an image (its config's problem_type is multi_label_classification) has labels (B, K)
    of 0, 1 and -100, and the mean over the known classes of the binary cross-entropy; -100 masks a class, a row of
    -100 is an unlabelled image.

    Keep it with any distillation term; `logit_kd` alone learns the teacher's mistakes too.

    Args:
        label_smoothing: e in [0, 1); the target becomes (1 - e) t + e / K. By default `label_smoothing_factor` of
            the training arguments.
        head: of a student with a distillation token, learn from the labels at the "class" or "distillation" head
            alone; by default its answer, the mean of both.

    Cost: nothing beyond the student's forward and backward.

    Raises:
        ValueError: when label_smoothing is outside [0, 1), or the student has no such head.
    """

    counts = "labelled"
    divergence = False
    needs_teacher = False
    needs_labels = True
    role = "task"

    def __init__(self, *, label_smoothing: float | None = None, head: str | None = None):
        super().__init__()
        smoothing = 0.0 if label_smoothing is None else label_smoothing
        check_option(
            "task", "label_smoothing", smoothing, is_number(smoothing) and 0 <= smoothing < 1, "a number in [0, 1)"
        )
        check_head("task", head)
        self.label_smoothing, self.head = label_smoothing, head

    def multi_label_problem(self) -> str:
        smoothed = "label_smoothing is of one class an image; leave it out (label_smoothing_factor too)."
        return smoothed if self.label_smoothing else ""

    def needs(self, plan) -> tuple[Needs, Needs]:
        return Needs(logits=True), Needs()

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        if self.multi_label:
            return binary_cross_entropy(head_logits(student, self.head), batch["labels"])
        return cross_entropy(head_logits(student, self.head), batch["labels"], self.label_smoothing or 0.0)
