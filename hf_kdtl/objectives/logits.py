"""Objectives that compare the class outputs of student and teacher."""

from typing import Literal

from torch import Tensor

from hf_kdtl.functional.divergences import cross_entropy, jensen_shannon, kl, log_probabilities, standardize
from hf_kdtl.functional.logits import decoupled
from hf_kdtl.functional.multi_label import bernoulli_log_probabilities
from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.objectives.base import SOFTMAX_ONLY, Batch, Objective, check_head, check_option, head_logits
from hf_kdtl.utils.options import is_number

DIRECTIONS = ("forward", "reverse", "jsd")


class LogitKD(Objective):
    """Logit distillation, per image: tau^2 KL(softmax(z_T / tau) || softmax(z_S / tau)), in nats, >= 0.

    tau^2 keeps the gradient's size the same at every temperature (Hinton et al. 2015, arXiv 1503.02531, section 2).
    Needs no labels, so unlabelled images of the user's own kind help. A teacher that is nearly always sure of itself
    gives little beyond its top class at a low temperature; 2 to 8 is usual.

    Of a student with several labels an image (problem_type multi_label_classification) the mean over the classes of
    the same divergence of Bernoulli(sigmoid(z / tau)); `standardize` and `hard` are of one class an image.

    Args:
        temperature: tau > 0.
        direction: "forward" as above; "reverse" KL(S || T), which prefers one mode of the teacher to covering all;
            "jsd" the Jensen-Shannon divergence weighted by `beta`, at most tau^2 ln 2.
        beta: weight of the teacher in "jsd", in (0, 1).
        standardize: bring both logits of an image to mean 0 and standard deviation 1 (population) first, so that the
            student need not match the teacher's scale (Sun et al. 2024, arXiv 2403.01427).
        hard: cross-entropy with the teacher's top class instead, at temperature 1 (DeiT, Touvron et al. 2021, arXiv
            2012.12877). Not 0 where student and teacher agree.
        head: of a student with a distillation token, compare the "class" or "distillation" head alone (DeiT: the
            latter, with `task` at the class head); by default its answer, the mean of both.

    Cost: one forward of the teacher.

    Raises:
        ValueError: for a value out of range, or `hard` together with an option that it would ignore.
    """

    compares_classes = True
    citation = """@misc{hinton2015distilling,
  title = {Distilling the Knowledge in a Neural Network},
  author = {Geoffrey Hinton and Oriol Vinyals and Jeff Dean},
  year = {2015}, eprint = {1503.02531}, archivePrefix = {arXiv}
}"""

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        direction: Literal["forward", "reverse", "jsd"] = "forward",
        beta: float = 0.5,
        standardize: bool = False,
        hard: bool = False,
        head: str | None = None,
    ):
        super().__init__()
        name = "logit_kd"
        check_option(
            name, "temperature", temperature, is_number(temperature) and temperature > 0, "a number greater than 0"
        )
        check_option(name, "direction", direction, direction in DIRECTIONS, " or ".join(map(repr, DIRECTIONS)))
        check_option(name, "beta", beta, is_number(beta) and 0 < beta < 1, "a number between 0 and 1, both excluded")
        check_option(name, "standardize", standardize, isinstance(standardize, bool), "true or false")
        check_option(name, "hard", hard, isinstance(hard, bool), "true or false")
        if hard and (standardize or direction != "forward"):
            raise ValueError(
                "objective 'logit_kd': hard takes only the teacher's top class, so direction and standardize would "
                "be ignored; leave them out, or set hard to false."
            )
        check_head(name, head)
        self.temperature, self.direction, self.beta, self.head = temperature, direction, beta, head
        self.standardize, self.hard = standardize, hard
        self.divergence = not hard

    def needs(self, plan) -> tuple[Needs, Needs]:
        return Needs(logits=True), Needs(logits=True)

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        z_s, z_t = head_logits(student, self.head), teacher.logits.detach()
        if self.hard:
            return cross_entropy(z_s, z_t.argmax(-1))
        if self.standardize:
            z_s, z_t = standardize(z_s), standardize(z_t)
        log = bernoulli_log_probabilities if self.multi_label else log_probabilities
        log_s, log_t = (log(z, self.temperature) for z in (z_s, z_t))
        if self.direction == "forward":
            divergence = kl(log_t, log_s)
        elif self.direction == "reverse":
            divergence = kl(log_s, log_t)
        else:
            divergence = jensen_shannon(log_t, log_s, self.beta)
        return self.temperature**2 * (divergence.mean(-1) if self.multi_label else divergence)

    def multi_label_problem(self) -> str:
        option = "hard" if self.hard else "standardize" if self.standardize else ""
        return f"{option} is of one class an image; leave it out." if option else ""


class DecoupledKD(Objective):
    """Decoupled logit distillation, per labelled image: tau^2 (alpha TCKD + beta NCKD), in nats, >= 0.

    Plain distillation is TCKD + (1 - p_T[y]) NCKD: TCKD compares how sure both are of the label y, NCKD the
    distributions over the other classes, which a confident teacher all but silences. Here both have weights of their
    own (Zhao et al. 2022, "Decoupled Knowledge Distillation", arXiv 2203.08679 [paper: the authors' code]). Prefer
    `logit_kd` for unlabelled images or soft labels (mixup, CutMix), and where the teacher is unsure anyway. With two
    classes NCKD is 0.

    An image without a label (-100) counts 0 and is not counted. Its value is larger than that of `logit_kd` (beta
    instead of 1 - p_T[y]): choose its weight again. The authors' code raises its weight linearly over the first 20
    epochs; we do not.

    Args:
        temperature: tau > 0.
        alpha: weight of TCKD, >= 0.
        beta: weight of NCKD, >= 0, not both 0. 8 is the authors' default.

    Cost: one forward of the teacher.

    Raises:
        ValueError: for a value out of range; in the forward pass for soft labels (B, K).
    """

    counts = "labelled"
    takes_soft_labels = False
    compares_classes = True
    needs_labels = True
    citation = """@inproceedings{zhao2022decoupled,
  title = {Decoupled Knowledge Distillation},
  author = {Borui Zhao and Quan Cui and Renjie Song and Yiyu Qiu and Jiajun Liang},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2022}, eprint = {2203.08679}, archivePrefix = {arXiv}
}"""

    def __init__(self, *, temperature: float = 4.0, alpha: float = 1.0, beta: float = 8.0):
        super().__init__()
        name = "decoupled_kd"
        positive = is_number(temperature) and temperature > 0
        check_option(name, "temperature", temperature, positive, "a number greater than 0")
        check_option(name, "alpha", alpha, is_number(alpha) and alpha >= 0, "a number of at least 0")
        check_option(name, "beta", beta, is_number(beta) and beta >= 0, "a number of at least 0")
        check_option(name, "beta", beta, alpha + beta > 0, "more than 0 where alpha is 0: both weights were 0")
        self.temperature, self.alpha, self.beta = temperature, alpha, beta

    def needs(self, plan) -> tuple[Needs, Needs]:
        return Needs(logits=True), Needs(logits=True)

    def multi_label_problem(self) -> str:
        return SOFTMAX_ONLY

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        target, rest = decoupled(student.logits, teacher.logits.detach(), batch["labels"], self.temperature)
        return self.temperature**2 * (self.alpha * target + self.beta * rest)
