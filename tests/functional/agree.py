"""The comparison of a fast path with its slow reference."""

import torch


def assert_agree(fast, slow, *tensors, atol=1e-10):
    """Same value and same gradient in float64, to `atol`, under a random weighting of the results."""
    results = []
    for function in (fast, slow):
        leaves = [t.detach().double().clone().requires_grad_() for t in tensors]
        value = function(*leaves)
        weights = torch.linspace(0.5, 2.0, value.numel(), dtype=torch.float64).reshape(value.shape)
        gradients = torch.autograd.grad((weights * value).sum(), leaves, allow_unused=True)
        results.append([value, *(torch.zeros(()) if g is None else g for g in gradients)])
    assert results[0][0].dtype == torch.float64
    assert any(g.abs().max() > 1e-6 for g in results[0][1:]), "nothing to compare: no gradient"
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=atol)


def randn(*shape, seed=0):
    """N(0, 1) in float64, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the number of elements of every tensor that an operation gives, forward and backward."""

    def __init__(self):
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        storages = (x.untyped_storage().nbytes() for x in _tensors(result))
        self.made += list(storages)
        return result


def _tensors(x):
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for part in x:
            yield from _tensors(part)
