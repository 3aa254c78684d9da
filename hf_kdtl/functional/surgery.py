"""Two gradients into one, so that the transfer gradient does not work against the task gradient.

g is the gradient of the task and d the gradient of everything else, weighted; both complete: of the full optimizer
step, over all micro-batches and processes. A gradient is a list of tensors, one a parameter, None where there is none;
None counts as 0. Every rule gives a g + b d with numbers a and b that follow from <g, g>, <g, d> and <d, d> alone:

| rule | where <g, d> < 0 | elsewhere |
| --- | --- | --- |
| one_sided | g + d - (<g, d> / <g, g>) g | g + d |
| orthogonal | g + c (d - (<g, d> / <g, g>) g) | the same |
| pcgrad | g - (<g, d> / <d, d>) d + d - (<g, d> / <g, g>) g | g + d |

`scope` says whose inner products: "global" of all the tensors as one vector, "tensor" of each tensor for itself. A
tensor whose task gradient is 0 or absent keeps d, unscaled: there is nothing to protect.

Law of the first two: <g, result> >= <g, g>, whatever d is; with scope "tensor" for each tensor. It is a promise about
the gradient that the optimizer receives, on that batch. SGD without momentum keeps it for the step. Adam does not:
g = (1, .1) and d = (-2, 20) do not conflict, yet Adam's first step along g + d has <g, step> = -.9 times the rate.
Neither promises test accuracy.

Inner products and combination are float64: in float32 the law's error is 5e-3 at ||d|| / ||g|| = 1e4. On a device
without float64 they are computed on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

Gradient = Sequence[Tensor | None]
Scope = Literal["global", "tensor"]
Form = Literal["one_sided", "orthogonal", "pcgrad"]

_NO_FLOAT64 = ("mps",)


class Products(NamedTuple):
    """Inner products of the two gradients, in one tensor or summed over several."""

    task: float  # <g, g>
    both: float  # <g, d>
    transfer: float  # <d, d>

    @property
    def cosine(self) -> float:
        """<g, d> / (||g|| ||d||), in [-1, 1]; 0 where either is 0."""
        length = math.sqrt(self.task) * math.sqrt(self.transfer)
        return self.both / length if length else 0.0


class Ready(TypedDict, total=False):
    """What a rule may be given besides."""

    products: Sequence[Products] | None
    """`inner_products(task, transfer)`, where the caller has them already."""
    overwrite: bool
    """Put the result into d's tensors; where there is no d it is g's own tensor or a new one. g is never changed."""


class Conflict(NamedTuple):
    """How far the two gradients work against each other; see `conflict`."""

    cosine: float
    conflicting: float
    removed: float


def inner_products(task: Gradient, transfer: Gradient) -> list[Products]:
    """<g, g>, <g, d> and <d, d> of each tensor, in float64; 0 for what is absent.

    A rule takes them as `products`, so that a caller who logs them as well does not compute them twice.

    Cost: one reading of both gradients, float64 copies of one tensor at a time, and one wait for the device.

    Raises:
        ValueError: for lists of different lengths or a tensor of different shapes.

    >>> inner_products([torch.tensor([3.0, 4.0])], [torch.tensor([-1.0, 0.0])])
    [Products(task=25.0, both=-3.0, transfer=1.0)]
    """
    if len(task) != len(transfer):
        raise ValueError(
            f"{len(task)} task gradients and {len(transfer)} transfer gradients; expected one of each for the same "
            "parameters in the same order. Give None for a parameter without a gradient."
        )
    found: list[Tensor | None] = []
    for i, (g, d) in enumerate(zip(task, transfer, strict=True)):
        if g is not None and d is not None and g.shape != d.shape:
            raise ValueError(
                f"gradient {i} is {tuple(g.shape)} for the task and {tuple(d.shape)} for the transfer; expected the "
                "shape of one parameter. Give both lists in the order of the same parameters."
            )
        g, d = (None if x is None else _vector(x) for x in (g, d))
        found += [None if x is None or y is None else torch.dot(x, y) for x, y in ((g, g), (g, d), (d, d))]
    values = _read(found)
    return [Products(*values[i : i + 3]) for i in range(0, len(values), 3)]


def dot(x: Gradient, y: Gradient) -> float:
    """<x, y> of two lists of tensors as two vectors, in float64; 0 for what is absent. Cost: as `inner_products`.

    >>> dot([torch.tensor([3.0, 4.0]), None], [torch.tensor([-1.0, 0.0]), torch.ones(2)])
    -3.0
    """
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None]
    return sum(_read([torch.dot(_vector(a), _vector(b)) for a, b in pairs]))


def total(products: Sequence[Products]) -> Products:
    """The inner products of several tensors as one vector: those of a layer, or of all.

    >>> total([Products(25.0, -3.0, 1.0), Products(0.0, 0.0, 3.0)])
    Products(task=25.0, both=-3.0, transfer=4.0)
    """
    return Products(*(sum(column) for column in zip(*products, strict=True))) if products else Products(0.0, 0.0, 0.0)


def conflict(products: Sequence[Products], scope: Scope = "global", form: Form = "one_sided") -> Conflict:
    """What there is to log, of the tensors that have a task gradient (no rule touches the others).

    cosine: of g and d as two vectors, in [-1, 1]. conflicting: the share of the tensors with both gradients in which
    <g, d> < 0, in [0, 1]. removed: the length of the part of d along g that the rule takes out, over ||d||, in [0, 1];
    by "orthogonal" also where that part works for the task, and before its scaling by c. All are 0 without a d.

    Cost: none on the device.

    Raises:
        ValueError: for an unknown scope or form.

    >>> conflict(inner_products([torch.tensor([1.0, 0.0])], [torch.tensor([-3.0, 4.0])]))
    Conflict(cosine=-0.6, conflicting=1.0, removed=0.6)
    """
    _check("form", form, ("one_sided", "orthogonal", "pcgrad"))
    held = [p for p in products if p.task != 0]
    everything, shared = total(held), [p for p in held if p.transfer != 0]
    _check("scope", scope, ("global", "tensor"))
    groups = held if scope == "tensor" else [everything] if held else []
    removed = [p.both / p.task * p.both for p in groups if p.both < 0 or form == "orthogonal"]
    return Conflict(
        everything.cosine,
        sum(p.both < 0 for p in shared) / max(len(shared), 1),
        math.sqrt(sum(removed) / everything.transfer) if everything.transfer else 0.0,
    )


def one_sided(
    task: Gradient, transfer: Gradient, scope: Scope = "global", **ready: Unpack[Ready]
) -> list[Tensor | None]:
    """g + d where they agree; where they do not, d loses its part along g: g + d - (<g, d> / <g, g>) g.

    Args:
        task: g.
        transfer: d, in the same order, shapes, dtypes and devices.
        scope: of the inner products, "global" or "tensor".
        ready: products, overwrite; see `Ready`.

    Returns:
        one tensor a parameter; None where both are None. A tensor of either side is given back as it is where the
        result equals it. Where nothing conflicts it is the plain sum to the last bit.

    Cost: two readings of both gradients, float64 copies of one tensor at a time; without `overwrite` a third set of
    gradients.

    Raises:
        ValueError: for an unknown scope, lists of different lengths, or a tensor of different shapes.

    Source: Wan et al. 2019, arXiv 1911.07489, whose abstract it fits; the projection is that of A-GEM and PCGrad,
    applied to the regulariser alone [ours].

    >>> one_sided([torch.tensor([1.0, 0.0])], [torch.tensor([-3.0, 4.0])])
    [tensor([1.0000, 4.0000])]
    """
    return _apply(lambda p: (1 - min(p.both / p.task, 0.0), 1.0), task, transfer, scope, **ready)


def orthogonal(
    task: Gradient, transfer: Gradient, c: float, scope: Scope = "global", **ready: Unpack[Ready]
) -> list[Tensor | None]:
    """g + c (d - (<g, d> / <g, g>) g): of d only what is orthogonal to g, times c, whether they conflict or not.

    Args:
        c: >= 0; the paper's code takes alpha * decay^epoch with .1 and .99.
        the rest, the result and the cost: as in `one_sided`, but for the plain sum, which this never is.

    Raises:
        ValueError: for c below 0 or not finite, and as `one_sided`.

    Source: the code of Wan et al. 2019, arXiv 1911.07489 (GrOD in the journal) [paper].

    >>> orthogonal([torch.tensor([1.0, 0.0])], [torch.tensor([3.0, 4.0])], 0.5)
    [tensor([1.0000, 2.0000])]
    """
    if not 0 <= c < math.inf:
        raise ValueError(f"c is {c}; expected a finite number from 0, such as 0.1 * 0.99**epoch.")
    return _apply(lambda p: (1 - c * p.both / p.task, c), task, transfer, scope, **ready)


def pcgrad(task: Gradient, transfer: Gradient, scope: Scope = "global", **ready: Unpack[Ready]) -> list[Tensor | None]:
    """Each loses its part along the other where they conflict, and the two are added: the symmetric baseline.

    g - (<g, d> / <d, d>) d + d - (<g, d> / <g, g>) g. The task is not protected: where they conflict <g, result> is
    <g, g> (1 - cos^2), and 0 for opposite gradients.

    Args, the result, cost and errors: as in `one_sided`.

    Source: Yu et al. 2020, arXiv 2001.06782, for two gradients, of which no order needs to be drawn [ours].

    >>> pcgrad([torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])])  # (1/2, 1/2) + (0, 1)
    [tensor([0.5000, 1.5000])]
    """

    def weights(p: Products) -> tuple[float, float]:
        # A d so small that <d, d> is 0 has no conflict, for <g, d> would be about as small.
        conflicts = p.both < 0 and p.transfer > 0
        return (1 - p.both / p.task, 1 - p.both / p.transfer) if conflicts else (1.0, 1.0)

    return _apply(weights, task, transfer, scope, **ready)


def _apply(
    weights: Callable[[Products], tuple[float, float]],
    task: Gradient,
    transfer: Gradient,
    scope: Scope,
    products: Sequence[Products] | None = None,
    overwrite: bool = False,
) -> list[Tensor | None]:
    _check("scope", scope, ("global", "tensor"))
    products = inner_products(task, transfer) if products is None else products
    # Where g is 0 the rule leaves d alone, so that part of d is none of the rule's business.
    joint = total([p for p in products if p.task != 0])
    results: list[Tensor | None] = []
    for g, d, own in zip(task, transfer, products, strict=True):
        p = own if scope == "tensor" else joint
        # nan is not 0: it propagates to the result, where it is detected.
        a, b = weights(p) if own.task != 0 else (0.0, 1.0)
        if own.task != 0 and (a, b) != (1.0, 1.0) and p.transfer != 0:
            # The result is rounded to its dtype, an error of up to eps/2 ||result|| along g, which a short g feels:
            # 6e-4 of ||g|| at ||d|| / ||g|| = 1e4 in float32. As much of g on top, the law holds after the rounding.
            length = math.sqrt(max(a * a * p.task + 2 * a * b * p.both + b * b * p.transfer, 0.0))
            a += torch.finfo(_dtype(g, d)).eps / 2 * length / math.sqrt(p.task)
        results.append(_combine(g, d, a, b, overwrite))
    return results


def _combine(g: Tensor | None, d: Tensor | None, a: float, b: float, overwrite: bool) -> Tensor | None:
    """a g + b d."""
    if g is None or d is None or a == 0:  # one of them alone
        x, factor = (g, a) if d is None else (d, b)
        if x is None or factor == 1:
            return x
        result = _float64(x) * factor
    elif (a, b) == (1, 1):
        return d.add_(g) if overwrite else g + d
    else:
        x, result = d, (_float64(d) * b).add_(_float64(g), alpha=a)
    result = result.to(x.dtype).to(x.device)
    return result if d is None or not overwrite else d.copy_(result)


def _read(scalars: Sequence[Tensor | None]) -> list[float]:
    """The numbers, 0 for None; stacked before they are read, so that an accelerator is waited for once."""
    known = [x for x in scalars if x is not None]
    values = iter(torch.stack([x.to(known[0].device) for x in known]).tolist() if known else [])
    return [0.0 if x is None else next(values) for x in scalars]


def _float64(x: Tensor) -> Tensor:
    # Moved first: a device without float64 cannot convert either.
    return (x.cpu() if x.device.type in _NO_FLOAT64 else x).detach().double()


def _vector(x: Tensor) -> Tensor:
    return _float64(x).reshape(-1)


def _dtype(g: Tensor | None, d: Tensor | None) -> torch.dtype:
    x = d if g is None else g
    assert x is not None
    return x.dtype


def _check(what: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"{what} is {value!r}; expected {' or '.join(map(repr, valid))}.")
