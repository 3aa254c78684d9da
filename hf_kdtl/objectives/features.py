"""Objectives on features: the outputs of blocks."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from hf_kdtl.functional import features as ff
from hf_kdtl.models.forward.capture import Capture
from hf_kdtl.models.pairing import Layers, Pair, PairingPlan
from hf_kdtl.objectives.base import check_option
from hf_kdtl.objectives.paired import PairedObjective, aligned, as_tokens, check_grids, patches


class AttentionTransfer(PairedObjective):
    """Spatial attention transfer, per image: where features are strong, in any two models, conv nets too.

    Q_n = mean_d h_{n,d}^2 of patch n of a block's output, q = Q / ||Q||; the value is the mean over the patches of
    (q_S - q_T)^2, in [0, 2 / P]. The teacher's Q is shared out over the student's grid first. Needs no class token and
    no attention; prefix tokens are left out.

    The value is small (P is in the hundreds): weights of 100 to 1000 are usual.

    Args:
        layers: uniform | last | [[student block, teacher block], ...].
        mode: "code" as above, the authors' code; "paper" the norm ||q_S - q_T||, not squared (weigh it by beta / 2),
            with the zero subgradient at equality.

    Cost: no further forward; O(B P D) a pair.

    Raises:
        ValueError: for a wrong option; and when the pair is known, for tokens that lie on no grid,
            or a student's map of one cell.

    Label: [paper], Zagoruyko & Komodakis 2017, arXiv 1612.03928, the authors' code; the change of grid is [ours].
    """

    citation = """@inproceedings{zagoruyko2017paying,
  title = {Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via
           Attention Transfer},
  author = {Zagoruyko, Sergey and Komodakis, Nikos},
  booktitle = {ICLR}, year = {2017}, eprint = {1612.03928}, archivePrefix = {arXiv}
}"""

    def __init__(self, *, layers: Layers = "uniform", mode: Literal["code", "paper"] = "code"):
        super().__init__(layers)
        check_option("attention_transfer", "mode", mode, mode in ("code", "paper"), "'code' or 'paper'")
        self.mode: Literal["code", "paper"] = mode

    def check(self, pair: Pair, plan: PairingPlan) -> None:
        check_grids(pair)
        if pair.student.grid == (1, 1):
            raise ValueError(
                f"{pair}: the student's map is one cell, whose normalised energy is 1 whatever it learns. Name other "
                "layers: layers=[[student, teacher], ...]."
            )

    def compare(self, index: int, pair: Pair, student: Capture, teacher: Capture) -> Tensor:
        assert pair.student.grid is not None and pair.teacher.grid is not None
        mine = patches(student.hidden_states[pair.student_layer], pair.student)
        its = patches(teacher.hidden_states[pair.teacher_layer].detach(), pair.teacher)
        return ff.attention_transfer(mine, its, pair.student.grid, pair.teacher.grid, self.mode)


class HiddenStates(PairedObjective):
    """Features of paired blocks, per image: the distance of P h_S from h_T over matched tokens, >= 0.

    P is a projector D_S -> D_T of each pair, trained along (it belongs to the objective, and is not in the student's
    checkpoint). Both sides are layer-normed without affine first, so that a weight means the same at any scale. The
    teacher's tokens are averaged over the student's grid; class is matched with class, other prefix tokens dropped.

    Args:
        layers: uniform | last | [[student block, teacher block], ...].
        projector: "linear"; "orthogonal" (a linear one whose rows or columns stay orthonormal); "identity" where the
            widths agree.
        normalize: what is layer-normed: "both" | "teacher" | "none".
        distance: "mse" | "smooth_l1" | "cosine", mean over tokens (and channels).

    Cost: no further forward; O(B N D_S D_T) a pair for the projector.

    Raises:
        ValueError: for a wrong option; and when the pair is known, for tokens that lie on no grid, or identity with
            widths that differ.

    Label: [ours], after FitNets (hints, arXiv 1412.6550).
    """

    citation = """@inproceedings{romero2015fitnets,
  title = {FitNets: Hints for Thin Deep Nets},
  author = {Romero, Adriana and Ballas, Nicolas and Kahou, Samira Ebrahimi and Chassang, Antoine and Gatta, Carlo and
            Bengio, Yoshua},
  booktitle = {ICLR}, year = {2015}, eprint = {1412.6550}, archivePrefix = {arXiv}
}"""

    def __init__(
        self,
        *,
        layers: Layers = "uniform",
        projector: Literal["linear", "orthogonal", "identity"] = "linear",
        normalize: Literal["both", "teacher", "none"] = "both",
        distance: Literal["mse", "smooth_l1", "cosine"] = "mse",
    ):
        super().__init__(layers)
        for option, value, valid in (
            ("projector", projector, ("linear", "orthogonal", "identity")),
            ("normalize", normalize, ("both", "teacher", "none")),
            ("distance", distance, ("mse", "smooth_l1", "cosine")),
        ):
            check_option("hidden_states", option, value, value in valid, " or ".join(map(repr, valid)))
        self.projector = projector
        self.normalize: Literal["both", "teacher", "none"] = normalize
        self.distance: Literal["mse", "smooth_l1", "cosine"] = distance
        self.divergence = projector == "identity" and normalize != "teacher"
        self.projectors = nn.ModuleList()

    def check(self, pair: Pair, plan: PairingPlan) -> None:
        check_grids(pair)
        if self.projector == "identity" and pair.student.width != pair.teacher.width:
            raise ValueError(
                f"{pair}: projector is 'identity' and the widths are {pair.student.width} and {pair.teacher.width}; "
                "use projector='linear'."
            )

    def build(self, plan: PairingPlan | None) -> None:
        super().build(plan)
        for pair in self.pairs:
            if self.projector == "identity":
                self.projectors.append(nn.Identity())
                continue
            linear = nn.Linear(pair.student.width, pair.teacher.width, bias=self.projector == "linear")
            self.projectors.append(orthogonal(linear) if self.projector == "orthogonal" else linear)

    def compare(self, index: int, pair: Pair, student: Capture, teacher: Capture) -> Tensor:
        mine = as_tokens(student.hidden_states[pair.student_layer])
        its = as_tokens(teacher.hidden_states[pair.teacher_layer].detach())
        return ff.feature_distance(*aligned(pair, self.projectors[index](mine), its), self.normalize, self.distance)
