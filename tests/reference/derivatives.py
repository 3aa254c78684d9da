"""References of the derivative objectives: image by image, class by class, float64, by double backward.

A batch of one image at a time, plain `torch.autograd.grad`, the math attention kernel, nothing of the package's own
derivatives. A finite difference is the same quotient with the same draws; `split` is the double backward it replaces.
Layer norms are written out: torch 2.13's own has a wrong third derivative, which a Hessian's parameter gradient needs.

Signature: (student, teacher, pixel_values, labels, draws, **options) -> (B,) per image.
"""

import math
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_kdtl.functional.sketch import projection
from tests.reference import features as rf


def _layer_norm(x, shape, weight, bias, eps):
    assert len(shape) == 1
    centred = x - x.mean(-1, keepdim=True)
    return weight * centred / ((centred * centred).mean(-1, keepdim=True) + eps) ** 0.5 + bias


def _logits(model, image):
    with sdpa_kernel(SDPBackend.MATH), mock.patch("torch.nn.functional.layer_norm", _layer_norm):
        return model(pixel_values=image[None]).logits[0]


def _log_softmax(z):
    largest = max(v.item() for v in z)
    total = sum(torch.exp(v - largest) for v in z)
    return torch.stack([v - largest - torch.log(total) for v in z])


def _scores(z, of):
    if of == "logprob":
        return _log_softmax(z)
    return z - sum(z) / len(z) if of == "centred" else z


def _gradient(scalar, image):
    return torch.autograd.grad(scalar, image, create_graph=True)[0]


def _gradients(model, image, read, frozen):
    """d read(logits)_k / d image for every k, one backward each: a list of tensors like the image."""
    x = image.detach().clone().requires_grad_()
    outputs = read(_logits(model, x))
    return [_gradient(o, x).detach() if frozen else _gradient(o, x) for o in outputs]


def _sum_squares(a):
    return (a * a).sum()


def _unit(a):
    squares = _sum_squares(a)
    return a / squares**0.5 if squares.item() > 0 else 0 * a


def _distance(a, b, distance):
    return _sum_squares(_unit(a) - _unit(b)) if distance == "normalized" else _sum_squares(a - b)


def _quotient(model, image, u, step, central, read):
    """The directional derivative of read(logits), (K,), by a difference along u of length step * ||u||."""
    ahead = read(_logits(model, image + step * u))
    if central:
        return (ahead - read(_logits(model, image - step * u))) / (2 * step)
    return (ahead - read(_logits(model, image))) / step


def _top(teacher, image):
    z = _logits(teacher, image).detach()
    return max(range(len(z)), key=lambda k: float(z[k]))


def _chosen(teacher, image, label, output):
    """The class whose score is differentiated, or None for an image without a label."""
    if output == "teacher_top1":
        return _top(teacher, image)
    return None if int(label) == -100 else int(label)


def _per_image(student, pixel_values, labels, draws, fraction, value):
    """value(i, image, label) for the images that take part, over `fraction`; 0 for the rest."""
    uniform = draws.uniform((), "fraction", like=pixel_values)
    values = []
    for i, (image, label) in enumerate(zip(pixel_values, labels, strict=True)):
        found = value(i, image, label) if float(uniform[i]) < fraction else None
        values.append(0.0 * _logits(student, image).sum() if found is None else found / fraction)
    return torch.stack(values)


def _mean(values):
    values = list(values)
    return sum(values) / len(values)


def jacobian(
    student, teacher, pixel_values, labels, draws, distance="normalized", output="teacher_top1", of=None,
    estimator="auto", central=False, step=None, probes=1, fraction=1.0, projector="mlp", projectors=None, sketch=None,
):  # fmt: skip
    if of == "embedding":
        return _of_embedding(student, teacher, pixel_values, draws, distance, projectors[0], fraction)
    shape = pixel_values.shape[1:]
    directions = [draws.normal(shape, f"direction-{k}", like=pixel_values) for k in range(probes)]
    if estimator == "auto":
        estimator = "finite_difference" if output == "all" else "vjp"

    def value(i, image, label):
        if output == "projection":
            return _projected(student, teacher, i, image, draws, of, probes)
        if output == "all":
            if estimator == "vjp":
                return _all_exact(student, teacher, image, distance, of)
            along = [_all_along(student, teacher, image, u[i], distance, of, step, central) for u in directions]
            return _mean(along)
        c = _chosen(teacher, image, label, output)
        if c is None:
            return None
        if estimator == "finite_difference":

            def read(z):
                return _scores(z, of)[c]

            mine = [_quotient(student, image, u[i], step, central, read) for u in directions]
            its = [_quotient(teacher, image, u[i], step, central, read).detach() for u in directions]
            return _mean((a - b) ** 2 for a, b in zip(mine, its, strict=True))

        def read(z):
            return [_scores(z, of)[c]]

        (mine,), (its,) = (_gradients(m, image, read, m is teacher) for m in (student, teacher))
        if sketch is not None:
            mine, its = (_sketch(g, i, pixel_values, sketch, draws) for g in (mine, its))
        return _distance(mine, its, distance)

    return _per_image(student, pixel_values, labels, draws, fraction, value)


