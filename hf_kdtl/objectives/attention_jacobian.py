"""Matching of the Jacobian of a feature map's strongest place."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_kdtl.functional import derivatives as fd
from hf_kdtl.functional.features import energy
from hf_kdtl.functional.resample import redistribute
from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.forward.geometry import LayerGeometry
from hf_kdtl.models.pairing import Layers, Pair, PairingPlan
from hf_kdtl.objectives.base import Batch, check_option
from hf_kdtl.objectives.derivatives import DerivativeObjective
from hf_kdtl.objectives.estimators import Estimator, EstimatorChoice, check_estimator, choices_of, wanted_choices
from hf_kdtl.objectives.jacobian import CITATION
from hf_kdtl.objectives.paired import check_grids, patches
from hf_kdtl.utils.options import is_integer


class AttentionJacobian(DerivativeObjective):
    """Jacobian matching of attention-transfer maps, per image: in [0, 4] for each pair of layers.

    Q_n = mean_d h_{n,d}^2 of patch n of a block's output (the teacher's shared out over the student's grid), averaged
    over windows of pool x pool; m is the place of the teacher's largest value. The value is || g_S/||g_S|| -
    g_T/||g_T|| ||^2 of g = d Q_m / d x, the same place in both, by the student's pixels x.

    Args:
        layers: last | uniform | [[student block, teacher block], ...]; a pair costs a backward of each model.
        pool: side of the averaging window, in patches of the student.
        estimator: auto | vjp | split, as in `jacobian`.
        central, step: of a central difference inside split.
        fraction: share of the images, in (0, 1], that take part.

    Cost: as `jacobian`, for each pair, with blocks after the pair's left out of the backward.

    Raises:
        ValueError: as `jacobian`; for tokens that lie on no grid.

    Label: [paper], Srinivas & Fleuret 2018, arXiv 1803.00443; the window of the pooling and the change of grid are
    [ours].
    """

    name = "attention_jacobian"
    citation = CITATION
    needs_plan = True
    of_classes = False
    compares_classes = False

    def __init__(
        self,
        *,
        layers: Layers = "last",
        pool: int = 2,
        estimator: Estimator = "auto",
        central: bool = False,
        step: float | None = None,
        fraction: float = 1.0,
    ):
        super().__init__(fraction=fraction, probes=1, estimator=estimator, central=central, step=step)
        check_option(self.name, "pool", pool, is_integer(pool), "a whole number of at least 1")
        check_estimator(self.name, estimator, central, step, ("vjp", "split"))
        self.layers, self.pool = layers, pool
        self.pairs: list[Pair] = []

    def choices(self) -> tuple[EstimatorChoice, ...]:
        return wanted_choices(self.estimator, ("vjp", "split"), self.central, self.step)

    def alternatives(self) -> tuple[EstimatorChoice, ...]:
        return choices_of(("vjp", "split"))

    def build(self, plan: PairingPlan | None) -> None:
        if plan is None:
            raise ValueError("it pairs layers of a student and a teacher, and there is no teacher.")
        self.pairs = plan.pair(self.layers)
        for pair in self.pairs:
            check_grids(pair)

    def needs(self, plan: PairingPlan | None) -> tuple[Needs, Needs]:
        student, teacher = super().needs(plan)
        return (
            replace(student, hidden_states=frozenset(pair.student_layer for pair in self.pairs)),
            replace(teacher, hidden_states=frozenset(pair.teacher_layer for pair in self.pairs)),
        )

    def measure(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        return torch.stack([self._one(pair, student, teacher) for pair in self.pairs], dim=1)

    def _one(self, pair: Pair, student: Capture, teacher: Capture) -> Tensor:
        pair = pair.at(student.geometry, teacher.geometry)
        check_grids(pair)
        its = self._pooled(teacher, pair.teacher_layer, pair.teacher, pair.student)
        place = its.detach().argmax(1, keepdim=True)
        target = teacher.input_gradient(its.gather(1, place)[:, 0], create_graph=False)

        def scalar(capture: Capture) -> Tensor:
            return self._pooled(capture, pair.student_layer, pair.student, pair.student).gather(1, place)[:, 0]

        return self.matched(student, scalar, lambda j: fd.normalized(j, target))

    def _pooled(self, capture: Capture, layer: int, own: LayerGeometry, target: LayerGeometry) -> Tensor:
        """(b, cells): the energy of a block's patches on the target's grid, averaged over windows."""
        assert own.grid is not None and target.grid is not None
        shared = redistribute(energy(patches(capture.hidden_states[layer], own)), own.grid, target.grid)
        grid = shared.reshape(-1, 1, *target.grid)
        return F.avg_pool2d(grid, self.pool, ceil_mode=True, count_include_pad=False).flatten(1)
