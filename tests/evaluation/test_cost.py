import torch

from hf_kdtl.evaluation.cost import images_per_second, parameters
from tests.tiny import build


def test_parameters_count_shared_ones_once():
    layer = torch.nn.Linear(3, 2)
    assert parameters(torch.nn.Sequential(layer, layer)) == 8


def test_a_deeper_model_is_slower_and_modes_are_kept():
    small, large = build("vit", layers=1).train(), build("vit", layers=12)
    pixels = torch.randn(16, 3, 32, 32)
    speed = images_per_second({"small": (small, pixels), "large": (large, pixels)}, repeats=3)
    assert speed["small"] > 2 * speed["large"] > 0
    assert small.training and not large.training