def _of_embedding(student, teacher, pixel_values, draws, distance, projector, fraction):
    """The slope of the class tokens' projections on the teacher's own direction."""

    def token(model, x):
        with sdpa_kernel(SDPBackend.MATH), mock.patch("torch.nn.functional.layer_norm", _layer_norm):
            return model.vit(pixel_values=x[None]).last_hidden_state[0, 0]

    def projected(x):
        with mock.patch("torch.nn.functional.layer_norm", _layer_norm):
            return projector(token(student, x))

    def value(i, image, label):
        x, y = (image.detach().clone().requires_grad_() for _ in range(2))
        t = token(teacher, x)
        u = t.detach() / sum(a * a for a in t.detach()) ** 0.5
        its = _gradient(sum(a * b for a, b in zip(t, u, strict=True)), x).detach()
        mine = _gradient(sum(a * b for a, b in zip(projected(y), u, strict=True)), y)
        return _distance(mine, its, distance)

    return _per_image(student, pixel_values, [0] * len(pixel_values), draws, fraction, value)


def _sketch(g, i, pixel_values, rows, draws):
    """<R_k, sigma g> / sqrt(r), number by number; R and sigma are those of the package, which are random."""
    signs = draws.rademacher((g.numel(),), "sketch", like=pixel_values)[i]
    matrix = projection(rows, g.numel(), draws.seed).to(g)
    return torch.stack([sum(matrix[k] * signs * g.flatten()) / math.sqrt(rows) for k in range(rows)])


def _projected(student, teacher, i, image, draws, of, probes):
    classes = len(_logits(student, image))
    values = []
    for k in range(probes):
        n = draws.normal((classes,), f"projection-{k}", like=image)[i]
        v = n / math.sqrt(sum(float(a) ** 2 for a in n))

        def read(z, v=v):
            return [sum(a * o for a, o in zip(v, _scores(z, of), strict=True))]

        (mine,), (its,) = (_gradients(m, image, read, m is teacher) for m in (student, teacher))
        values.append(classes * _sum_squares(mine - its))
    return _mean(values)


def _all_exact(student, teacher, image, distance, of):
    """K passes of each model."""
    if distance == "squared":

        def read(z):
            return _scores(z, of)

        mine, its = (_gradients(m, image, read, m is teacher) for m in (student, teacher))
        return sum(_sum_squares(a - b) for a, b in zip(mine, its, strict=True))
    mine = _gradients(student, image, _log_softmax, False)
    its = _gradients(teacher, image, _log_softmax, True)
    p = torch.exp(_log_softmax(_logits(teacher, image))).detach()
    if distance == "fisher":
        return 0.5 * sum(w * _sum_squares(b - a) for w, a, b in zip(p, mine, its, strict=True))
    # grad p = p grad log p would be as good; this is the formula as it stands.
    its = _gradients(teacher, image, lambda z: torch.exp(_log_softmax(z)), True)
    return -sum((b * a).sum() for a, b in zip(mine, its, strict=True))


def _all_along(student, teacher, image, u, distance, of, step, central):
    if distance == "squared":

        def read(z):
            return _scores(z, of)

        mine = _quotient(student, image, u, step, central, read)
        its = _quotient(teacher, image, u, step, central, read).detach()
        return sum((a - b) ** 2 for a, b in zip(mine, its, strict=True))
    mine = _quotient(student, image, u, step, central, _log_softmax)
    if distance == "fisher":
        its = _quotient(teacher, image, u, step, central, _log_softmax).detach()
        p = torch.exp(_log_softmax(_logits(teacher, image))).detach()
        return 0.5 * sum(w * (b - a) ** 2 for w, a, b in zip(p, mine, its, strict=True))
    its = _quotient(teacher, image, u, step, central, lambda z: torch.exp(_log_softmax(z))).detach()
    return -sum(b * a for a, b in zip(mine, its, strict=True))


def jacobian_norm(
    student, teacher, pixel_values, labels, draws, of="logprob", estimator="auto", central=False, step=None, probes=1,
    fraction=1.0,
):  # fmt: skip
    shape = pixel_values.shape[1:]
    directions = [draws.normal(shape, f"direction-{k}", like=pixel_values) for k in range(probes)]

    def value(i, image, label):
        if int(label) == -100:
            return None
        y = int(label)
        if estimator == "finite_difference":

            def read(z):
                return _scores(z, of)[y]

            return _mean(_quotient(student, image, u[i], step, central, read) ** 2 for u in directions)
        (g,) = _gradients(student, image, lambda z: [_scores(z, of)[y]], False)
        return _sum_squares(g)

    return _per_image(student, pixel_values, labels, draws, fraction, value)


