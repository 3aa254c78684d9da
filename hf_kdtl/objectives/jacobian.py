"""Matching of Jacobians: the slopes of class outputs along the pixels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_kdtl.functional import derivatives as fd
from hf_kdtl.functional.derivatives import OF, Of
from hf_kdtl.functional.divergences import log_probabilities
from hf_kdtl.models.forward.capture import Capture, Needs
from hf_kdtl.models.forward.perturbations import Direction
from hf_kdtl.models.pairing import PairingPlan
from hf_kdtl.objectives.base import Batch, check_option
from hf_kdtl.objectives.derivatives import DerivativeObjective, Output, label_index
from hf_kdtl.objectives.embedding_jacobian import EMBEDDING, embedding_distance, embedding_projector, take_embedding
from hf_kdtl.objectives.embeddings import Projector
from hf_kdtl.objectives.estimators import Estimator, EstimatorChoice, check_estimator, choices_of, wanted_choices
from hf_kdtl.objectives.sketching import checked_sketch, sketching

CITATION = """@inproceedings{srinivas2018knowledge,
  title = {Knowledge Transfer with Jacobian Matching},
  author = {Suraj Srinivas and Francois Fleuret},
  booktitle = {ICML}, year = {2018}, eprint = {1803.00443}, archivePrefix = {arXiv}
}"""
# (distance, output) -> estimators, in the order of "auto". Everything else is refused with this table.
VALID = {
    **{("normalized", output): ("vjp", "split") for output in ("teacher_top1", "label")},
    **{("squared", output): ("vjp", "split", "finite_difference") for output in ("teacher_top1", "label")},
    ("squared", "projection"): ("vjp", "split"),
    **{(distance, "all"): ("finite_difference", "vjp") for distance in ("squared", "fisher", "softmax")},
}


def what_goes_with_what() -> str:
    """The table of distance, output and estimators, as text."""
    rows = [f"\n  {distance:<11} {output:<13} {', '.join(names)}" for (distance, output), names in VALID.items()]
    return f". What goes with what:\n  {'distance':<11} {'output':<13} estimators" + "".join(rows)


class Jacobian(DerivativeObjective):
    """Jacobian matching, per image: the distance of the input gradients of a class output, of student and teacher.

    g = d o_c / d x, by the student's pixels x; the teacher's re-normalisation and resizing are part of its function.

    normalized || g_S/||g_S|| - g_T/||g_T|| ||^2, in [0, 4]: the paper's practical loss. squared || g_S - g_T ||^2:
    what matching under small pixel noise amounts to (docs/jacobian_matching.md). fisher 1/2 sum_i p_T,i || grad log
    p_T,i - grad log p_S,i ||^2: for soft-max outputs, the one for `output: all`; what noise adds to KL(p_T || p_S)
    where p_S = p_T in value, and only there. softmax -sum_i <grad p_T,i, grad log p_S,i>: the paper's term of noisy
    cross-entropy, for comparison only: it is NOT 0 where student and teacher agree, has no lower bound, and from such
    a point it runs away.

    Args:
        distance: normalized | squared | fisher | softmax.
        output: which class c: teacher_top1 (the teacher's, for both) | label (an image without one counts 0) |
            projection (<v, o> with one random unit vector v per image, the same for both, times K: in expectation
            the full Jacobian) | all.
        of: the outputs o: logit (default) | logprob | centred | embedding. A raw logit's gradient sees a shift of all
            logits, which leaves the probabilities as they are; logprob and centred do not. fisher and softmax fix
            their own. embedding needs no classes: o_T = <t, u>, o_S = <P s, u> of the embeddings t and s, with
            u = t / ||t|| held constant; distance normalized or squared, by vjp or split.
        estimator: auto | vjp | split | finite_difference. auto takes vjp, and split where vjp is wrong (FSDP2,
            torch.compile); for output: all, finite_difference. vjp for output: all takes K backwards.
        central: central differences; in split, one instead of forward mode.
        step: of a difference: in pixels u ~ N(0, 1) times `step` (finite_difference), or its length (split).
        probes: random directions or projections that are averaged; one has a relative deviation of about 1.4.
        fraction: share of the images, in (0, 1], that take part.
        projector: P of `of: embedding`, as in `feature_kd`: mlp | linear | identity.
        sketch: r, to compare p = R (sigma * g) / sqrt(r) in place of g: r random projections, with signs sigma of the
            image's view. || p_S - p_T ||^2 is unbiased with a relative deviation of sqrt(2 / r); the normalized form
            is biased by O(1 / r). r numbers of the teacher can be stored (hf-kdtl cache); 64 is usual. [ours]

    Cost: arithmetic against a logit-KD step, of which 1.00 is the KD step itself (benchmarks/derivative_cost.py): vjp
        2.0, split 2.6, finite_difference 2.0 (central 3.0), vjp on a quarter of the images 1.3.

    Raises:
        ValueError: for options that do not go together, with the table of those that do; for an estimator that would
            be wrong in this setting, with the one to use; for one class; for integer pixels.

    Label: [paper], Srinivas & Fleuret 2018, arXiv 1803.00443; fisher, `of` and the estimators are [ours].
    """

    name = "jacobian"
    projector: nn.Module
    citation = CITATION

    def __init__(
        self,
        *,
        distance: Literal["normalized", "squared", "fisher", "softmax"] = "normalized",
        output: Output = "teacher_top1",
        of: Of | Literal["embedding"] | None = None,
        estimator: Estimator = "auto",
        central: bool = False,
        step: float | None = None,
        probes: int = 1,
        fraction: float = 1.0,
        projector: Projector = "mlp",
        sketch: int | None = None,
    ):
        super().__init__(fraction=fraction, probes=probes, estimator=estimator, central=central, step=step)
        distances, outputs = ({pair[i] for pair in VALID} for i in (0, 1))
        for option, value, known in (("distance", distance, distances), ("output", output, outputs)):
            check_option(self.name, option, value, value in known, " or ".join(sorted(known)))
        table = what_goes_with_what()
        valid = VALID.get((distance, output))
        fitting = " or ".join(d for d, o in VALID if o == output)
        check_option(self.name, "distance", distance, valid is not None, f"{fitting} with output {output!r}{table}")
        assert valid is not None
        check_estimator(self.name, estimator, central, step, valid, f" for {distance}, {output}{table}")
        fixed = distance in ("fisher", "softmax")
        kinds = (*OF, EMBEDDING)
        check_option(self.name, "of", of, of is None or of in kinds, " or ".join(kinds))
        check_option(self.name, "of", of, of is None or not fixed, f"nothing: {distance} is of probabilities")
        drawn = output == "projection" or self._wants(estimator, valid) == "finite_difference"
        check_option(self.name, "probes", probes, probes == 1 or drawn, f"1: {output} by {estimator} draws nothing")
        self.distance, self.output, self.of, self.valid = distance, output, of, valid
        self.sketch = checked_sketch(self.name, sketch, of, output, self._wants(estimator, valid))
        self.needs_index = sketch is not None  # its signs belong to the image's view
        self.divergence = distance != "softmax"
        self.needs_labels = output == "label"
        self.takes_soft_labels = output != "label"
        self.counts = "labelled" if output == "label" else "images"
        self.kind, self.projector = projector, nn.Identity()
        if of == EMBEDDING:
            take_embedding(self, projector)

    def build(self, plan: PairingPlan | None) -> None:
        if self.of == EMBEDDING:
            self.projector = embedding_projector(self.kind, plan)

    def needs(self, plan: PairingPlan | None) -> tuple[Needs, Needs]:
        more = Needs(pooled=self.of == EMBEDDING)
        student, teacher = super().needs(plan)
        if self.sketch is not None:
            teacher = Needs(logits=True, sketches=frozenset({self.sketch}), fraction=self.fraction)
        return student | more, teacher | more

    @staticmethod
    def _wants(estimator: str, valid: tuple[str, ...]) -> str:
        return valid[0] if estimator == "auto" else estimator

    def choices(self) -> tuple[EstimatorChoice, ...]:
        return wanted_choices(self.estimator, self.valid, self.central, self.step)

    def alternatives(self) -> tuple[EstimatorChoice, ...]:
        return choices_of(self.valid)

    def measure(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        if self.of == EMBEDDING:
            return embedding_distance(self, student, teacher)
        if self.output == "all":
            return self._all_classes(student, teacher, batch)
        picks, labelled = self._picks(student, teacher, batch)
        values = [self._one(student, teacher, pick, k, batch) for k, pick in enumerate(picks)]
        value = torch.stack(values).mean(0)
        return value if labelled is None else torch.where(labelled, value, 0.0)

    def _picks(
        self, student: Capture, teacher: Capture, batch: Batch
    ) -> tuple[list[Callable[[Tensor], Tensor]], Tensor | None]:
        """What makes a scalar of the outputs (b, K), one for each probe, and which images count."""
        if self.output == "projection":
            classes = student.logits.shape[-1]
            x = student.input_leaf()
            drawn = [batch["draws"].normal((classes,), f"projection-{k}", x.detach()) for k in range(self.probes)]
            # K ||.||^2 of the gradients is ||.||^2 of gradients times sqrt(K).
            vectors = [classes**0.5 * v / torch.linalg.vector_norm(v, dim=1, keepdim=True) for v in drawn]
            return [partial(_along, v) for v in vectors], None
        index, labelled = label_index(batch) if self.output == "label" else (teacher.logits.argmax(-1), None)
        repeats = self.probes if self.choice.estimator == "finite_difference" else 1
        return [lambda o: o.gather(1, index[:, None])[:, 0]] * repeats, labelled

    def _one(self, student: Capture, teacher: Capture, pick: Callable, probe: int, batch: Batch) -> Tensor:
        def quantity(logits: Tensor) -> Tensor:
            return pick(fd.scores(logits, self.of or "logit"))  # type: ignore[arg-type]  # "embedding" comes elsewhere

        if self.choice.estimator == "finite_difference":
            its = self.slope(teacher, quantity, probe, batch).detach()
            return (self.slope(student, quantity, probe, batch) - its).square()
        distance = fd.normalized if self.distance == "normalized" else fd.squared
        if self.sketch is not None:
            sketched, its = sketching(self.sketch, batch, student.input_leaf()), teacher.sketches[self.sketch]
            return self.matched(student, lambda c: quantity(c.logits), lambda j: distance(sketched(j), its))
        target = teacher.input_gradient(quantity(teacher.logits), create_graph=False)
        return self.matched(student, lambda c: quantity(c.logits), lambda j: distance(j, target))

    def _all_classes(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        of: dict[str, tuple[Any, Any]] = {
            "squared": (lambda z: fd.scores(z, self.of or "logit"),) * 2,  # type: ignore[arg-type]
            "fisher": (log_probabilities, log_probabilities),
            "softmax": (log_probabilities, lambda z: log_probabilities(z).exp()),
        }
        mine, its = of[self.distance]
        # In the differences' own precision, which autocast does not touch; as a rule it is the logits that are there.
        here = teacher.logits_at(Direction("normal", 0.0), batch["draws"])
        log_teacher = log_probabilities(here).detach()
        if self.choice.estimator == "vjp":
            pairs = [(_every_gradient(student, mine, True), _every_gradient(teacher, its, False))]
        else:
            pairs = [
                (self.slope(student, mine, k, batch)[:, :, None], self.slope(teacher, its, k, batch)[:, :, None])
                for k in range(self.probes)
            ]
        values = [fd.over_classes(s, t.detach(), log_teacher, self.distance) for s, t in pairs]
        return torch.stack(values).mean(0)


def _along(v: Tensor, outputs: Tensor) -> Tensor:
    return (outputs * v).sum(1)


def _every_gradient(model: Capture, quantity: Callable[[Tensor], Tensor], create_graph: bool) -> Tensor:
    """The gradients of all class outputs, (b, K, C h w): one backward a class."""
    outputs = quantity(model.logits).unbind(1)
    return torch.stack([model.input_gradient(o, create_graph).flatten(1) for o in outputs], dim=1)


class JacobianNorm(DerivativeObjective):
    """Jacobian-norm penalty, per image: || d o_y / d x ||^2 of the student alone, y the label. For robustness.

    An image without a label counts 0. Not a divergence: it pulls towards a flat function, and needs no teacher.

    Args:
        of: logprob (default) | logit | centred. A raw logit's norm can be lowered by a common shift of all logits,
            which changes no answer.
        estimator: auto | vjp | split | finite_difference, as in `jacobian`.
        central, step: of differences, as in `jacobian`.
        probes: directions that finite_difference averages.
        fraction: share of the images, in (0, 1], that take part.

    Cost: as `jacobian`, less the teacher.

    Raises:
        ValueError: as `jacobian`; for soft labels.

    Label: [paper], Srinivas & Fleuret 2018, arXiv 1803.00443; `of` is [ours].
    """

    name = "jacobian_norm"
    citation = CITATION
    divergence = False
    needs_teacher = False
    compares_classes = False
    needs_labels = True
    takes_soft_labels = False
    counts = "labelled"

    def __init__(
        self,
        *,
        of: Of = "logprob",
        estimator: Estimator = "auto",
        central: bool = False,
        step: float | None = None,
        probes: int = 1,
        fraction: float = 1.0,
    ):
        super().__init__(fraction=fraction, probes=probes, estimator=estimator, central=central, step=step)
        check_option(self.name, "of", of, of in OF, " or ".join(OF))
        check_estimator(self.name, estimator, central, step, VALID["squared", "label"])
        drawn = estimator == "finite_difference"
        check_option(self.name, "probes", probes, probes == 1 or drawn, f"1: {estimator} draws nothing")
        self.of = of

    def choices(self) -> tuple[EstimatorChoice, ...]:
        return wanted_choices(self.estimator, VALID["squared", "label"], self.central, self.step)

    def alternatives(self) -> tuple[EstimatorChoice, ...]:
        return choices_of(VALID["squared", "label"])

    def needs(self, plan):
        return super().needs(plan)[0], Needs()

    def measure(self, student: Capture, teacher: Capture, batch: Batch) -> Tensor:
        index, labelled = label_index(batch)

        def quantity(logits: Tensor) -> Tensor:
            return fd.scores(logits, self.of).gather(1, index[:, None])[:, 0]

        if self.choice.estimator == "finite_difference":
            slopes = [self.slope(student, quantity, k, batch) for k in range(self.probes)]
            value = torch.stack(slopes).square().mean(0)
        else:
            value = self.matched(student, lambda c: quantity(c.logits), lambda j: j.square().flatten(1).sum(1))
        return torch.where(labelled, value, 0.0)
