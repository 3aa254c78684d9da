"""Attention the slow, obvious way: probabilities, one number at a time, with every N x N matrix written out."""

import torch

from tests.reference.features import align_tokens, average, redistribute


def attention(query, key, scale, bias=None):
    """softmax(scale Q K' + bias), (B, H, Nq, Nk), from the exponentials themselves."""
    images, heads, queries, _ = query.shape
    keys = key.shape[2]
    if bias is not None:
        bias = bias.expand(images, heads, queries, keys)
    rows = []
    for b, h, q in _places(images, heads, queries):
        powers = []
        for k in range(keys):
            score = scale * (query[b, h, q] * key[b, h, k]).sum()
            powers.append(torch.exp(score if bias is None else score + bias[b, h, q, k]))
        rows.append(torch.stack([p / sum(powers) for p in powers]))
    return torch.stack(rows).reshape(images, heads, queries, keys)


def mean_heads(p):
    return (sum(p[:, h] for h in range(p.shape[1])) / p.shape[1])[:, None]


def align_columns(p, keep, prefix, grid_from, grid_to):
    images, heads, queries, _ = p.shape
    rows = []
    for b, h, q in _places(images, heads, queries):
        row = [*(p[b, h, q, i] for i in keep), *redistribute(p[b, h, q, prefix:], grid_from, grid_to)]
        rows.append(torch.stack([v / sum(row) for v in row]))
    return torch.stack(rows).reshape(images, heads, queries, -1)


def align_rows(p, keep, prefix, grid_from, grid_to):
    images, heads, _, columns = p.shape
    matrices = [align_tokens(p[b, h], keep, prefix, grid_from, grid_to) for b, h, _ in _places(images, heads, 1)]
    return torch.stack(matrices).reshape(images, heads, -1, columns)


def row_divergence(p_student, p_teacher, distance="kl"):
    images, heads, queries, columns = p_student.shape
    values = []
    for b in range(images):
        total = 0.0
        for _, h, q in _places(1, heads, queries):
            for s, t in zip(p_student[b, h, q], p_teacher[b, h, q], strict=True):
                total = total + (t * (torch.log(t) - torch.log(s)) if distance == "kl" else (s - t) ** 2 / columns)
        values.append(total / (heads * queries))
    return torch.stack(values)


def relation_heads(x, heads):
    """Token by token: write the heads one after another, then cut."""
    images, old_heads, tokens, _ = x.shape
    result = []
    for b in range(images):
        lines = [[v for h in range(old_heads) for v in x[b, h, n]] for n in range(tokens)]
        size = len(lines[0]) // heads
        cut = [torch.stack([torch.stack(line[r * size : (r + 1) * size]) for line in lines]) for r in range(heads)]
        result.append(torch.stack(cut))
    return torch.stack(result)


def relation(student, teacher, heads, keep_s, keep_t, prefix_s, prefix_t, grid_s, grid_t):
    """From unaligned tokens: prefixes kept by index, the teacher's patches averaged on the student's grid."""
    maps = []
    for x, keep, prefix, grid in ((student, keep_s, prefix_s, grid_s), (teacher, keep_t, prefix_t, grid_t)):
        x = relation_heads(x, heads)
        tokens = torch.stack([x[:, :, i] for i in keep], 2) if keep else x[:, :, :0]
        patches = torch.stack([torch.stack([average(m, grid, grid_s) for m in image[:, prefix:]]) for image in x])
        x = torch.cat([tokens, patches], 2)
        maps.append(attention(x, x, 1 / x.shape[-1] ** 0.5))
    return row_divergence(*maps)


def _places(*sizes):
    return ((a, b, c) for a in range(sizes[0]) for b in range(sizes[1]) for c in range(sizes[2]))
