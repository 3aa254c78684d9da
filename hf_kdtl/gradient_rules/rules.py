"""The gradient rules: transfer that does not conflict with the task, a symmetric baseline, and transfer by layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from hf_kdtl.functional.surgery import Conflict, Gradient, Products, Scope, conflict, one_sided, orthogonal, pcgrad
from hf_kdtl.gradient_rules.base import GradientRule, check_option, check_word
from hf_kdtl.utils.options import is_number

FORMS, SCOPES = ("one_sided", "orthogonal"), ("global", "tensor")


class NeverHurt(GradientRule):
    """Remove from the transfer gradient d what conflicts with the task gradient g.

        one_sided   g + d - min(<g, d>, 0) / <g, g> g
        orthogonal  g + c (d - <g, d> / <g, g> g),  c = alpha * decay^epoch

    Both keep <g, result> >= <g, g>. That holds for the gradient passed to the optimizer, on that batch, and
    for nothing else: SGD without momentum keeps it for the step, AdamW does not. With g = (1, .1) and d = (-2, 20)
    nothing conflicts, and yet Adam's first step has <g, step> = -.9 times the rate: it raises the task's loss.
    Clipping keeps it; momentum and different rates of the layers may not. It says nothing about test accuracy. The
    effect of the optimizer's step is measured and logged: gradient_rule/task_step = <g, step>, positive where the step
    lowers the task's loss to first order.

    A tensor without a task gradient (a projector of an objective) keeps d as it is.

    Args:
        form: "one_sided" removes the conflicting part and keeps a d that does not conflict; "orthogonal" removes all
            of d along g, and scales the rest.
        alpha: of orthogonal, > 0; 0.1 by default.
        decay: of orthogonal, in (0, 1]; 0.99 by default.
        scope: "global", or "tensor": inner products, and so the guarantee, for each tensor alone.

    Cost: a second backward of what task and transfer share; one more set of gradients; two readings of both sets.

    Raises:
        ValueError: for an unknown form or scope, alpha or decay out of range or without effect.

    Source: Wan et al. 2019, arXiv 1911.07489. orthogonal is its code (GrOD in the journal) [paper]; one_sided fits
    its abstract: A-GEM's and PCGrad's projection, of the regularizer only [ours].
    """

    name = "never_hurt"
    citation = """@misc{wan2019towards,
  title = {Towards Making Deep Transfer Learning Never Hurt},
  author = {Wan and Xiong and Li and Zhu and Huan},
  year = {2019}, eprint = {1911.07489}, archivePrefix = {arXiv}
}"""

    def __init__(
        self,
        *,
        form: Literal["one_sided", "orthogonal"] = "one_sided",
        alpha: float | None = None,
        decay: float | None = None,
        scope: Scope = "global",
    ):
        check_word(self.name, "form", form, FORMS)
        check_word(self.name, "scope", scope, SCOPES)
        for option, value in (("alpha", alpha), ("decay", decay)):
            if value is not None and form == "one_sided":
                raise ValueError(
                    f"gradient_rule {self.name!r}: {option} has no effect with form 'one_sided'; leave it out, or "
                    "take form 'orthogonal'."
                )
        self.form, self.scope = form, scope
        self.alpha, self.decay = 0.1 if alpha is None else alpha, 0.99 if decay is None else decay
        check_option(self.name, "alpha", alpha, is_number(self.alpha) and self.alpha > 0, "a number greater than 0")
        check_option(self.name, "decay", decay, is_number(self.decay) and 0 < self.decay <= 1, "a number in (0, 1]")

    def combine(
        self, task: Gradient, transfer: Gradient, products: Sequence[Products], epoch: int
    ) -> list[Tensor | None]:
        if self.form == "one_sided":
            return one_sided(task, transfer, self.scope, products=products, overwrite=True)
        c = self.alpha * self.decay**epoch
        return orthogonal(task, transfer, c, self.scope, products=products, overwrite=True)

    def conflict(self, products: Sequence[Products], epoch: int) -> Conflict:
        return conflict(products, self.scope, self.form)


class PCGrad(GradientRule):
    """The symmetric baseline: where they conflict, remove from each gradient its part along the other.

    g - <g, d> / <d, d> d + d - <g, d> / <g, g> g, and g + d elsewhere. The task is not protected: where they conflict
    <g, result> = <g, g> (1 - cos^2), less than without any transfer. As for `NeverHurt`, that is the gradient passed
    to the optimizer, on that batch; the effect of AdamW's step is logged (gradient_rule/task_step), and nothing is
    promised about test accuracy.

    Args:
        scope: "global", or "tensor": inner products of each tensor alone.

    Cost: as `NeverHurt`.

    Raises:
        ValueError: for an unknown scope.

    Source: Yu et al. 2020, arXiv 2001.06782, for two gradients [ours].
    """

    name = "pcgrad"
    citation = """@misc{yu2020gradient,
  title = {Gradient Surgery for Multi-Task Learning},
  author = {Yu and Kumar and Gupta and Levine and Hausman and Finn},
  year = {2020}, eprint = {2001.06782}, archivePrefix = {arXiv}
}"""

    def __init__(self, *, scope: Scope = "global"):
        check_word(self.name, "scope", scope, SCOPES)
        self.scope = scope

    def combine(
        self, task: Gradient, transfer: Gradient, products: Sequence[Products], epoch: int
    ) -> list[Tensor | None]:
        return pcgrad(task, transfer, self.scope, products=products, overwrite=True)

    def conflict(self, products: Sequence[Products], epoch: int) -> Conflict:
        return conflict(products, self.scope, "pcgrad")


class LayerLocal(GradientRule):
    """Each pair of layers moves its own block of the student only: g + d, where d holds, for the parameters of block
    j, the gradient of the term of block j alone. g reaches every layer, as usual.

    So the blocks before j do not learn from the distance at block j. An objective's own parameters (projectors) get
    the gradient of all its pairs. Objectives that pair no layers have no block and are refused.

    Nothing is removed from d, so the task is not protected: d may conflict with g within a block. As for `NeverHurt`
    this is about the gradient passed to the optimizer, on that batch; the effect of AdamW's step is logged
    (gradient_rule/task_step), and nothing is promised about test accuracy.

    Args:
        none.

    Cost: for each pair a backward through its own block; one more set of gradients.

    Source: a second reading of Kokane et al. 2024, arXiv 2407.04871 [ours].
    """

    name = "layer_local"
    local = True
    citation = """@article{kokane2024improving,
  title = {Improving Knowledge Distillation in Transfer Learning with Layer-wise Learning Rates},
  author = {Kokane and Uddin and Xu},
  year = {2024}, eprint = {2407.04871}, archivePrefix = {arXiv}
}"""

    def combine(
        self, task: Gradient, transfer: Gradient, products: Sequence[Products], epoch: int
    ) -> list[Tensor | None]:
        pairs = zip(task, transfer, strict=True)
        return [d if g is None else g if d is None else d.add_(g) for g, d in pairs]

    def conflict(self, products: Sequence[Products], epoch: int) -> Conflict:
        return conflict(products)._replace(removed=0.0)
