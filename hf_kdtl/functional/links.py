"""Transfer functions f = grad F that are strictly monotone, and what is computed in the geometry of one of them.

A layer gives y = f(a) from its pre-activations a, over the last axis. Everything is computed from y, which a layer may
have rounded to the edge of its range (a probability of 0, a tanh of 1) where a is not finite; so the divergence takes
y and never f^-1(y). All in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.special import xlog1py, xlogy

Map = Callable[[Tensor], Tensor]

_HELD = 2**22  # numbers in one temporary tensor: 32 MB
_GRADIENT = 1e-9  # of a row's coefficients, relative to that at the mean where this is above 1
_NEWTON = 200
_LOG2 = 0.6931471805599453


@dataclass(frozen=True)
class Link:
    """One transfer function. a, y and v are (..., d).

    Args:
        name: of the link.
        f: a -> y = grad F(a).
        inverse: y -> a; infinite at the edge of the range. Of soft-max, whose f does not see a common shift, the a
            that sums to 0.
        potential: F, a -> (...).
        divergence: a, y -> (...), D_F(a, f^-1(y)) = F(a) - F(f^-1(y)) - <y, a - f^-1(y)>, >= 0, and 0 where f(a) = y.
        slope: a -> (..., d), the diagonal part of the Hessian of F.
        range: what values y may take, in words.
        inside: y -> (...) booleans: which rows lie in the range, its edge included.
        coupled: the Hessian is diag(p) - p p' with p the slope, not diagonal (soft-max).
    """

    name: str
    f: Map
    inverse: Map
    potential: Map
    divergence: Callable[[Tensor, Tensor], Tensor]
    slope: Map
    range: str
    inside: Map
    coupled: bool = False

    def hessian(self, a: Tensor, v: Tensor) -> Tensor:
        """H v, with H the Hessian of F at a. Semi-definite: positive but for soft-max along 1, where H 1 = 0."""
        slope = self.slope(a)
        product = slope * v
        return product - slope * product.sum(-1, keepdim=True) if self.coupled else product


def leaky_relu(slope: float = 0.01) -> Link:
    """f(a) = a above 0 and slope a below: the link of torch's leaky_relu with the same slope.

    Raises:
        ValueError: for a slope that is not positive and finite. 0 would be ReLU, which is not strictly monotone.
    """
    if not 0 < slope < float("inf"):
        raise ValueError(f"the slope of leaky_relu is {slope}; expected a finite number above 0, such as 0.01.")

    def inverse(y: Tensor) -> Tensor:
        return torch.where(y > 0, y, y / slope)

    def at(a: Tensor) -> Tensor:
        return torch.where(a > 0, torch.ones_like(a), slope)

    def divergence(a: Tensor, y: Tensor) -> Tensor:
        # On one side of 0 it is a square; across 0 no term is negative. Neither cancels.
        b = inverse(y)
        across = (at(a) * a.square() + at(b) * b.square()) / 2 - y * a
        return torch.where((a > 0) == (y > 0), at(a) * (a - b).square() / 2, across).sum(-1)

    return Link(
        name="leaky_relu",
        f=lambda a: at(a) * a,
        inverse=inverse,
        potential=lambda a: (at(a) * a.square()).sum(-1) / 2,
        divergence=divergence,
        slope=at,
        range="finite numbers",
        inside=lambda y: y.isfinite().all(-1),
    )


def _centred(a: Tensor) -> Tensor:
    # Over the finite ones, so that a probability of 0 makes its own entry infinite and no other.
    return a - a.where(a.isfinite(), torch.nan).nanmean(-1, keepdim=True)


def _softplus(a: Tensor) -> Tensor:
    return torch.logaddexp(a, torch.zeros_like(a))


def _entropy(p: Tensor) -> Tensor:
    """p log p + (1 - p) log(1 - p)."""
    return xlogy(p, p) + xlog1py(1 - p, -p)


def _tanh_divergence(a: Tensor, y: Tensor) -> Tensor:
    # log cosh a = |a| + log(1 + exp(-2 |a|)) - log 2, and F at f^-1(y) is taken through its conjugate, finite at 1.
    size = a.abs()
    conjugate = (xlog1py(1 + y, y) + xlog1py(1 - y, -y)) / 2
    return (size - y * a + _softplus(-2 * size) + (conjugate - _LOG2)).clamp(min=0).sum(-1)


LINKS: dict[str, Link] = {
    link.name: link
    for link in (
        Link(
            name="identity",
            f=lambda a: a,
            inverse=lambda y: y,
            potential=lambda a: a.square().sum(-1) / 2,
            divergence=lambda a, y: (a - y).square().sum(-1) / 2,
            slope=torch.ones_like,
            range="finite numbers",
            inside=lambda y: y.isfinite().all(-1),
        ),
        Link(
            name="softmax",
            f=lambda a: a.softmax(-1),
            inverse=lambda y: _centred(y.log()),
            potential=lambda a: a.logsumexp(-1),
            divergence=lambda a, y: (xlogy(y, y) - y * a.log_softmax(-1)).sum(-1).clamp(min=0),
            slope=lambda a: a.softmax(-1),
            range="probabilities that sum to 1 (to 1e-3)",
            inside=lambda y: (y >= 0).all(-1) & ((y.sum(-1) - 1).abs() <= 1e-3),
            coupled=True,
        ),
        Link(
            name="tanh",
            f=torch.tanh,
            inverse=torch.atanh,
            potential=lambda a: (a.abs() + _softplus(-2 * a.abs()) - _LOG2).sum(-1),
            divergence=_tanh_divergence,
            # 1 - tanh^2 without the difference, which is 0 from |a| = 19 on.
            slope=lambda a: 4 * torch.sigmoid(2 * a) * torch.sigmoid(-2 * a),
            range="numbers from -1 to 1",
            inside=lambda y: (y.abs() <= 1).all(-1),
        ),
        Link(
            name="sigmoid",
            f=torch.sigmoid,
            inverse=torch.logit,
            potential=lambda a: _softplus(a).sum(-1),
            divergence=lambda a, y: (_softplus(a) - y * a + _entropy(y)).clamp(min=0).sum(-1),
            slope=lambda a: torch.sigmoid(a) * torch.sigmoid(-a),
            range="numbers from 0 to 1",
            inside=lambda y: ((y >= 0) & (y <= 1)).all(-1),
        ),
        leaky_relu(),
    )
}

_FLAT = {
    "relu": "it maps all negative numbers to 0, so outputs have no unique pre-activation. Use 'leaky_relu' on a layer "
    "that has it, or 'identity' on the layer's outputs",
    "gelu": "it falls before it rises, so one output has two pre-activations. Use 'identity' on the layer's outputs",
}


def find(link: str | Link) -> Link:
    """The link of this name, or the link itself.

    Raises:
        ValueError: for an unknown name, and for relu and gelu, which are not strictly monotone.

    >>> find("softmax").f(torch.tensor([0.0, 0.0]))
    tensor([0.5000, 0.5000])
    """
    if isinstance(link, Link):
        return link
    if link in _FLAT:
        raise ValueError(f"link {link!r} is not strictly monotone: {_FLAT[link]}.")
    if link not in LINKS:
        raise ValueError(f"link is {link!r}; expected {', '.join(map(repr, LINKS))}, or leaky_relu(slope).")
    return LINKS[link]


def checked(y: Tensor, link: Link, width: int) -> Tensor:
    """Outputs y (n, d) of a layer, in float64; of soft-max with sum 1 to the last bit.

    Args:
        width: d, or 0 for any.

    Raises:
        ValueError: for another shape, nan, or rows outside the link's range.
    """
    if not isinstance(y, Tensor) or y.ndim != 2 or (width and y.shape[1] != width):
        found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"y is {found}; expected a tensor (n, {width or 'd'}), one row an output of the layer.")
    y = y.detach().double()
    for what, bad in (("nan", y.isnan().any(-1)), (f"outside the range of {link.name!r}", ~link.inside(y))):
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"{int(bad.sum())} of {len(y)} rows are {what}, such as row {row}, from {y[row].min():.6g} to "
                f"{y[row].max():.6g} with sum {y[row].sum():.6g}; expected {link.range}. Give the layer's outputs, "
                "not its pre-activations, in float32 or better."
            )
    return y / y.sum(-1, keepdim=True) if link.coupled else y


def conjugate(link: Link, m: Tensor, directions: Tensor) -> Tensor:
    """V R^-1 with V' H V = R' R, so that V' H V = I: the same span, (d, k) -> (d, k). H is the Hessian of F at m.

    QR of a root of H times V, whose error does not grow with the square of V's condition. Of soft-max, where H 1 = 0,
    the columns come out with f(m)' V = 0: a rare class, whose entry is large, then leaves the others small.

    Raises:
        ValueError: for directions that are linearly dependent in this metric.
    """
    slope = link.slope(m)
    for _ in range(2):  # the second time for what rounding left
        if link.coupled:  # diag(p) - p p' = A'A with A = diag(sqrt p) (I - 1 p')
            directions = directions - slope @ directions
        r = torch.linalg.qr(slope.sqrt()[:, None] * directions).R
        pivots = r.diagonal().abs()
        if not pivots.min() > 1e-12 * pivots.max():
            raise ValueError(
                "the directions are linearly dependent in the metric of the mean; start from others, or take fewer."
            )
        directions = torch.linalg.solve_triangular(r, directions, upper=True, left=False)
    return directions


def coefficients(
    link: Link, directions: Tensor, m: Tensor, y: Tensor, hint: Tensor | None = None, strict: bool = False
) -> Tensor:
    """argmin_c D_F(V c + m, f^-1(y)) for each row, (n, d) -> (n, k): damped Newton steps, of the rows that need more.

    Args:
        hint: coefficients to begin with, by default 0. The problem is convex: they change the cost, not the result.
        strict: whether a row that does not get there is an error.

    Raises:
        RuntimeError: when strict and a row's gradient is not below 1e-6 (relative to that at m where it is above 1).
    """
    c = y.new_zeros(len(y), k := directions.shape[1])
    if hint is not None and hint.shape == c.shape:  # of other directions it can lie in a flat tail: 0 is then better
        better = link.divergence(hint.to(y) @ directions.T + m, y) < link.divergence(m, y)
        c = torch.where(better[:, None], hint.to(y), c)
    small = _GRADIENT * ((link.f(m) - y) @ directions).norm(dim=1).clamp(min=1)
    left, eye = torch.arange(len(y), device=y.device), torch.eye(k, dtype=y.dtype, device=y.device)
    damping = torch.full_like(small, 1e-6)
    products = pairs(directions)
    for _ in range(_NEWTON):
        a = c[left] @ directions.T + m
        gradient = (link.f(a) - y[left]) @ directions
        size = gradient.norm(dim=1)
        more = size > small[left]
        left, a, gradient, size = left[more], a[more], gradient[more], size[more]
        if not len(left):
            return c
        slope = link.slope(a)
        hessian = symmetric(slope @ products, k)
        if link.coupled:
            average = slope @ directions
            hessian = hessian - average[:, :, None] * average[:, None, :]
        # Damped in proportion to the gradient: the end stays quadratic, and a flat tail is left in finite steps. A
        # step of a matrix that is singular all the same is not finite, and the next one is damped more.
        hessian = hessian + (damping[left] * size)[:, None, None] * eye
        step = -torch.linalg.solve_ex(hessian, gradient.unsqueeze(-1)).result.squeeze(-1)
        here, ahead = (link.divergence(x, y[left]) for x in (a, a + step @ directions.T))
        promised = -(step * gradient).sum(1)
        good = ahead <= here - 1e-4 * promised + 1e-14 * (1 + here)  # the last is rounding
        c[left[good]] += step[good]
        damping[left] = torch.where(good, damping[left] / 10, damping[left] * 30).clamp(min=1e-9)
    if strict and (lost := int((size > 1e3 * small[left]).sum())):
        raise RuntimeError(
            f"{lost} of {len(y)} rows did not reach their best coefficients in {_NEWTON} Newton steps; look for "
            "outputs many orders larger than the rest, or take fewer directions."
        )
    return c


def pieces(y: Tensor, k: int) -> tuple[Tensor, ...]:
    """Rows (n, d) in pieces of at most 32 MB that leave room for k^2 numbers each."""
    return y.split(max(1, _HELD // max(y.shape[1], k * k, 1)))


def pairs(x: Tensor) -> Tensor:
    """Products of two columns, each pair once: (n, k) -> (n, k (k + 1) / 2)."""
    i, j = torch.tril_indices(x.shape[1], x.shape[1], device=x.device)
    return x[:, i] * x[:, j]


def symmetric(products: Tensor, k: int) -> Tensor:
    """(n, k (k + 1) / 2) -> symmetric (n, k, k)."""
    i, j = torch.tril_indices(k, k, device=products.device)
    result = products.new_empty(len(products), k, k)
    result[:, i, j] = result[:, j, i] = products
    return result
