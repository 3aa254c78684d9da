"""Slow references of the objectives on embeddings: float64, image by image, token by token."""

import math

import torch

SAMPLE = 16


def sample_pixels(like):
    """The sample that tests/objectives/test_laws.py lets an objective read."""
    return torch.randn(SAMPLE, *like.shape[1:], generator=torch.Generator().manual_seed(4)).to(like)


def _tokens(model, pixel_values):
    return model.vit(pixel_values=pixel_values).last_hidden_state


def _cos(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / (a.norm() * b.norm())


def _moments(vectors, standardize):
    """mean and scale, each (D,), of a list of vectors."""
    x = torch.stack(vectors)
    if standardize == "none":
        return torch.zeros_like(x[0]), torch.ones_like(x[0])
    mean = x.sum(0) / len(x)
    covariance = (x - mean).T @ (x - mean) / len(x)
    if standardize == "channel":
        return mean, covariance.diagonal().sqrt()
    return mean, torch.linalg.eigvalsh(covariance).mean().sqrt() * torch.ones_like(mean)


def feature_kd(student, teacher, pixel_values, labels, *, projectors, standardize="isotropic", patch_weight=1.0,
               projector="mlp", sample=1024):  # fmt: skip
    seen = _tokens(teacher, sample_pixels(pixel_values)).detach()
    mean, scale = _moments([image[0] for image in seen], standardize)
    patch_mean, patch_scale = _moments([token for image in seen for token in image[1:]], standardize)
    values = []
    for mine, its in zip(_tokens(student, pixel_values), _tokens(teacher, pixel_values).detach(), strict=True):
        value = 1 - _cos(projectors[0](mine[0]), (its[0] - mean) / scale)
        for s, t in zip(mine[1:], its[1:], strict=True) if patch_weight else ():
            s, t = projectors[1](s), (t - patch_mean) / patch_scale
            rough = [0.5 * d * d if abs(d) < 1 else abs(d) - 0.5 for d in (s - t)]
            part = 0.9 * (1 - _cos(s, t)) + 0.1 * sum(rough) / len(rough)
            value = value + patch_weight * part / (len(its) - 1)
        values.append(value)
    return torch.stack(values)


def _kl(mine, its, temperature):
    """KL of two lists of cosines, the teacher's first."""
    totals = [sum(math.e ** (x / temperature) for x in side) for side in (mine, its)]
    value = 0
    for s, t in zip(mine, its, strict=True):
        p, q = math.e ** (t / temperature) / totals[1], math.e ** (s / temperature) / totals[0]
        value = value + p * (p.log() - q.log())
    return value


def similarity(student, teacher, pixel_values, labels, *, projectors, bank=SAMPLE, temperature=0.07, local_weight=1.0,
               projector="mlp", left_out=None):  # fmt: skip
    entries = _tokens(teacher, sample_pixels(pixel_values)).detach()[:, 0][:bank]
    values = []
    pairs = zip(_tokens(student, pixel_values), _tokens(teacher, pixel_values).detach(), strict=True)
    for i, (mine, its) in enumerate(pairs):
        kept = [b for j, b in enumerate(entries) if left_out is None or left_out[i] != j]
        p = projectors[0](mine[0])
        value = _kl([_cos(p, b) for b in kept], [_cos(its[0], b) for b in kept], temperature)
        for n in range(1, len(its)) if local_weight else ():
            others = [m for m in range(1, len(its)) if m != n]
            sides = ([_cos(x[n], x[m]) for m in others] for x in (mine, its))
            value = value + local_weight * _kl(*sides, temperature) / (len(its) - 1)
        values.append(value)
    return torch.stack(values)


EMBEDDINGS = {"feature_kd": feature_kd, "similarity": similarity}
