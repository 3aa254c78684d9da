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


def decoupled_kd(student, teacher, pixel_values, labels, temperature=4.0, alpha=1.0, beta=8.0):
    losses = []
    logits = zip(_logits(student, pixel_values), _logits(teacher, pixel_values), labels, strict=True)
    for z_s, z_t, label in logits:
        if label == -100:
            losses.append(0.0 * z_s.sum())
            continue
        p_s, p_t = _softmax(z_s, temperature), [p.detach() for p in _softmax(z_t, temperature)]
        y, others = int(label), [k for k in range(len(z_s)) if k != label]
        sure_s, sure_t = ([p[y], sum(p[k] for k in others)] for p in (p_s, p_t))
        rest_s, rest_t = ([p[k] / sum(p[j] for j in others) for k in others] for p in (p_s, p_t))
        value = alpha * _kl(sure_t, sure_s) + beta * _kl(rest_t, rest_s)
        losses.append(temperature * temperature * value)
    return torch.stack(losses)


def dist(student, teacher, pixel_values, labels, temperature=1.0, beta=1.0, gamma=1.0):
    p_s = [_softmax(z, temperature) for z in _logits(student, pixel_values)]
    p_t = [[p.detach() for p in _softmax(z, temperature)] for z in _logits(teacher, pixel_values)]
    images, classes = len(p_s), len(p_s[0])
    over_classes = sum(1 - _pearson(p_s[i], p_t[i]) for i in range(images)) / images
    over_images = sum(1 - _pearson([p[k] for p in p_s], [p[k] for p in p_t]) for k in range(classes)) / classes
    return temperature * temperature * (beta * over_classes + gamma * over_images)


def _pearson(x, y):
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    variances = sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y)
    return covariance / variances**0.5


def _standard(z):
    mean = sum(z) / len(z)
    deviation = (sum((v - mean) * (v - mean) for v in z) / len(z)) ** 0.5
    return [(v - mean) / deviation for v in z]


REFERENCES = {"task": task, "logit_kd": logit_kd, "decoupled_kd": decoupled_kd, "dist": dist}
assert math.isclose(float(sum(_softmax(torch.tensor([1.0, 2.0])))), 1.0, rel_tol=1e-6)
