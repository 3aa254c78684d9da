"""Objectives on the embedding of an image and its patch tokens: for teachers without a head, and without labels."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_kdtl.functional import embeddings as fe
from hf_kdtl.functional.features import cosine_distance, unit
from hf_kdtl.functional.resample import average, precise
from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.pairing import PairingPlan
from hf_kdtl.objectives.base import Batch, Objective, Sample, check_option
from hf_kdtl.utils.options import is_integer, is_number

Projector = Literal["mlp", "linear", "identity"]
PROJECTORS = ("mlp", "linear", "identity")
BANK = 4096


def check_projector(objective: str, projector: Any) -> None:
    """Raises ValueError unless it is "mlp", "linear" or "identity"."""
    check_option(objective, "projector", projector, projector in PROJECTORS, " or ".join(map(repr, PROJECTORS)))


def make_projector(kind: Projector, student: int, teacher: int, what: str) -> nn.Module:
    """D_S -> D_T: mlp (layer norm, linear, GELU, linear, the wider of both in between), linear, or identity.

    Raises:
        ValueError: for a model without this output, and identity with widths that differ.
    """
    for who, width in (("student", student), ("teacher", teacher)):
        if not width:
            raise ValueError(f"the {who} gives no {what}. Use an objective on blocks, such as hidden_states.")
    if kind == "identity":
        if student != teacher:
            raise ValueError(
                f"projector is 'identity' and the {what} of student and teacher have the widths {student} and "
                f"{teacher}; use projector='mlp' or 'linear'."
            )
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(student, teacher)
    inner = max(student, teacher)
    return nn.Sequential(nn.LayerNorm(student), nn.Linear(student, inner), nn.GELU(), nn.Linear(inner, teacher))


def check_patches(plan: PairingPlan, option: str, least: int = 1) -> None:
    """Raises ValueError unless both models give patch tokens on a grid, of `least` cells or more in the student."""
    for who, model in (("student", plan.student), ("teacher", plan.teacher)):
        grid = model.patches and model.patches.grid
        if not grid:
            raise ValueError(
                f"the {who}, {model.name}, gives no patch tokens on a grid after its last block; set {option}=0."
            )
        if who == "student" and grid[0] * grid[1] < least:
            raise ValueError(
                f"the student's last map is {grid[0]} x {grid[1]}, and {least} patches are needed; set {option}=0, or "
                "give it larger images."
            )


def teacher_patches(teacher: Capture, grid: tuple[int, int] | None) -> Tensor:
    """The teacher's patch tokens on the student's grid."""
    assert teacher.patches is not None and teacher.patch_grid is not None and grid is not None
    return average(teacher.patches.detach(), teacher.patch_grid, grid)


class FeatureKD(Objective):
    """Features of the last layer, per image: the embedding's cosine distance, and that of the patch tokens.

    (1 - cos(P s, t~)) + patch_weight mean_n [.9 (1 - cos(P' s_n, t~_n)) + .1 smooth_l1(P' s_n, t~_n)], >= 0. s is what
    the head of the student's family reads, t the teacher's embedding (its `pool`), s_n and t_n the patch tokens after
    the last norm; the teacher's are averaged over the student's grid first. P and P' belong to the objective and are
    not in the student's checkpoint. No class outputs and no labels are needed, so any vision model teaches any other.

    t~ is standardised by what a sample of training images shows, before training: so teachers of different scale weigh
    alike, and the cosine sees how images differ instead of what they have in common.

    Args:
        projector: "mlp" (layer norm, linear, GELU, linear) | "linear" | "identity", where widths agree.
        standardize: "isotropic": (t - mean) / sqrt(the mean eigenvalue of the covariance), PHI-S without its rotation,
            to which cosines are blind. "channel": each channel by its own standard deviation. "none".
        patch_weight: of the patch tokens' part, >= 0; at 0 they are not read.
        sample: how many training images `standardize` reads.

    Cost: one forward of the teacher; O(B P D_S D_T) for the projectors. Before training a forward of the sample.

    Raises:
        ValueError: for a wrong option; when the pair is known, for a model without patch tokens on a grid
            (patch_weight=0 then), and identity with widths that differ; in the forward pass before `observe`.

    Label: [paper] for the weights of the parts, AM-RADIO, arXiv 2312.06709; isotropic after PHI-S, arXiv 2410.01680.
    The projectors, the sample and the change of grid are [ours].
    """

    needs_plan = True
    citation = """@inproceedings{ranzinger2024amradio,
  title = {{AM-RADIO}: Agglomerative Vision Foundation Model -- Reduce All Domains Into One},
  author = {Ranzinger, Mike and Heinrich, Greg and Kautz, Jan and Molchanov, Pavlo},
  booktitle = {CVPR}, year = {2024}, eprint = {2312.06709}, archivePrefix = {arXiv}
}
@misc{ranzinger2024phis,
  title = {{PHI-S}: Distribution Balancing for Label-Free Multi-Teacher Distillation},
  author = {Ranzinger, Mike and Barker, Jon and Heinrich, Greg and Molchanov, Pavlo and Catanzaro, Bryan and
            Tao, Andrew},
  year = {2024}, eprint = {2410.01680}, archivePrefix = {arXiv}
}"""

    def __init__(
        self,
        *,
        projector: Projector = "mlp",
        standardize: fe.Standardize = "isotropic",
        patch_weight: float = 1.0,
        sample: int = 1024,
    ):
        super().__init__()
        name, kinds = "feature_kd", ("isotropic", "channel", "none")
        check_projector(name, projector)
        check_option(name, "standardize", standardize, standardize in kinds, " or ".join(map(repr, kinds)))
        positive = is_number(patch_weight) and patch_weight >= 0
        check_option(name, "patch_weight", patch_weight, positive, "a number of at least 0")
        check_option(name, "sample", sample, is_integer(sample, 2), "a whole number of at least 2")
        self.kind, self.standardize, self.patch_weight = projector, standardize, patch_weight
        self.sample = 0 if standardize == "none" else sample
        self.divergence = projector == "identity" and standardize == "none"
        self.projector: nn.Module = nn.Identity()
        self.patch_projector: nn.Module = nn.Identity()
        self.measured = standardize == "none"
        self.grid: tuple[int, int] | None = None

    def build(self, plan: PairingPlan | None) -> None:
        if plan is None:
            raise ValueError("it compares with a teacher's features, and there is no teacher.")
        self.projector = make_projector(self.kind, plan.student.pooled, plan.teacher.pooled, "embedding")
        widths = {"": plan.teacher.pooled}
        if self.patch_weight:
            check_patches(plan, "patch_weight")
            mine, its = plan.student.patches, plan.teacher.patches
            assert mine is not None and its is not None
            self.grid, widths["patch_"] = mine.grid, its.width
            self.patch_projector = make_projector(self.kind, mine.width, its.width, "patch tokens")
        for name, width in widths.items() if self.sample else ():
            self.register_buffer(f"{name}mean", torch.zeros(width))
            self.register_buffer(f"{name}scale", torch.zeros(width))

    def needs(self, plan: PairingPlan | None) -> tuple[Needs, Needs]:
        wanted = Needs(pooled=True, patches=self.patch_weight > 0)
        return wanted, wanted

    def observe(self, batches: Sample) -> None:
        found: dict[str, fe.Moments] = {}
        for teacher, _ in batches:
            assert teacher.pooled is not None
            seen = {"": teacher.pooled}
            if self.patch_weight:
                seen["patch_"] = teacher_patches(teacher, self.grid)
            found = {name: fe.moments(x, found.get(name)) for name, x in seen.items()}
        for name, sums in found.items():
            try:
                mean, scale = fe.mean_and_scale(sums, self.standardize)
            except ValueError as error:
                what = "patch tokens" if name else "embeddings"
                raise ValueError(f"the teacher's {what}: {error} Check its image processor, or its pool.") from error
            self.get_buffer(f"{name}mean").copy_(mean)
            self.get_buffer(f"{name}scale").copy_(scale)

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        assert student.pooled is not None and teacher.pooled is not None
        value = cosine_distance(self.projector(student.pooled), self._standard(teacher.pooled.detach(), ""))
        if not self.patch_weight:
            return value
        its = self._standard(teacher_patches(teacher, student.patch_grid), "patch_")
        return value + self.patch_weight * fe.token_distance(self.patch_projector(student.patches), its)

    def _standard(self, x: Tensor, name: str) -> Tensor:
        if self.standardize == "none":
            return precise(x)
        if not self.measured:  # asked until it is: to read a buffer makes a GPU wait
            if not all(bool(b.any()) for key, b in self.named_buffers() if key.endswith("scale")):
                raise ValueError(
                    "feature_kd has not seen how large the teacher's features are. DistillationTrainer.train does it; "
                    "by hand call observe([(<Capture of the teacher>, None)]) first, or set standardize='none'."
                )
            self.measured = True
        return (precise(x) - self.get_buffer(f"{name}mean")) / self.get_buffer(f"{name}scale")


class Similarity(Objective):
    """What an image is like, per image: KL of its similarities to a bank of images, and of those among its patches.

    KL(softmax(<t, b_j> / tau) || softmax(<P s, b_j> / tau)) + local_weight mean_n KL_n, in nats, >= 0. t, P s and the
    bank's b_j have length 1; b_j are the teacher's embeddings of training images, fixed before training. An image's
    own entry is left out on both sides. KL_n compares the similarities of patch n to the other patches of the image,
    of the student among its own tokens and of the teacher among its own, so no projector stands between.

    Unlike `feature_kd` it asks for the order of things and not for the coordinates: it can be met exactly by a student
    of another width. The two go well together.

    Args:
        bank: how many images; by default 4096, or half of the training images where there are fewer.
        temperature: tau.
        local_weight: of the patches' part, >= 0; at 0 they are not read.
        projector: "mlp" | "linear" | "identity", as in `feature_kd`.

    Cost: one forward of the teacher; O(B n D + B P^2 D). Before training a forward of the bank's images, and n D
    numbers in every checkpoint.

    Raises:
        ValueError: for a wrong option; for a bank that is larger than the training data; when the pair is known, as
            `feature_kd`, and for fewer than two patches in the student; in the forward pass before `observe`.

    Label: [review], the formula of LightlyTrain's distillation with a moving queue of embeddings; the fixed bank, by
    which an image's value does not depend on its batch, is [ours].
    """

    needs_plan = True
    needs_index = True
    citation = """@misc{lightlytrain2025,
  title = {{LightlyTrain}}, author = {{Lightly}}, year = {2025}, howpublished = {https://docs.lightly.ai/train}
}"""

    def __init__(
        self,
        *,
        bank: int | None = None,
        temperature: float = 0.07,
        local_weight: float = 1.0,
        projector: Projector = "mlp",
    ):
        super().__init__()
        name = "similarity"
        check_projector(name, projector)
        check_option(
            name, "bank", bank, bank is None or is_integer(bank, 2), "a whole number of at least 2, or nothing"
        )
        positive = is_number(temperature) and temperature > 0
        check_option(name, "temperature", temperature, positive, "a number greater than 0")
        valid = is_number(local_weight) and local_weight >= 0
        check_option(name, "local_weight", local_weight, valid, "a number of at least 0")
        self.kind, self.size, self.temperature, self.local_weight = projector, bank, temperature, local_weight
        self.sample = bank or BANK
        self.divergence = projector == "identity"
        self.projector: nn.Module = nn.Identity()

    def sample_size(self, images: int) -> int:
        if self.size is None:
            return max(2, min(BANK, images // 2))
        if self.size > images:
            raise ValueError(
                f"bank is {self.size} and there are {images} training images; expected at most that many, or nothing: "
                f"then it is {self.__class__().sample_size(images)}."
            )
        return self.size

    def build(self, plan: PairingPlan | None) -> None:
        if plan is None:
            raise ValueError("it compares with a teacher's features, and there is no teacher.")
        self.projector = make_projector(self.kind, plan.student.pooled, plan.teacher.pooled, "embedding")
        if self.local_weight:
            check_patches(plan, "local_weight", least=2)
        self.register_buffer("bank", torch.zeros(0, plan.teacher.pooled))
        self.register_buffer("bank_rows", torch.zeros(0, dtype=torch.long))

    def needs(self, plan: PairingPlan | None) -> tuple[Needs, Needs]:
        wanted = Needs(pooled=True, patches=self.local_weight > 0)
        return wanted, wanted

    def sample_needs(self, plan: PairingPlan | None) -> Needs:
        return Needs(pooled=True)

    def observe(self, batches: Sample) -> None:
        entries, rows = [], []
        for teacher, _ in batches:
            assert teacher.pooled is not None
            entries.append(unit(precise(teacher.pooled.detach())))
            known = teacher.image_index
            rows.append(torch.full((len(entries[-1]),), -1, device=entries[-1].device) if known is None else known)
        self.bank, self.bank_rows = torch.cat(entries), torch.cat(rows)

    def forward(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        assert student.pooled is not None and teacher.pooled is not None
        bank, rows = self.get_buffer("bank"), self.get_buffer("bank_rows")
        if not len(bank):
            raise ValueError(
                "similarity has no bank yet. DistillationTrainer.train fills it; by hand call observe([(<Capture of "
                "the teacher>, None)]) first."
            )
        index = batch.get("image_index")
        own = None if index is None else index[:, None] == rows
        its = teacher.pooled.detach()
        value = fe.similarity_divergence(self.projector(student.pooled), its, bank, self.temperature, own)
        if not self.local_weight:
            return value
        assert student.patches is not None
        tokens = teacher_patches(teacher, student.patch_grid)
        return value + self.local_weight * fe.local_divergence(student.patches, tokens, self.temperature)
