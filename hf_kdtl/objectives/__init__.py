"""The terms a loss can be made of. A new one is a class and a line in `OBJECTIVES`."""

from hf_kdtl.objectives.attention import AttentionMap, Relation
from hf_kdtl.objectives.base import Batch, Objective
from hf_kdtl.objectives.dist import Dist
from hf_kdtl.objectives.features import AttentionTransfer, HiddenStates
from hf_kdtl.objectives.logits import DecoupledKD, LogitKD
from hf_kdtl.objectives.task import Task

OBJECTIVES: dict[str, type[Objective]] = {
    "task": Task,
    "logit_kd": LogitKD,
    "decoupled_kd": DecoupledKD,
    "dist": Dist,
    "attention_map": AttentionMap,
    "attention_transfer": AttentionTransfer,
    "hidden_states": HiddenStates,
    "relation": Relation,
}

__all__ = ["OBJECTIVES", "Batch", "Objective"]
