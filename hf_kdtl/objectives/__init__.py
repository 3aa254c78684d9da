"""The terms a loss can be made of. A new one is a class and a line in `OBJECTIVES`."""

from hf_kdtl.objectives.attention import AttentionMap, Relation
from hf_kdtl.objectives.attention_jacobian import AttentionJacobian
from hf_kdtl.objectives.base import Batch, Objective
from hf_kdtl.objectives.bregman import Bregman
from hf_kdtl.objectives.dist import Dist
from hf_kdtl.objectives.embeddings import FeatureKD, Similarity
from hf_kdtl.objectives.features import AttentionTransfer, HiddenStates
from hf_kdtl.objectives.hessian import Hessian
from hf_kdtl.objectives.jacobian import Jacobian, JacobianNorm
from hf_kdtl.objectives.logits import DecoupledKD, LogitKD
from hf_kdtl.objectives.lwf import LwF
from hf_kdtl.objectives.noise import NoisyKD
from hf_kdtl.objectives.regularizers import BSS, L2SP, Delta
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
    "feature_kd": FeatureKD,
    "similarity": Similarity,
    "jacobian": Jacobian,
    "attention_jacobian": AttentionJacobian,
    "jacobian_norm": JacobianNorm,
    "hessian": Hessian,
    "noisy_kd": NoisyKD,
    "lwf": LwF,
    "l2_sp": L2SP,
    "delta": Delta,
    "bss": BSS,
    "bregman": Bregman,
}

__all__ = ["OBJECTIVES", "Batch", "Objective"]
