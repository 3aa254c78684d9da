"""First derivatives by the pixels: how they are taken, and what may be matched of them. One value per image.

x is (B, C, h, w) and j = d o / d x the gradient of one scalar per image. An estimator gives phi(j), a value per image,
whose gradient by the model's parameters is right: `vjp` and `split` exactly, finite differences to the order of their
step. Nothing here touches a `param.grad`.

| estimator | cost beyond the forward | kernels | parallelism |
| --- | --- | --- | --- |
| vjp | one backward, then a backward through both | math attention | one process, DDP |
| split, forward mode | one backward, one forward twice as dear | math attention, composed layer norm | also FSDP2 |
| split, central difference | one backward, two forwards, float32 | any | also FSDP2, torch.compile |
| finite difference | one forward a direction (two if central), float32 | any | all |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hf_kdtl.functional import closed_forms
from hf_kdtl.functional.divergences import log_probabilities
from hf_kdtl.functional.features import unit
from hf_kdtl.functional.resample import precise

Of = Literal["logit", "logprob", "centred"]
OF = ("logit", "logprob", "centred")


def scores(logits: Tensor, of: Of = "logit") -> Tensor:
    """The outputs o that are differentiated, (B, K) -> (B, K).

    logit z; logprob log softmax(z); centred z - mean_k z. A shift of all logits by s(x) leaves the probabilities as
    they are and changes the gradient of a raw logit; the other two do not see it.

    >>> scores(torch.tensor([[1.0, 3.0]]), "centred")
    tensor([[-1.,  1.]])
    """
    if of == "logprob":
        return log_probabilities(logits, 1.0)
    logits = precise(logits)
    return logits - logits.mean(-1, keepdim=True) if of == "centred" else logits


def math_attention() -> AbstractContextManager[Any]:
    """Inside: scaled_dot_product_attention as elementary operations. The fused kernels have no second derivative and
    no forward mode."""
    return sdpa_kernel(SDPBackend.MATH)


class Replaced(TorchFunctionMode):
    """Inside: functions of torch run as others of the same value, whose derivatives are right and cheap."""

    def __init__(self, replaced: dict[Callable, Callable]):
        super().__init__()
        self.replaced = replaced

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.replaced.get(func, func)(*args, **(kwargs or {}))


PATCHES: dict[Callable, Callable] = {torch.conv2d: closed_forms.conv2d}
GELU: dict[Callable, Callable] = {F.gelu: closed_forms.gelu}
HARD_SIGMOID: dict[Callable, Callable] = {F.hardsigmoid: closed_forms.hardsigmoid}
LAYER_NORM: dict[Callable, Callable] = dict.fromkeys((F.layer_norm, torch.layer_norm), closed_forms.layer_norm)


@contextmanager
def differentiable(order: int) -> Iterator[None]:
    """Around a forward of which derivatives up to `order` are taken in reverse mode.

    From 2: math attention. From 3: composed layer norm, since torch 2.13 gives the third derivative of F.layer_norm
    (the gradient of a Hessian product) wrong, silently; tests/functional/test_hessian.py watches for the fix. The
    rest of closed_forms.py makes them cheaper.
    """
    replaced = PATCHES | (GELU | HARD_SIGMOID if order >= 2 else {}) | (LAYER_NORM if order >= 3 else {})
    with math_attention() if order >= 2 else nullcontext(), Replaced(replaced) if order else nullcontext():
        yield


@contextmanager
def transformable() -> Iterator[None]:
    """Around a forward inside transforms of torch.func: math attention, composed layer norm, torch's own GELU."""
    with math_attention(), Replaced(LAYER_NORM | HARD_SIGMOID):
        yield


def _linear_map(func, input, weight, bias=None, *args, **kwargs):
    value, slope = forward_ad.unpack_dual(input)
    result = func(value, weight, bias, *args, **kwargs)
    return result if slope is None else forward_ad.make_dual(result, func(slope, weight, None, *args, **kwargs))


FORWARD_MODE: dict[Callable, Callable] = {
    F.layer_norm: closed_forms.layer_norm_with_slope,
    torch.layer_norm: closed_forms.layer_norm_with_slope,
    F.linear: partial(_linear_map, F.linear),
    torch.conv2d: partial(_linear_map, closed_forms.conv2d),
    **HARD_SIGMOID,
}
"""Inside a forward-mode derivative by the pixels: layers whose slope is written out.

torch 2.13 gives a wrong gradient through a forward-mode derivative of F.layer_norm, silently (relative error 0.3 to
1.0; tests/functional/test_derivatives.py watches for the fix). It would also multiply by the slopes of weights, which
are 0 here: a tenth of the step's arithmetic. Under autocast a layer's slope takes the layer's precision, as its
value does.
"""


