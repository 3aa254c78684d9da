"""Matching under noise: what Jacobian matching is the small-noise limit of."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_kdtl.functional.divergences import kl, log_probabilities
from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.forward.perturbations import Direction
from hf_kdtl.objectives.base import SOFTMAX_ONLY, Batch, check_option
from hf_kdtl.objectives.derivatives import DerivativeObjective
from hf_kdtl.objectives.estimators import EstimatorChoice
from hf_kdtl.objectives.jacobian import CITATION
from hf_kdtl.utils.options import is_number


class NoisyKD(DerivativeObjective):
    """Logit distillation under pixel noise, per image: tau^2 KL(softmax(z_T(x + xi)/tau) || softmax(z_S(x + xi)/tau)).

    xi ~ N(0, noise^2), the same for student and teacher, in the units of the student's pixel_values. Its expansion in
    the noise holds Jacobian matching (docs/jacobian_matching.md); there is nothing to differentiate twice.

    Args:
        temperature: tau > 0.
        noise: standard deviation > 0. Pixels that were normalised have a deviation of about 1.
        probes: noises that are averaged.
        fraction: share of the images, in (0, 1], that take part.

    Cost: one more forward of each model a probe, about as much as the KD step itself. Any kernel, FSDP2 and compile.

    Raises:
        ValueError: for a wrong option; for integer pixels.

    Label: [paper], Srinivas & Fleuret 2018, arXiv 1803.00443.
    """

    name = "noisy_kd"
    citation = CITATION

    def __init__(self, *, temperature: float = 4.0, noise: float = 0.1, probes: int = 1, fraction: float = 1.0):
        super().__init__(fraction=fraction, probes=probes, estimator="auto", central=False, step=None)
        for option, value in (("temperature", temperature), ("noise", noise)):
            check_option(self.name, option, value, is_number(value) and value > 0, "a number greater than 0")
        self.temperature, self.noise = temperature, noise

    def choices(self) -> tuple[EstimatorChoice, ...]:
        return (EstimatorChoice("noise"),)

    def multi_label_problem(self) -> str:
        return SOFTMAX_ONLY

    def needs(self, plan) -> tuple[Needs, Needs]:
        shifts = frozenset(Direction("normal", self.noise, k) for k in range(self.probes))
        both = Needs(directions=shifts, fraction=self.fraction)
        return both, both

    def measure(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        values, draws = [], batch["draws"]
        for k in range(self.probes):
            place = Direction("normal", self.noise, k)
            shifted = (model.logits_at(place, draws, precise=False) for model in (student, teacher))
            log_s, log_t = (log_probabilities(logits, self.temperature) for logits in shifted)
            values.append(self.temperature**2 * kl(log_t.detach(), log_s))
        return torch.stack(values).mean(0)
