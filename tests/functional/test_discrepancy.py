"""Distributions, their JSD, and the energies that they are made of, against slow float64 references."""

import copy
import doctest
import math

import pytest
import torch
from torch.func import functional_call

from hf_kdtl.functional import discrepancy as fast
from tests.reference import discrepancy as slow
from tests.support.tiny import build


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_doctests():
    assert doctest.testmod(fast).failed == 0


def test_jsd_against_the_reference_and_inside_its_range():
    for seed in range(20):
        p = fast.distribution(random(3, 7, seed=seed).exp() ** 3)
        q = fast.distribution(random(3, 7, seed=seed + 100).exp() ** 3)
        d = fast.discrepancy(p, q)
        for i in range(3):
            assert d[i].item() == pytest.approx(slow.jsd(p[i], q[i]), abs=1e-12)
        assert (d >= 0).all() and (d <= math.log(2)).all()
        assert torch.equal(d, fast.discrepancy(q, p)), "symmetric"


def test_jsd_at_its_ends():
    p = torch.tensor([1.0, 0.0])
    assert fast.discrepancy(p, p).item() == 0
    assert fast.discrepancy(p, p.flip(0)).item() == pytest.approx(math.log(2), abs=1e-15)
    spread = fast.distribution(torch.rand(1000))
    assert fast.discrepancy(spread, spread).item() == 0


def test_float32_energies_give_no_noise_of_the_order_of_eps():
    """Entropies of 1000 places taken in float32 differ by 5e-7, which is eps."""
    energies = torch.rand(64, 1000) + 1
    nudged = energies * (1 + 1e-7 * torch.randn(64, 1000))
    d = fast.discrepancy(fast.distribution(energies), fast.distribution(nudged))
    assert d.max() < 1e-12


def test_distributions_of_any_scale():
    p = torch.tensor([1.0, 3.0])
    for scale in (1e-30, 1.0, 1e38):
        torch.testing.assert_close(fast.distribution(p * scale), torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert fast.distribution(torch.zeros(3)).isnan().all(), "no energy is no distribution"


def test_other_lengths_are_refused():
    with pytest.raises(ValueError, match="over 4 and 9 places"):
        fast.discrepancy(torch.ones(4) / 4, torch.ones(9) / 9)


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 4, 3, 2)])
def test_output_energy(shape):
    hidden = random(*shape)
    expected = torch.stack([slow.energy(h) for h in hidden])
    torch.testing.assert_close(fast.output_energy(hidden), expected)


def block_of(key):
    """A block in float64 and three inputs of it, for blocks that take their input alone."""
    model = build(key).double()
    if key == "vit":
        return model.vit.layers[1], random(3, 5, 32)
    if key == "resnet":
        return model.resnet.encoder.stages[1].layers[0], random(3, 16, 6, 6)
    return model.convnext.encoder.stages[1].layers[0], random(3, 32, 4, 4)


@pytest.mark.parametrize("key", ["vit", "convnext", "resnet"])
@pytest.mark.parametrize("source", ["jacobian", "hessian"])
def test_parameter_energies_against_the_reference(key, source, monkeypatch):
    block, inputs = block_of(key)
    parameters = {n: p.detach() for n, p in block.named_parameters()}
    v = {n: random(*p.shape, seed=i).sign() for i, (n, p) in enumerate(parameters.items())}

    def function(theta, images):
        output = functional_call(block, theta, (images,))
        return output[0] if isinstance(output, tuple) else output

    def compute():
        if source == "jacobian":
            return fast.parameter_gradient_energy(function, parameters, (inputs,))
        return fast.parameter_curvature(function, parameters, (inputs,), v)

    before = copy.deepcopy(block.state_dict())
    values = compute()
    expected = slow.parameter_energies(block, inputs, v if source == "hessian" else None)
    assert values.tolist() == pytest.approx(expected, rel=1e-10)
    monkeypatch.setattr(fast, "_HELD", 1)  # one image at a time
    torch.testing.assert_close(compute(), values, rtol=1e-12, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), block.state_dict().values(), strict=True))
    assert all(p.grad is None for p in block.parameters())


def test_curvature_on_a_quadratic():
    """e = mean_d (W x)_d^2: v' H v = 2 mean_d (V x)_d^2."""
    x, w, v = random(3, 4), random(2, 4), random(2, 4, seed=1)
    value = fast.parameter_curvature(lambda theta, x: (x @ theta["w"].T)[:, None], {"w": w}, (x,), {"w": v})
    torch.testing.assert_close(value, 2 * (x @ v.T).square().mean(1))


def test_input_energies_against_the_reference():
    model, x = build("vit").double(), random(2, 3, 32, 32).requires_grad_()
    v = random(2, 3, 32, 32, seed=2).sign()

    def energies(z):
        return [fast.output_energy(h) for h in model(pixel_values=z, output_hidden_states=True).hidden_states[1:]]

    seconds = fast.input_curvature_energies(energies, x, [(4, 4), (2, 2)], v)
    assert seconds[1].shape == (2, 4)
    first, second = fast.input_gradient_energy(energies(x)[0], x, (4, 4)), seconds[0]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for i in range(2):
            one = x[i : i + 1].detach().requires_grad_()
            e = slow.output_energy(model(pixel_values=one, output_hidden_states=True).hidden_states[1])
            (g,) = torch.autograd.grad(e, one, create_graph=True)
            torch.testing.assert_close(first[i], torch.stack(slow.patch_sums(g[0].detach(), (4, 4))))
            (h,) = torch.autograd.grad((g * v[i]).sum(), one)
            torch.testing.assert_close(second[i], torch.stack(slow.patch_sums(h[0], (4, 4))))


def test_row_energies_of_the_hessian_are_unbiased():
    """E (H v)_i^2 = sum_j H_ij^2, and the error falls as 1 / sqrt(probes)."""
    h = random(4, 4)
    h = h + h.T
    x = random(4096, 1, 1, 4).requires_grad_()
    v = random(4096, 1, 1, 4, seed=3).sign()
    (rows,) = fast.input_curvature_energies(lambda z: [0.5 * ((z[:, 0, 0] @ h) * z[:, 0, 0]).sum(1)], x, [(1, 4)], v)
    expected = h.square().sum(1)
    few, many = rows[:64].mean(0), rows.mean(0)
    assert (many - expected).norm() < 0.1 * expected.norm()
    assert (many - expected).norm() < 0.5 * (few - expected).norm()
