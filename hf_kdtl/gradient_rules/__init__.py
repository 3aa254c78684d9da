"""Rules that combine the task and the transfer gradient. A new one is a class and a line in `GRADIENT_RULES`."""

from hf_kdtl.gradient_rules.accumulator import GradientAccumulator
from hf_kdtl.gradient_rules.base import GradientRule
from hf_kdtl.gradient_rules.rules import LayerLocal, NeverHurt, PCGrad

GRADIENT_RULES: dict[str, type[GradientRule]] = {
    "never_hurt": NeverHurt,
    "pcgrad": PCGrad,
    "layer_local": LayerLocal,
}

__all__ = ["GRADIENT_RULES", "GradientAccumulator", "GradientRule"]
