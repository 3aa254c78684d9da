"""One slow, obvious function per objective: image by image, class by class, float64, differentiable by autograd.

Signature: (student, teacher, pixel_values, labels, **options) -> (B,) per image, or a scalar for a batch statistic.
"""

import math

import torch


def _logits(model, pixel_values):
    return [model(pixel_values=image[None]).logits[0] for image in pixel_values]


def _softmax(z, temperature=1.0):
    largest = max(float(v) for v in z)
    powers = [torch.exp((v - largest) / temperature) for v in z]
    return [p / sum(powers) for p in powers]


def _kl(p, q):
    return sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q, strict=True))


def task(student, teacher, pixel_values, labels, label_smoothing=0.0):
    losses = []
    for z, label in zip(_logits(student, pixel_values), labels, strict=True):
        classes = len(z)
        if (label == -100).all():
            losses.append(0.0 * z.sum())
            continue
        target = [float(k == label) for k in range(classes)] if label.ndim == 0 else [float(v) for v in label]
        target = [(1 - label_smoothing) * t + label_smoothing / classes for t in target]
        losses.append(-sum(t * torch.log(p) for t, p in zip(target, _softmax(z), strict=True)))
    return torch.stack(losses)


def logit_kd(
    student,
    teacher,
    pixel_values,
    labels,
    temperature=4.0,
    direction="forward",
    beta=0.5,
    standardize=False,
    hard=False,
):
    losses = []
    for z_s, z_t in zip(_logits(student, pixel_values), _logits(teacher, pixel_values), strict=True):
        if hard:
            top = max(range(len(z_t)), key=lambda k, z=z_t: float(z[k]))
            losses.append(-torch.log(_softmax(z_s)[top]))
            continue
        if standardize:
            z_s, z_t = _standard(z_s), _standard(z_t)
        p_s, p_t = _softmax(z_s, temperature), [p.detach() for p in _softmax(z_t, temperature)]
        if direction == "forward":
            value = _kl(p_t, p_s)
        elif direction == "reverse":
            value = _kl(p_s, p_t)
        else:
            mixed = [beta * t + (1 - beta) * s for t, s in zip(p_t, p_s, strict=True)]
            value = beta * _kl(p_t, mixed) + (1 - beta) * _kl(p_s, mixed)
        losses.append(temperature * temperature * value)
    return torch.stack(losses)


def _standard(z):
    mean = sum(z) / len(z)
    deviation = (sum((v - mean) * (v - mean) for v in z) / len(z)) ** 0.5
    return [(v - mean) / deviation for v in z]


REFERENCES = {"task": task, "logit_kd": logit_kd}
assert math.isclose(float(sum(_softmax(torch.tensor([1.0, 2.0])))), 1.0, rel_tol=1e-6)
