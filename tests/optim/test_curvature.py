"""Curvatures by a block's parameters are forward over forward; double reverse says the same, whatever the layers."""

import pytest
import torch

from hf_kdtl.functional.derivatives import differentiable
from hf_kdtl.functional.discrepancy import output_energy, parameter_curvature
from hf_kdtl.models.blocks import find_blocks
from hf_kdtl.models.forward.attention_hooks import run
from hf_kdtl.models.forward.block_calls import block_calls
from hf_kdtl.optim.discrepancies import _as_function
from tests.support.tiny import build


def by_double_reverse(block, parameters, inputs, v):
    theta = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    with differentiable(3):
        found = []
        for energy in output_energy(block(theta, *inputs)):
            g = torch.autograd.grad(energy, list(theta.values()), create_graph=True, allow_unused=True)
            along = sum((a * u).sum() for a, u in zip(g, v.values(), strict=True) if a is not None)
            h = torch.autograd.grad(along, list(theta.values()), retain_graph=True, allow_unused=True)
            found.append(sum((a * u).sum() for a, u in zip(h, v.values(), strict=True) if a is not None).abs())
    return torch.stack(found)


@pytest.mark.parametrize("name", ["vit", "swin", "convnext", "resnet", "bit", "efficientnet"])
def test_forward_over_forward_equals_double_reverse(name):
    model = build(name).double()
    last = len(find_blocks(model)) - 1
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    with block_calls(model, frozenset({last})) as calls, torch.no_grad():
        run(model, x)
    parameters = {n: p.detach() for n, p in calls[last].block.named_parameters()}
    inputs, block = _as_function(*calls[last], 2)
    torch.manual_seed(0)
    v = {n: torch.randint(0, 2, p.shape).double() * 2 - 1 for n, p in parameters.items()}
    got = parameter_curvature(block, parameters, inputs, v)
    assert got.min() > 0
    torch.testing.assert_close(got, by_double_reverse(block, parameters, inputs, v), rtol=1e-6, atol=0)
