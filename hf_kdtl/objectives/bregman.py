"""A student that imports a compressed layer of its teacher, and predicts its coefficients."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from hf_kdtl.functional.resample import precise
from hf_kdtl.models.bregman.layer import BregmanLayer
from hf_kdtl.models.bregman.outputs import needs_of, outputs_of
from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.pairing import Pair, PairingPlan
from hf_kdtl.models.run_context import RunContext
from hf_kdtl.objectives.base import Batch, Objective, check_option
from hf_kdtl.objectives.paired import aligned, as_tokens, check_grids
from hf_kdtl.utils.options import is_number


class Bregman(Objective):
    """Bregman representation, per image: D_F(V c + m, f^-1(y)) of the teacher's output y, >= 0.

    The teacher's layer was compressed before (hf-kdtl fit-representation): y ~ f(V c + m) with f = grad F, few
    directions V and the mean m. The student imports the layer c -> f(V c + m), which is fixed, and learns a linear
    head on its own feature that predicts c. With soft-max (class probabilities, attention rows) the divergence is
    KL(y || f(V c + m)) in nats; with the identity half the squared distance, summed over the width. Not 0 where
    student and teacher agree: the head is another one, and V does not explain everything.

    The head reads the student's pooled feature; for hidden states each of the tokens of the student's block that is
    paired with the represented one (uniform pairing), the teacher's tokens averaged over the student's grid, and the
    value is the mean over tokens. The classes of probabilities are put in the student's order. The head belongs to
    the objective and is not in the student's checkpoint.

    The value has the size of the divergence: `baseline` in the folder's representation.json, which is what the mean m
    alone gives, over 10 is a usual place to begin: weight = 1 / baseline to 10 / baseline.

    Args:
        representation: the folder that hf-kdtl fit-representation wrote.
        coefficients: weight of ||c - c*||^2 added to it, >= 0, with c* the best coefficients of y (found by Newton
            steps in float64: dear, for the many tokens of hidden states most of all).

    Cost: one forward of the teacher; O(B (D_S k + d k)), for hidden states times the tokens. With `coefficients` 5 to
    25 Newton steps of O(d k^2) an image or token more. A hash of the teacher's weights once (about 1 s a GB).

    Raises:
        ValueError: for a value out of range, and without a representation; when the models are known, for a
            representation of another teacher, layer, class order or width, and for a block that is not paired.
        FileNotFoundError: when the folder holds no representation.

    Label: [paper], Amid, Anil, Fifty, Warmuth 2022, arXiv 2209.07080, for the imported layer and the head on top of
    the student; the loss for other links than soft-max, the alignment of tokens and `coefficients` are [ours].
    """

    needs_plan = True
    divergence = False
    citation = """@misc{amid2022layerwise,
  title = {Layerwise Bregman Representation Learning with Applications to Knowledge Distillation},
  author = {Amid, Ehsan and Anil, Rohan and Fifty, Christopher and Warmuth, Manfred K.},
  year = {2022}, eprint = {2209.07080}, archivePrefix = {arXiv}
}"""

    def __init__(self, *, representation: str = "", coefficients: float = 0.0):
        super().__init__()
        name = "bregman"
        if not isinstance(representation, str | Path) or not str(representation):
            raise ValueError(
                f"objective {name!r}: representation is {representation!r}; expected the folder of one. Make it with "
                "hf-kdtl fit-representation --teacher <model> --of probabilities --k 8 --output_dir <folder>."
            )
        positive = is_number(coefficients) and coefficients >= 0
        check_option(name, "coefficients", coefficients, positive, "a number of at least 0")
        self.layer, self.coefficients = BregmanLayer.load(representation), coefficients
        self.of, self.block = self.layer.provenance.of, self.layer.provenance.layer
        self.compares_classes = self.of == "probabilities"
        self.pair: Pair | None = None
        self.head: nn.Module = nn.Identity()

    def multi_label_problem(self) -> str:
        return (
            "a representation of probabilities is of a soft-max; fit one of pooled." if self.compares_classes else ""
        )

    def prepare(self, context: RunContext) -> list[str]:
        if context.teacher is not None:  # without one `build` refuses
            self.layer.check_teacher(context.teacher)
            if self.of == "probabilities":
                self.layer = self.layer.reordered(context.teacher.order)
        share = f"{100 * self.layer.representation.explained:.1f} %"
        return [f"{self.layer.k} coefficients explain {share} of the {self.layer.provenance}."]

    def build(self, plan: PairingPlan | None) -> None:
        if plan is None:
            raise ValueError("it compares with a teacher's layer, and there is no teacher, or its blocks are unknown.")
        self.layer.check_width(plan.teacher)
        width = plan.student.pooled
        if self.of == "hidden_states":
            self.pair = self._paired(plan)
            check_grids(self.pair)
            width = self.pair.student.width
        if not width:
            raise ValueError(f"what the classifier of {plan.student.name} reads could not be found.")
        self.head = nn.Linear(width, self.layer.k)

    def _paired(self, plan: PairingPlan) -> Pair:
        pairs = plan.pair("uniform")
        found = [pair for pair in pairs if pair.teacher_layer == self.block]
        if not found:
            raise ValueError(
                f"the representation is of the teacher's block {self.block}, which no block of the student is paired "
                f"with. Fit one of a block among {[pair.teacher_layer for pair in pairs]}."
            )
        return found[0]

    def needs(self, plan: PairingPlan | None) -> tuple[Needs, Needs]:
        if self.pair is None:
            return Needs(pooled=True), needs_of(self.of, self.block)
        return Needs(hidden_states=frozenset({self.pair.student_layer})), needs_of(self.of, self.block)

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        y = outputs_of(teacher, self.of, self.block).detach()
        if self.pair is None:
            c = precise(self.head(student.pooled))
        else:
            pair = self.pair.at(student.geometry, teacher.geometry)
            c, y = aligned(pair, self.head(as_tokens(student.hidden_states[pair.student_layer])), y)
        value = self.layer.link.divergence(self.layer.before(c), y)
        if self.coefficients:
            value = value + self.coefficients * (c - self.layer.encode(y).to(c)).square().sum(-1)
        return value if value.ndim == 1 else value.mean(1)
