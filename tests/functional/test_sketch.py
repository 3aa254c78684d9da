"""Sketches of gradients: exact for an orthogonal R, unbiased, with an error of r^-1/2, and enough to train by."""

import torch

from hf_kdtl.functional.random import Draws
from hf_kdtl.functional.sketch import projection, signs, sketch


def pair(images=4, width=48):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, images, width, generator=generator, dtype=torch.float64)


def distance(g, h, matrix, sigma):
    return (sketch(g, matrix, sigma) - sketch(h, matrix, sigma)).square().sum(1)


def test_an_orthogonal_matrix_gives_the_exact_distance():
    g, h = pair()
    rows = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    sigma = signs(Draws(0, 0, tuple(range(4))), g)
    torch.testing.assert_close(distance(g, h, 48**0.5 * rows, sigma), (g - h).square().sum(1))


def test_it_is_unbiased_and_its_error_falls_with_the_root_of_r():
    g, h = pair(1, 64)
    exact, spread = (g - h).square().sum(), []
    for r in (4, 16, 64):
        sigma = signs(Draws(0, 0, tuple(range(4000))), g.expand(4000, -1))
        found = distance(g.expand(4000, -1), h.expand(4000, -1), projection(r, 64, 0), sigma) / exact
        assert abs(found.mean() - 1) < 4 * found.std() / 4000**0.5
        spread.append(float(found.std()))
        assert spread[-1] < 1.15 * (2 / r) ** 0.5
    slope = torch.tensor(spread).log2().diff().mean() / 2
    assert abs(slope + 0.5) < 0.05


def test_the_bits_of_a_teachers_sketch_do_not_depend_on_the_batch():
    g = pair(7, 3000)[0].float()
    draws, matrix = Draws(0, 0, tuple((v, 3) for v in range(7))), projection(16, 3000, 0)
    whole = sketch(g, matrix, signs(draws, g), by_image=True)
    some = torch.tensor([5, 2])
    assert torch.equal(sketch(g[some], matrix, signs(draws.permuted(some), g[some]), by_image=True), whole[some])
    torch.testing.assert_close(sketch(g, matrix, signs(draws, g)), whole, atol=1e-4, rtol=1e-4)


def trained(sigma_of_image, steps=3000, width=24, r=6):
    """|| g_S - g_T ||^2 over its start, of a linear student x -> w x trained through sketches."""
    w, target = pair(1, width).flatten(1)
    start = (w - target).square().sum()
    for step in range(steps):
        sigma = signs(Draws(0, 0, ((0, step % 200 if sigma_of_image else 0),)), w[None])
        difference = sketch((w - target)[None], projection(r, width, 0), sigma)[0]
        matrix = projection(r, width, 0).double() * sigma
        w = w - 0.1 * matrix.T @ difference / r**0.5
    return float((w - target).square().sum() / start)


def test_a_linear_student_reaches_the_full_gradient_and_without_signs_of_images_it_does_not():
    assert trained(True) < 1e-6
    assert trained(False) > 0.3
