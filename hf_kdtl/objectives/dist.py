"""DIST: the class outputs of student and teacher must correlate, within an image and within a class."""

from torch import Tensor

from hf_kdtl.functional.logits import correlations
from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.objectives.base import SOFTMAX_ONLY, Batch, Objective, check_option
from hf_kdtl.utils.options import is_number


class Dist(Objective):
    """Correlation distillation: tau^2 (beta mean_b (1 - r_b) + gamma mean_k (1 - r_k)), up to 2 tau^2 (beta + gamma).

    r_b is Pearson's correlation of softmax(z_S / tau) and softmax(z_T / tau) over the classes of image b, r_k over the
    images of the batch for class k (Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher", arXiv
    2205.10536 [paper]). Correlation asks for the same order and proportions, not the same numbers, which a small
    student can follow where the teacher is far stronger. Prefer `logit_kd` where batches are small: with a single
    image the second part is 0.

    A batch statistic: r_k is taken over one micro-batch of one process, so the value depends on how the effective
    batch is split. It is one number, counted once per image of its micro-batch.

    Where both sides are constant (an image with equal probabilities, a class with the same probability in every
    image) the correlation counts as 1; where only one is, as 0; both without gradient. So a student whose head starts
    at exactly zero learns nothing from this term alone, until another one has moved it.

    Args:
        temperature: tau > 0. 1 by default, as the authors have it, where the other objectives have 4.
        beta: weight of the part over classes, >= 0.
        gamma: weight of the part over images, >= 0, not both 0.

    Cost: one forward of the teacher.

    Raises:
        ValueError: for a value out of range.
    """

    reduction = "batch"
    compares_classes = True
    citation = """@inproceedings{huang2022knowledge,
  title = {Knowledge Distillation from A Stronger Teacher},
  author = {Tao Huang and Shan You and Fei Wang and Chen Qian and Chang Xu},
  booktitle = {Advances in Neural Information Processing Systems}, volume = {35},
  year = {2022}, eprint = {2205.10536}, archivePrefix = {arXiv}
}"""

    def __init__(self, *, temperature: float = 1.0, beta: float = 1.0, gamma: float = 1.0):
        super().__init__()
        positive = is_number(temperature) and temperature > 0
        check_option("dist", "temperature", temperature, positive, "a number greater than 0")
        check_option("dist", "beta", beta, is_number(beta) and beta >= 0, "a number of at least 0")
        check_option("dist", "gamma", gamma, is_number(gamma) and gamma >= 0, "a number of at least 0")
        check_option("dist", "gamma", gamma, beta + gamma > 0, "more than 0 where beta is 0: both weights were 0")
        self.temperature, self.beta, self.gamma = temperature, beta, gamma

    def needs(self, plan) -> tuple[Needs, Needs]:
        return Needs(logits=True), Needs(logits=True)

    def multi_label_problem(self) -> str:
        return SOFTMAX_ONLY

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        over_classes, over_images = correlations(student.logits, teacher.logits.detach(), self.temperature)
        return self.temperature**2 * (self.beta * over_classes.mean() + self.gamma * over_images.mean())
