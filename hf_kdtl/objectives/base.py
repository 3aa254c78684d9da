"""What an objective is: one term of the loss, computed from what the student and the teacher gave for a batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor, nn

from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.pairing import PairingPlan
from hf_kdtl.models.run_context import RunContext
from hf_kdtl.models.teachers.source import Batch
from hf_kdtl.utils import options

Sample = Iterable[tuple[Capture, Tensor | None]]
"""Batches of training images as a source captured them, with their labels. Iterating again captures them again."""


class Objective(nn.Module):
    """One term of the training loss. Subclass it, and add a line to `OBJECTIVES`; nothing else changes.

    The constructor takes keyword-only options, checks their values, and never takes **kwargs (a misspelt key must
    fail). An objective never owns or calls a model: it says in `needs` what must be captured, and gets it in
    `forward`. Trainable parameters it creates (in `build`, where widths are known) are optimised, saved, resumed and
    synchronised with the student's, and never enter the student's checkpoint.
    """

    reduction: Literal["image", "batch"] = "image"
    """"image": forward returns (B,) or (B, pairs). "batch": a scalar of the micro-batch (it depends on the split)."""
    of_weights: bool = False
    """True when the value is of the student's weights alone: then a scalar does not depend on the split."""
    counts: Literal["images", "labelled"] = "images"
    """What the sum over images is divided by: all images, or those with a label."""
    divergence: bool = True
    """True when the value is 0 wherever student and teacher agree. The law tests read it."""
    source: str = "teacher"
    """The name of the source that the student is compared with, whose Capture `forward` gets as `teacher`: "teacher",
    one of several by its name, or "start": the student at the start (its first weights, or the config's `start`)."""
    needs_teacher: bool = True
    compares_classes: bool = False
    """True when class outputs of both models are compared: then the labels must match by name."""
    needs_labels: bool = False
    takes_soft_labels: bool = True
    """False when class indices are needed: then mixup and CutMix are not supported."""
    needs_plan: bool = False
    """True when layers are paired, or widths needed: then `build` and `needs` get the PairingPlan of student and
    source."""
    multi_label: bool = False
    """Whether the student has several labels an image: set before `prepare`, from the student's config."""
    sample: int = 0
    """How many training images `observe` reads; 0: none."""
    needs_index: bool = False
    """True when the rows of the training data are wanted in `batch` and in the sample, where the data has an index."""
    role: Literal["task", "transfer"] = "transfer"
    """What a gradient rule protects ("task") and from what ("transfer"). A config may override it."""
    citation: str = ""
    """BibTeX of the paper, for the model card."""

    def prepare(self, context: RunContext) -> list[str]:
        """Choose what fits how the models are run, before `build`; says what was chosen and why, for preflight.

        Raises:
            ValueError: when the options would give wrong numbers in this setting.
        """
        return []

    def multi_label_problem(self) -> str:
        """Why it does not work for several labels an image, with what to type; empty where it does."""
        return ""

    def build(self, plan: PairingPlan | None) -> None:
        """Create parameters whose widths the plan knows. `plan` is None without a teacher, or if not `needs_plan`.

        Raises:
            ValueError: when these models do not give what is needed.
        """

    def needs(self, plan: PairingPlan | None) -> tuple[Needs, Needs]:
        """What must be captured of (student, teacher)."""
        return Needs(), Needs()

    def sample_needs(self, plan: PairingPlan | None) -> Needs:
        """What `observe` reads of the source; `input_gradient` for captures with a graph."""
        return self.needs(plan)[1]

    def sample_size(self, images: int) -> int:
        """How many of that many training images `observe` reads.

        Raises:
            ValueError: where there are too few.
        """
        return min(self.sample, images)

    def observe(self, batches: Sample) -> None:
        """Read `sample` training images once, before training; what is learned is kept in a buffer.

        Args:
            batches: captured in eval mode with `sample_needs`; not larger than a batch in training.

        Raises:
            ValueError: when nothing can be learned from them.
        """

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        """(B,) per image, (B, pairs) where layers are paired, or a scalar if `reduction` is "batch"."""
        raise NotImplementedError


def check_option(objective: str, option: str, value: Any, valid: bool, expected: str) -> None:
    """`hf_kdtl.utils.options.check_option` of an objective, by name."""
    options.check_option(f"objective {objective!r}", option, value, valid, expected)


SOFTMAX_ONLY = "it is of one class an image (a soft-max). Use logit_kd, or an objective on features or attention."
"""Why some objectives are refused for several labels an image."""
HEADS = ("class", "distillation")


def check_head(objective: str, head: str | None) -> None:
    """Raises ValueError unless `head` is None, "class" or "distillation"."""
    check_option(objective, "head", head, head is None or head in HEADS, "'class', 'distillation', or nothing")


def head_logits(student: Capture, head: str | None) -> Tensor:
    """The student's logits (B, K): its answer, or that of one head of a model with a distillation token.

    Raises:
        ValueError: when the model has no such head.
    """
    if head is None:
        return student.logits
    found = getattr(student.outputs, "cls_logits" if head == "class" else "distillation_logits", None)
    if found is None:
        raise ValueError(
            f"the student has no {head} head of its own (DeiTForImageClassificationWithTeacher has); leave head out."
        )
    return found