def input_gradient(output: Tensor, x: Tensor, create_graph: bool = True) -> Tensor:
    """d output_b / d x_b of every image, (B,) and (B, ...) -> (B, ...).

    One backward for the batch: image b's output must not depend on another image. `param.grad` is left alone. With
    `create_graph` the result can be differentiated again, by the parameters or by x; the graph is kept either way.

    Cost: one backward. Exact wherever the forward's kernels have the derivatives; the second one needs
    `math_attention` around the forward, and is silently lost under FSDP2.

    Raises:
        ValueError: when the output does not depend on x through a graph.
    """
    gradient = None
    if output.requires_grad:
        (gradient,) = torch.autograd.grad(
            output.sum(), x, create_graph=create_graph, retain_graph=True, allow_unused=True
        )
    if gradient is None:
        raise ValueError(
            "there is no gradient path from the output to the pixels: the model ran under no_grad, gives cached "
            "outputs, or is quantised by operations without a derivative. Load it unquantised and run it live, or use "
            "noisy_kd, which takes no gradient."
        )
    return gradient


def directional(f: Callable[[Tensor], Tensor], x: Tensor, u: Tensor) -> Tensor:
    """d/dt f(x + t u) at t = 0, in forward mode, with the shape of f(x): (B,) or (B, K).

    Differentiable by f's parameters: layer norms are composed for it, attention runs its math kernel.

    Cost: one forward that carries two numbers for each. Not under gradient checkpointing or torch.compile.
    """
    # torch.func, not autograd.forward_ad: there the attention's softmax overwrites what its own backward kept.
    with math_attention(), Replaced(FORWARD_MODE):
        return torch.func.jvp(f, (x.detach(),), (u,))[1]


def central_difference(f: Callable[[Tensor], Tensor], x: Tensor, u: Tensor, step: float) -> Tensor:
    """d/dt f(x + t u) at t = 0, to O(step^2): ||u|| (f(x + step w) - f(x - step w)) / (2 step), w = u / ||u||.

    Cost: two forwards, by any kernel. In float32 the error has a floor of about 1e-7 |f| / step: keep autocast off.
    """
    flat = u.flatten(1)
    shift = step * unit(flat).reshape(u.shape)
    difference = (f(x.detach() + shift) - f(x.detach() - shift)) / (2 * step)
    length = torch.linalg.vector_norm(flat, dim=1)
    return difference * length.reshape(-1, *[1] * (difference.ndim - 1))


Phi = Callable[[Tensor], Tensor]
"""A function of gradients, (B, C, h, w) -> (B,), image by image."""


def vjp(phi: Phi, output: Tensor, x: Tensor) -> Tensor:
    """phi(j), (B,), by reverse over reverse: exact in value and gradient.

    Args:
        phi: of the gradient.
        output: (B,), from a forward of `x` inside `math_attention`.
    """
    return phi(input_gradient(output, x))


def split(phi: Phi, output: Tensor, x: Tensor, directional: Callable[[Tensor], Tensor]) -> Tensor:
    """phi(j), (B,), whose gradient needs no double backward.

    With u = d phi / d j held constant, d phi(j) / d theta = d/d theta <u, j(theta)>, and <u, j> is the derivative of
    the output along u. Exact for any phi that depends on theta through j alone.

    Args:
        phi: of the gradient.
        output: (B,), from a forward of `x` by any kernel.
        directional: u -> (B,), the derivative of the same output along u, differentiable by the parameters, under the
            same dropout masks.
    """
    j = input_gradient(output, x, create_graph=False).requires_grad_()
    value = phi(j)
    (u,) = torch.autograd.grad(value.sum(), j)
    surrogate = directional(u)
    return value.detach() + (surrogate - surrogate.detach())


def normalized(a: Tensor, b: Tensor) -> Tensor:
    """|| a/||a|| - b/||b|| ||^2 per image, (B, ...) -> (B,), in [0, 4]. A zero gradient's unit vector is 0.

    >>> normalized(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[6.0, 8.0], [0.0, 2.0]]))
    tensor([0., 1.])
    """
    return (unit(precise(a).flatten(1)) - unit(precise(b).flatten(1))).square().sum(1)


def squared(a: Tensor, b: Tensor) -> Tensor:
    """|| a - b ||^2 per image, (B, ...) -> (B,)."""
    return (precise(a) - precise(b)).square().flatten(1).sum(1)


def over_classes(student: Tensor, teacher: Tensor, log_teacher: Tensor, distance: str) -> Tensor:
    """A distance summed over the classes, of derivatives (B, K, M): M = 1 along one direction, or all of x.

    squared: sum_i || s_i - t_i ||^2, of outputs. fisher: 1/2 sum_i p_T,i || s_i - t_i ||^2, of log-probabilities: the
    noise expansion of KL(p_T || p_S), kept complete to be bounded. softmax: - sum_i <t_i, s_i>, where t is of
    probabilities and s of log-probabilities; not 0 at S = T, and unbounded below.

    Args:
        log_teacher: (B, K) log p_T.
    """
    if distance == "softmax":
        return -(student * teacher).sum((1, 2))
    each = (student - teacher).square().sum(2)
    return each.sum(1) if distance == "squared" else 0.5 * (log_teacher.exp() * each).sum(1)
