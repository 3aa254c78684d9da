"""Gradient rules the slow, obvious way: one long vector, or one a tensor, number by number as exact fractions."""

from fractions import Fraction

import torch


def dot(x, y):
    return sum((a * b for a, b in zip(x, y, strict=True)), Fraction(0))


def combine(task, transfer, rule, scope, c=None):
    """float64 results; None as a list of zeros. `rule` is one_sided, orthogonal or pcgrad."""
    g, d = (
        [None if x is None else [Fraction(v) for v in x.double().flatten().tolist()] for x in s]
        for s in (task, transfer)
    )
    g, d = zip(
        *(((a or [0] * len(b or [])), (b or [0] * len(a or []))) for a, b in zip(g, d, strict=True)), strict=True
    )
    groups = [[i] for i in range(len(g))] if scope == "tensor" else [list(range(len(g)))]
    results = [None] * len(g)
    for group in groups:
        protected = [i for i in group if any(g[i])]
        long_g = [v for i in protected for v in g[i]]
        long_d = [v for i in protected for v in d[i]]
        for i in set(group) - set(protected):
            results[i] = d[i]
        if not protected:
            continue
        both = dot(long_g, long_d)
        square_g = dot(long_g, long_g)
        along_g = [v * both / square_g for v in long_g]
        if rule == "orthogonal":
            long = [a + Fraction(c) * (b - p) for a, b, p in zip(long_g, long_d, along_g, strict=True)]
        elif both >= 0:
            long = [a + b for a, b in zip(long_g, long_d, strict=True)]
        else:
            long = [a + b - p for a, b, p in zip(long_g, long_d, along_g, strict=True)]
            if rule == "pcgrad":
                square = dot(long_d, long_d)
                long = [v - b * both / square for v, b in zip(long, long_d, strict=True)]
        for i in protected:
            results[i], long = long[: len(g[i])], long[len(g[i]) :]
    return [torch.tensor([float(v) for v in r], dtype=torch.float64) for r in results]


def layer_local(task, terms, blocks, own, parameters):
    """name -> gradient of the task, plus that of every entry of a term whose block, or objective, holds the name.

    terms: key -> [(block, scalar)].
    """
    results = {}
    for name, parameter in parameters:
        mine = [e for key, entries in terms.items() for b, e in entries if name in blocks[b] or name in own[key]]
        parts = [torch.autograd.grad(x, parameter, retain_graph=True, allow_unused=True)[0] for x in (task, *mine)]
        results[name] = sum((x for x in parts if x is not None), torch.zeros_like(parameter))
    return results
