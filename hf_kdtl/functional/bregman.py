"""Principal components in the geometry of a layer's transfer function.

A layer gives y_i = f(a_i), f = grad F (`links`). The model is y_i ~ f(V c_i + m) with k directions V (d, k) and the
mean m = f^-1(mean_i y_i), fitted to the least sum_i D_F(V c_i + m, f^-1(y_i)). With the identity it is ordinary PCA;
with soft-max the divergence is KL(y_i || f(V c_i + m)) in nats, and every reconstruction is a distribution.

The coefficients of given directions are a convex problem, row by row, solved to its optimum (`encode`). So the
divergence is a function of V alone, with the gradient sum_i (f(a_i) - y_i) c_i' at those optima, and is lowered by
quasi-Newton steps, one full pass over the rows each.

Source: Amid, Anil, Fifty, Warmuth 2022, arXiv 2209.07080: the model, the mean and the conjugate normalisation
[paper]; the start, the elimination of c and the steps are [ours].

>>> y = torch.tensor([[0.0, 0.0], [2.0, 2.0], [4.0, 4.0]])
>>> fit(y, 1, "identity").directions.T  # the diagonal, of length 1
tensor([[0.7071, 0.7071]], dtype=torch.float64)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_kdtl.functional.bregman_data import RANK, Data, Rows
from hf_kdtl.functional.links import Link, checked, coefficients, conjugate, find, pairs, pieces, symmetric

_MEMORY = 8


@dataclass(frozen=True)
class Representation:
    """The fitted layer c -> f(V c + m). Everything in float64.

    Args:
        link: f.
        mean: m, (d,), before f.
        directions: V, (d, k), with V' H V = I for H the Hessian of F at m. The coefficients' second moments are
            uncorrelated and fall with the column; the largest entry of a column is positive.
        spectrum: (k,), mean_i c_ij^2. With the identity the variance along the direction (divided by n).
        divergence: mean over the rows of the fitted data, >= 0; nats for soft-max and sigmoid.
        baseline: the same with k = 0, the mean alone.
    """

    link: Link
    mean: Tensor
    directions: Tensor
    spectrum: Tensor
    divergence: float
    baseline: float

    @property
    def explained(self) -> float:
        """The share of the divergence from the mean that the directions take away, in [0, 1]."""
        return 1 - self.divergence / self.baseline

    def encode(self, y: Tensor) -> Tensor:
        """The coefficients of least divergence, (n, d) -> (n, k).

        An output at the edge of the range can have its optimum at infinity; it then gets finite coefficients whose
        gradient is below 1e-9.

        Cost: n (d k^2 / 2 + k^3) for each of about 5 to 25 Newton steps; 32 MB at a time.

        Raises:
            ValueError: for rows that are not (n, d), not finite, or outside the link's range.
            RuntimeError: where a row's gradient stays above 1e-6 of its size.
        """
        y = checked(y, self.link, len(self.mean)).to(self.mean.device)
        parts = pieces(y, self.directions.shape[1])
        return torch.cat([coefficients(self.link, self.directions, self.mean, part, strict=True) for part in parts])

    def decode(self, c: Tensor) -> Tensor:
        """f(V c + m), (n, k) -> (n, d)."""
        return self.link.f(c.to(self.mean) @ self.directions.T + self.mean)


Callback = Callable[[int, Representation], None]


def fit(
    y: Rows,
    k: int | float,
    link: str | Link,
    *,
    tolerance: float = 1e-6,
    passes: int = 200,
    start: Tensor | None = None,
    callback: Callback | None = None,
) -> Representation:
    """Directions of least divergence.

    Not a convex problem but for the identity: another start can end elsewhere. The default start is a good one, random
    ones are not. On soft-max outputs of a classifier of 10 classes six random starts each for k = 1, 2 and 4 ended at
    explained shares of up to 10.6 points less than its, and at most 0.2 points more.

    Args:
        y: (n, d) outputs of the layer; or something that gives batches (b, d) each time that it is iterated, such as a
            list or a DataLoader: the rows are then never held together. Same rows at every pass; in the same order it
            is faster. Computed on the device of the rows.
        k: the number of directions; or, as a float below 1, the share of the divergence to explain: the smallest k
            that does.
        link: identity, softmax, tanh, sigmoid or leaky_relu, or a Link.
        tolerance: stop when a step promises or brings less than this share of the baseline.
        passes: over the data, at most, for one k.
        start: (d, k) directions to begin with, to go on with an earlier fit; by default the principal components of
            y - mean in the metric of the Hessian at m, which for the identity are the solution.
        callback: called with the pass and the representation so far, after each that lowered the divergence.

    Cost: two passes for mean, range and start, then some 5 to 50 of n d k^2 multiplications for each Newton step of
    the coefficients, of which most rows need two. Memory: 3 d^2 + d k^2 / 2 + 16 d k numbers, n k of half size for the
    coefficients to begin the next pass with, and 32 MB pieces.

    Raises:
        ValueError: for data that are empty, not (n, d), not finite or outside the link's range; for an iterator that
            cannot be read again; for a column whose mean lies at the edge of the range; for k above the rank; for
            relu and gelu.
        RuntimeError: when a pass gives other rows than the one before.
    """
    link = find(link)
    data = Data(y, link)
    _check_k(k, data)
    if isinstance(k, int):
        return _fit(data, k, tolerance, passes, start, callback)
    if start is not None:
        raise ValueError("start gives the number of directions, and k a share of the divergence; give one of them.")
    # Doubled until it is enough, then halved in between: a small k is the cheap one.
    low, high = 0, 1
    while (found := _fit(data, high, tolerance, passes, None, callback)).explained < k:
        if high == data.rank:
            raise ValueError(
                f"all {high} directions explain {found.explained:.6f} of the divergence, below k = {k}; give a "
                "smaller share or a smaller tolerance."
            )
        low, high = high, min(2 * high, data.rank)
    while high - low > 1:
        middle = _fit(data, (low + high) // 2, tolerance, passes, None, callback)
        if middle.explained < k:
            low = middle.directions.shape[1]
        else:
            found, high = middle, middle.directions.shape[1]
    return found


@dataclass
class _Pass:
    """The statistics of one pass over the rows for directions V: divergence, gradient, curvature and moments of c."""

    divergence: float
    gradient: Tensor  # (d, k)
    curvature: Tensor  # (d, k, k)
    moments: Tensor  # (k, k)


def _fit(data: Data, k: int, tolerance: float, passes: int, start: Tensor | None, callback) -> Representation:
    if k > data.rank:
        raise ValueError(
            f"k is {k}; the {data.rows} rows of {data.width} numbers have pre-activations that differ from the mean's "
            f"in {data.rank} directions (to {RANK:g} of the largest). Give k from 1 to {data.rank}."
        )
    if start is not None and start.shape != (data.width, k):
        raise ValueError(f"start is {tuple(start.shape)}; expected (d, k) = ({data.width}, {k}).")
    link, m = data.link, data.mean
    hints: dict[int, Tensor] = {}
    directions = conjugate(link, m, data.start(k) if start is None else start.to(m))
    here = _run(data, directions, hints)
    history: list[tuple[Tensor, Tensor]] = []
    for step in range(passes):
        if callback is not None:
            callback(step, _representation(data, directions, here))
        found = _step(data, directions, here, history, hints, tolerance)
        if found is None and history:
            history = []  # the curvature guessed from earlier steps misled: once more without
            found = _step(data, directions, here, history, hints, tolerance)
        if found is None:
            break
        move, there = found
        history = [*history, (move, there.gradient - here.gradient)][-_MEMORY:]
        gained, directions, here = here.divergence - there.divergence, directions + move, there
        if gained <= tolerance * data.baseline:
            break
    return _representation(data, directions, here)


def _step(data, directions, here, history, hints, tolerance) -> tuple[Tensor, _Pass] | None:
    """A step that lowers the divergence, and the pass at its end; None where there is none worth the pass."""
    towards = -_quasi_newton(here, history)
    towards = towards - data.link.f(data.mean) @ towards if data.link.coupled else towards
    promised = -(towards * here.gradient).sum().item()
    if not promised > tolerance * data.baseline:
        return None
    for halvings in range(10):
        move = towards / 2**halvings
        there = _run(data, directions + move, hints)
        if there.divergence <= here.divergence - 1e-4 * promised / 2**halvings:
            return move, there
    return None


def _run(data: Data, directions: Tensor, hints: dict[int, Tensor]) -> _Pass:
    link, m = data.link, data.mean
    d, k = directions.shape
    divergence, gradient = 0.0, torch.zeros_like(directions)
    moments, curvature = gradient.new_zeros(k, k), gradient.new_zeros(d, k * (k + 1) // 2)
    for i, y in enumerate(data.parts(k)):
        c = coefficients(link, directions, m, y, hints.get(i))
        hints[i] = c.float()  # only to begin with, the problem is convex
        a = c @ directions.T + m
        slope = link.slope(a)
        if link.coupled:  # diag(p) - p p' lies below diag(p) and below twice its own diagonal
            slope = slope * (2 * (1 - slope)).clamp(max=1)
        divergence += link.divergence(a, y).sum().item()
        gradient += (link.f(a) - y).T @ c
        curvature += slope.T @ pairs(c)
        moments += c.T @ c
    n = data.rows
    return _Pass(divergence / n, gradient / n, symmetric(curvature / n, k), moments / n)


def _quasi_newton(here: _Pass, history: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The inverse Hessian, from earlier steps (L-BFGS) and each output's own curvature, times the gradient."""
    q, used = here.gradient, []
    for step, change in reversed(history):
        if (curved := (step * change).sum()) > 0:
            share = (step * q).sum() / curved
            q = q - share * change
            used.append((step, change, curved, share))
    trace = here.curvature.diagonal(dim1=-2, dim2=-1).mean(-1).max()
    floor = (1e-10 * trace + torch.finfo(q.dtype).tiny) * torch.eye(q.shape[1], dtype=q.dtype, device=q.device)
    q = torch.linalg.solve(here.curvature + floor, q.unsqueeze(-1)).squeeze(-1)
    for step, change, curved, share in reversed(used):
        q = q + step * (share - (change * q).sum() / curved)
    return q


def _representation(data: Data, directions: Tensor, here: _Pass) -> Representation:
    link, m = data.link, data.mean
    fixed = conjugate(link, m, directions)
    # V c = fixed c', with c' = fixed' H V c.
    change = fixed.T @ link.hessian(m, directions.T).T
    moments = change @ here.moments @ change.T
    spectrum, turn = torch.linalg.eigh((moments + moments.T) / 2)
    fixed = fixed @ turn.flip(1)
    largest = fixed.gather(0, fixed.abs().argmax(0, keepdim=True))
    return Representation(
        link, m, fixed * torch.where(largest < 0, -1.0, 1.0), spectrum.flip(0), here.divergence, data.baseline
    )


def _check_k(k: int | float, data: Data) -> None:
    number = isinstance(k, int) and not isinstance(k, bool) and k >= 1
    share = isinstance(k, float) and 0 < k < 1
    if not number and not share:
        raise ValueError(f"k is {k!r}; expected a number of directions from 1 to {data.rank}, or a share below 1.")
