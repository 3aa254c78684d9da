"""Learning rates per layer: the layer of each tensor, how fast each layer learns, and the optimizer for it."""

from hf_kdtl.optim.factory import LayerwiseOptimizer, create_layerwise_optimizer
from hf_kdtl.optim.groups import group_table, layer_groups, parameter_layers
from hf_kdtl.optim.layer_rates import LayerRates
from hf_kdtl.optim.options import RateOptions

__all__ = [
    "LayerRates",
    "LayerwiseOptimizer",
    "RateOptions",
    "create_layerwise_optimizer",
    "group_table",
    "layer_groups",
    "parameter_layers",
]
