"""Transfer by layers: each block learns from its own pair alone."""

import pytest
import torch

from hf_kdtl.gradient_rules import GRADIENT_RULES, GradientAccumulator
from tests.gradient_rules.small import Small
from tests.reference.surgery import layer_local


@pytest.mark.parametrize("apart", [False, True])
def test_layer_local_gives_each_block_its_own_pair_alone(apart):
    small = Small(torch.float64)
    task, transfer = small.terms(wrong=0.0, features=10.0, apart=apart)
    entries = {"features": list(zip(small.pairs["features"], transfer["features"], strict=True))}
    expected = layer_local(task, entries, small.blocks, small.own, small.parameters)
    window = small.window("layer_local")
    window.add(task, transfer, small.pairs)
    window.write(0)
    plain = dict(zip(expected, zip(*small.sides(wrong=0.0, features=10.0), strict=True), strict=True))
    for name, p in small.parameters:
        torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else p.grad, expected[name])
    # In the usual way the second pair's distance moves the first block too.
    first = "student.vit.layers.0.mlp.fc1.weight"
    both = dict(small.parameters)[first].grad - sum(plain[first])
    assert both.norm() > 0.1 * plain[first][1].norm()


def test_layer_local_walks_one_block_a_pair():
    small, walked = Small(), [0, 0]
    _, transfer = small.terms(wrong=0.0, features=1.0, apart=True)
    for block, hidden in enumerate(small.hidden):
        hidden.register_hook(lambda _, block=block: walked.__setitem__(block, walked[block] + 1))
    window = small.window("layer_local")
    window.add(None, transfer, small.pairs)
    assert walked == [1, 1]  # a walk from block 1 down to the pixels would meet block 0's output again
    window.write(0)
    names = {name for name, p in small.parameters if p.grad is not None}
    assert names == small.blocks[0] | small.blocks[1] | {"features.weight"}


def test_layer_local_leaves_frozen_blocks_alone():
    small = Small()
    for name, p in small.parameters:
        p.requires_grad_(".layers.0." not in name)
    window = small.window("layer_local")
    window.add(*small.terms(wrong=0.0, features=1.0), small.pairs)
    window.write(0)
    assert all(p.grad is None for n, p in small.modules.named_parameters() if ".layers.0." in n)
    assert any(p.grad is not None for n, p in small.parameters if ".layers.1." in n)


def test_layer_local_with_nothing_to_move():
    small = Small()
    for name, p in small.parameters:
        p.requires_grad_(".layers.0." not in name)
    window = small.window("layer_local")
    _, transfer = small.terms(wrong=0.0, features=1.0, apart=True)
    first, second = transfer["features"]
    # A frozen block of an objective without parameters, and a pair whose entry is a constant.
    window.add(None, {"wrong": [first, second.detach()]}, {"wrong": [0, 1]})
    window.write(0)
    assert all(p.grad is None for p in small.modules.parameters())


def test_layer_local_refuses_what_has_no_layers():
    small = Small()
    window = small.window("layer_local")
    task, transfer = small.terms(wrong=0.0, features=1.0)
    with pytest.raises(ValueError, match="term 'features' has 2 entries and 1 pairs of layers"):
        window.add(task, transfer, {"features": [0]})
    with pytest.raises(ValueError, match="none of the blocks' parameters is trained; expected names such as"):
        GradientAccumulator(GRADIENT_RULES["layer_local"](), small.parameters, ["x"] * 41, {0: ["vit.layers.0"]}, {})