def attention_jacobian(
    student, teacher, pixel_values, labels, draws, layers="last", pool=2, estimator="auto", central=False, step=None,
    fraction=1.0,
):  # fmt: skip
    """For ViTs with one class token and square grids, read off the modules by name."""
    depth_s, depth_t = len(student.vit.layers), len(teacher.vit.layers)
    if layers == "last":
        layers = [(depth_s - 1, depth_t - 1)]
    elif layers == "uniform":
        layers = [(s, (s + 1) * depth_t // depth_s - 1) for s in range(depth_s)]

    def value(i, image, label):
        values = []
        for s, t in layers:
            x_s, x_t = (image.detach().clone().requires_grad_() for _ in range(2))
            mine, side = _energy(student, x_s, s)
            its, its_side = _energy(teacher, x_t, t)
            its = rf.redistribute(its, (its_side, its_side), (side, side))
            mine, its = _pooled(mine, side, pool), _pooled(its, side, pool)
            m = max(range(len(its)), key=lambda k, its=its: its[k].item())
            values.append(_distance(_gradient(mine[m], x_s), _gradient(its[m], x_t).detach(), "normalized"))
        return _mean(values)

    return _per_image(student, pixel_values, labels, draws, fraction, value)


def _energy(model, image, layer):
    """Mean square of each patch's features after a block, and the side of the grid."""
    found = []
    handle = model.vit.layers[layer].register_forward_hook(lambda m, a, out: found.append(out))
    _logits(model, image)
    handle.remove()
    patches = found[0][0][1:]
    return torch.stack([_sum_squares(p) / len(p) for p in patches]), round(len(patches) ** 0.5)


def _pooled(energy, side, pool):
    """Means over windows of pool x pool side by side; those at the edge hold what is left."""
    starts = range(0, side, pool)
    windows = [
        [energy[r * side + c] for r in range(y, min(y + pool, side)) for c in range(x, min(x + pool, side))]
        for y in starts
        for x in starts
    ]
    return [_mean(window) for window in windows]


def hessian(
    student, teacher, pixel_values, labels, draws, what="hvp", distance=None, output="teacher_top1", of=None,
    estimator="auto", step=None, probes=1, fraction=1.0,
):  # fmt: skip
    shape = pixel_values.shape[1:]
    signs = [draws.rademacher(shape, f"probe-{k}", like=pixel_values) for k in range(probes)]
    distance = distance or ("normalized" if what == "hvp" else "squared")

    def value(i, image, label):
        c = _chosen(teacher, image, label, output)
        if c is None:
            return None
        values = []
        for v in (probe[i] for probe in signs):
            if estimator == "finite_difference":
                mine, its = (_second_quotient(m, image, v, step, c, of) for m in (student, teacher))
                values.append((mine - its.detach()) ** 2)
                continue
            mine, its = (_hessian_vector(m, image, v, c, of) for m in (student, teacher))
            its = its.detach()
            if what == "curvature":
                values.append(((v * mine).sum() - (v * its).sum()) ** 2)
            else:
                values.append(_distance(mine, its, distance))
        return _mean(values)

    return _per_image(student, pixel_values, labels, draws, fraction, value)


def _hessian_vector(model, image, v, c, of):
    x = image.detach().clone().requires_grad_()
    g = _gradient(_scores(_logits(model, x), of)[c], x)
    return _gradient((g * v).sum(), x)


def _second_quotient(model, image, v, step, c, of):
    at = [_scores(_logits(model, image + s * v), of)[c] for s in (step, 0.0, -step)]
    return (at[0] - 2 * at[1] + at[2]) / step**2


def noisy_kd(student, teacher, pixel_values, labels, draws, temperature=4.0, noise=0.1, probes=1, fraction=1.0):
    shape = pixel_values.shape[1:]
    directions = [draws.normal(shape, f"direction-{k}", like=pixel_values) for k in range(probes)]

    def value(i, image, label):
        values = []
        for u in directions:
            noisy = image + noise * u[i]
            log_s = _log_softmax(_logits(student, noisy) / temperature)
            log_t = _log_softmax(_logits(teacher, noisy) / temperature).detach()
            values.append(sum(torch.exp(t) * (t - s) for s, t in zip(log_s, log_t, strict=True)))
        return temperature**2 * _mean(values)

    return _per_image(student, pixel_values, labels, draws, fraction, value)


REFERENCES_DERIVATIVES = {
    "jacobian": jacobian,
    "attention_jacobian": attention_jacobian,
    "jacobian_norm": jacobian_norm,
    "hessian": hessian,
    "noisy_kd": noisy_kd,
}
