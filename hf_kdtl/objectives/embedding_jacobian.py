"""Jacobian matching of embeddings, which needs no class outputs: `of: embedding` of `jacobian`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_kdtl.functional import derivatives as fd
from hf_kdtl.functional.features import unit
from hf_kdtl.functional.resample import precise
from hf_kdtl.models.forward.capture import Capture
from hf_kdtl.models.pairing import PairingPlan
from hf_kdtl.objectives.base import check_option
from hf_kdtl.objectives.embeddings import check_projector, make_projector

EMBEDDING = "embedding"


def take_embedding(objective: Any, projector: Any) -> None:
    """Let a `jacobian` compare embeddings in place of class outputs.

    Raises:
        ValueError: for options that do not fit.
    """
    check_projector(objective.name, projector)
    for option, value, valid, expected in (
        ("output", objective.output, objective.output == "teacher_top1", "nothing: of='embedding' has no classes"),
        ("estimator", objective.estimator, objective.estimator != "finite_difference", "auto, vjp or split"),
    ):
        check_option(objective.name, option, value, valid, expected)
    objective.compares_classes = objective.of_classes = False
    objective.needs_plan, objective.valid, objective.divergence = True, ("vjp", "split"), projector == "identity"


def embedding_projector(kind: Any, plan: PairingPlan | None) -> nn.Module:
    """P of <P s, u>. Raises ValueError as `make_projector`, and without a teacher."""
    if plan is None:
        raise ValueError("it compares with a teacher's embedding, and there is no teacher.")
    return make_projector(kind, plan.student.pooled, plan.teacher.pooled, "embedding")


def embedding_distance(objective: Any, student: Capture, teacher: Capture) -> Tensor:
    """The distance of d <t, u> / dx and d <P s, u> / dx, u = t / ||t|| held constant, (b,)."""
    assert teacher.pooled is not None
    its = precise(teacher.pooled)
    u = unit(its.detach())
    target = teacher.input_gradient((its * u).sum(1), create_graph=False)
    distance = fd.normalized if objective.distance == "normalized" else fd.squared

    def scalar(captured: Capture) -> Tensor:
        return (precise(objective.projector(captured.pooled)) * u).sum(1)

    return objective.matched(student, scalar, lambda j: distance(j, target))
