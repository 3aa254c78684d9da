"""Second derivatives by the pixels: Hessian-vector products and curvatures, one per image.

H_b is the Hessian of f_b with respect to x_b, of C h w rows; it is never built.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_kdtl.functional.derivatives import differentiable, input_gradient

Scalar = Callable[[Tensor], Tensor]
"""(B, C, h, w) -> (B,), image b's value from image b alone."""


def hvp(f: Scalar, x: Tensor, v: Tensor) -> Tensor:
    """H v of every image, with the shape of x. Differentiable by f's parameters.

    Args:
        f: the scalar of each image.
        x: (B, ...), the point.
        v: as x, the direction.

    Cost: one forward and two backwards; differentiated again, a logit-KD step becomes 4.1 of them. Exact, with math
    attention and composed layer norms (set here); single process and DDP. A piecewise linear
    net (ReLU) has H = 0 almost everywhere.

    >>> hvp(lambda x: (x**3).sum(1), torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]]))  # diag(6 x) v
    tensor([[ 6., 12.]], grad_fn=<MulBackward0>)
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad(), differentiable(3):
        return hvp_of(f(x), x, v)


def hvp_of(output: Tensor, x: Tensor, v: Tensor, create_graph: bool = True) -> Tensor:
    """H v of an output (B,) that was computed from x inside `differentiable(3)`: double reverse mode."""
    return product(input_gradient(output, x), x, v, create_graph)


def product(gradient: Tensor, x: Tensor, v: Tensor, create_graph: bool = True) -> Tensor:
    """H v from the gradient by x, with its graph: several v share it."""
    along = (gradient * v).flatten(1).sum(1)
    if not along.requires_grad:  # linear in x
        return torch.zeros_like(x)
    (found,) = torch.autograd.grad(along.sum(), x, create_graph=create_graph, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if found is None else found


def curvature(f: Scalar, x: Tensor, v: Tensor) -> Tensor:
    """v' H v of every image, (B,). For v of independent -1 and 1 its mean is the trace of H.

    Cost: as `hvp`.
    """
    return (hvp(f, x, v) * v).flatten(1).sum(1)


def second_quotient(ahead: Tensor, here: Tensor, behind: Tensor, step: float) -> Tensor:
    """v' H v to O(step^2), (B,), from f at x + step v, x and x - step v: (ahead + behind - 2 here) / step^2.

    In float32 the rounding error is about 2e-7 |f| / step^2. All three must be of the same dropout masks.
    """
    return ((ahead - here) + (behind - here)) / step**2
