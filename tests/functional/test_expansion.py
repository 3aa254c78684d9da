"""What input noise adds to a loss: Proposition 1 of Jacobian matching, numerically, and the fisher distance.

`python tests/functional/test_expansion.py` prints the figures.
"""

import torch
from torch.func import hessian, jacrev

from hf_kdtl.functional.derivatives import input_gradient, over_classes, scores
from tests.functional.smooth import INPUTS, SHAPE, Smooth, images, slope

SIGMA = 0.1


def _models():
    return Smooth(seed=0), Smooth(seed=1)


def _noise(number, seed=0):
    """Pairs xi, -xi: what is odd in the noise cancels, and the second order is seen with fewer draws."""
    half = torch.randn(number // 2, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([half, -half])


def squared_figures(sigma=SIGMA, draws=1_000_000):
    """E sum_i (T^i - S^i)^2 at x + xi, xi ~ N(0, sigma^2 I), by Monte-Carlo, and its expansion to sigma^2.

    The paper has value + sigma^2 sum_i ||grad T^i - grad S^i||^2. For smooth nets there is one more term of the same
    order, sigma^2 sum_i (T^i - S^i) (lap T^i - lap S^i).

    Returns:
        plain: the value without noise; noisy: E by Monte-Carlo, with its standard error; paper: the expansion with the
        gradients' term alone; complete: with the Laplacians' term too.
    """
    student, teacher = _models()
    x = images(1)

    def difference(one):
        return teacher.logits(one)[0] - student.logits(one)[0]

    with torch.no_grad():
        d = difference(x)
        xi = sigma * _noise(draws)
        each = (teacher.logits(x + xi) - student.logits(x + xi)).square().sum(1).unflatten(0, (2, -1)).mean(0)
        gradients = jacrev(lambda flat: difference(flat.reshape(1, *SHAPE)))(x.flatten())
        laplacians = hessian(lambda flat: difference(flat.reshape(1, *SHAPE)))(x.flatten()).diagonal(0, 1, 2).sum(1)
        plain = d.square().sum()
        paper = plain + sigma**2 * gradients.square().sum()
        complete = paper + sigma**2 * (d * laplacians).sum()
    figures = {"plain": plain, "noisy": each.mean(), "error": each.std() / len(each) ** 0.5}
    return {k: float(v) for k, v in (figures | {"paper": paper, "complete": complete}).items()}


def kl_figures(sigma=0.05, draws=200_000):
    """What noise adds to KL(p_T || p_S) where S = T in value but not in slope: sigma^2 times the fisher distance.

    There p_T = p_S at x (the logits' difference is taken off the teacher's), so the divergence's first derivative is
    0 and its second is the fisher metric: 1/2 sum_i p_i (v' (grad log p_T,i - grad log p_S,i))^2 and nothing else.
    """
    student, teacher = _models()
    x = images(1)
    with torch.no_grad():
        offset = student.logits(x) - teacher.logits(x)
        xi = sigma * _noise(draws)
        log_t = torch.log_softmax(teacher.logits(x + xi) + offset, 1)
        log_s = torch.log_softmax(student.logits(x + xi), 1)
        each = (log_t.exp() * (log_t - log_s)).sum(1).unflatten(0, (2, -1)).mean(0) / sigma**2
    leaf = x.clone().requires_grad_()
    found = []
    for logits in (student.logits(leaf), teacher.logits(leaf) + offset):
        log_p = scores(logits, "logprob")
        found.append(torch.stack([input_gradient(log_p[:, k], leaf).flatten(1) for k in range(log_p.shape[1])], 1))
    fisher = over_classes(found[0], found[1], log_p.detach(), "fisher")
    error = each.std() / len(each) ** 0.5
    return {"noise": float(each.mean()), "error": float(error), "fisher": float(fisher.detach())}


def test_noise_on_the_squared_error_is_the_gradients_term_and_the_laplacians_term():
    found = squared_figures(draws=200_000)
    assert abs(found["noisy"] - found["complete"]) < 3 * found["error"]
    assert abs(found["noisy"] - found["paper"]) > 30 * found["error"]
    # What is left over is of the next order, sigma^4. The same noise at every sigma: its sampling error, a multiple
    # of sigma^2, is measured at a small one and taken off.
    rest = {s: (f := squared_figures(s, 20_000))["noisy"] - f["complete"] for s in (0.01, 0.1, 0.2, 0.4)}
    left = {s: abs(r - rest[0.01] * (s / 0.01) ** 2) for s, r in rest.items() if s > 0.01}
    assert abs(slope(list(left), list(left.values())) - 4) < 0.3


def test_the_fisher_distance_is_what_noise_adds_to_the_divergence():
    found = kl_figures()
    assert abs(found["noise"] - found["fisher"]) < 3 * found["error"] + 0.02 * found["fisher"]


def test_the_laplacian_is_the_trace_of_the_hessian_that_probes_estimate():
    """E v' H v = tr H: the term that the paper leaves out could be had from `hessian.curvature`."""
    from hf_kdtl.functional.hessian import curvature

    student, x = Smooth(), images(1)
    h = hessian(lambda flat: student.logits(flat.reshape(1, *SHAPE))[0, 0])(x.flatten())
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * INPUTS).reshape(-1, *SHAPE)
    every = curvature(lambda z: student.logits(z)[:, 0], x.expand(len(signs), *SHAPE), signs)
    torch.testing.assert_close(every.mean(), h.trace(), rtol=1e-9, atol=1e-11)


if __name__ == "__main__":
    print(f"squared error, sigma {SIGMA}:", squared_figures())
    print("KL(p_T || p_S), over sigma^2:", kl_figures())
