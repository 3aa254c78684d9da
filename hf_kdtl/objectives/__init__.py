"""The terms a loss can be made of. A new one is a class and a line in `OBJECTIVES`."""

from hf_kdtl.objectives.base import Batch, Objective
from hf_kdtl.objectives.logits import LogitKD
from hf_kdtl.objectives.task import Task

OBJECTIVES: dict[str, type[Objective]] = {
    "task": Task,
    "logit_kd": LogitKD,
}

__all__ = ["OBJECTIVES", "Batch", "Objective"]
