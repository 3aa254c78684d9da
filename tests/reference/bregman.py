"""Bregman geometry the slow, obvious way: number by number, derivatives by autograd, optima by a library's BFGS."""

import math

import torch
from scipy.optimize import minimize

from tests.reference import paired

F = {
    "identity": lambda a: sum(v * v / 2 for v in a),
    "softmax": lambda a: torch.log(sum(torch.exp(v) for v in a)),
    "tanh": lambda a: sum(torch.log(torch.cosh(v)) for v in a),
    "sigmoid": lambda a: sum(torch.log(1 + torch.exp(v)) for v in a),
    "leaky_relu": lambda a: sum(v * v / 2 if v > 0 else 0.01 * v * v / 2 for v in a),
}


def f(name, a):
    """grad F of one vector, by autograd."""
    a = a.detach().clone().requires_grad_()
    return torch.autograd.grad(F[name](a), a)[0]


def hessian(name, a):
    return torch.autograd.functional.hessian(F[name], a)


def divergence(name, a, b):
    """F(a) - F(b) - <f(b), a - b> of two vectors of pre-activations."""
    return (F[name](a) - F[name](b) - sum(x * y for x, y in zip(f(name, b), a - b, strict=True))).item()


def mean(name, y):
    """The a with f(a) = mean of the rows; of soft-max the one with sum 0. By inverting f number by number."""
    average = [sum(row[j].item() for row in y) / len(y) for j in range(y.shape[1])]
    inverse = {
        "identity": lambda v: v,
        "softmax": math.log,
        "tanh": math.atanh,
        "sigmoid": lambda v: math.log(v / (1 - v)),
        "leaky_relu": lambda v: v if v > 0 else v / 0.01,
    }[name]
    a = torch.tensor([inverse(v) for v in average], dtype=torch.float64)
    return a - sum(a) / len(a) if name == "softmax" else a


def encode(name, directions, m, a):
    """The best coefficients of one row of pre-activations."""

    def loss(c):
        c = torch.tensor(c, dtype=torch.float64)
        at = directions @ c + m
        return divergence(name, at, a), (directions.T @ (f(name, at) - f(name, a))).numpy()

    found = minimize(loss, [0.0] * directions.shape[1], jac=True, method="BFGS", options={"gtol": 1e-10})
    return torch.tensor(found.x, dtype=torch.float64)


def least_divergence(name, m, a, k, start):
    """The least mean divergence over directions and coefficients together, from one start."""
    n, d = a.shape
    y = torch.stack([f(name, row) for row in a])

    def loss(x):
        x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        at = x[d * k :].reshape(n, k) @ x[: d * k].reshape(d, k).T + m
        # F(f^-1(y)) - <y, f^-1(y)> does not depend on x.
        value = sum(F[name](p) - (q * p).sum() for p, q in zip(at, y, strict=True)) / n
        return value.item(), torch.autograd.grad(value, x)[0].numpy()

    first = torch.cat([start.flatten(), torch.zeros(n * k, dtype=torch.float64)]).numpy()
    found = minimize(loss, first, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "gtol": 1e-10, "ftol": 1e-15})
    rest = sum(F[name](p) - (q * p).sum() for p, q in zip(a, y, strict=True)) / n
    return found.fun - rest.item()


def _outputs(teacher, image, of, layer):
    """The represented outputs of one image, row by row, as pre-activations under their link."""
    block = paired.read(teacher, image[None])[layer or 0]
    logits = teacher(pixel_values=image[None]).logits[0]
    if of == "probabilities":
        return [torch.log_softmax(logits, 0)]
    if of == "pooled":
        return [teacher.vit.layernorm(_last(teacher, image))[0, 0]]
    if of == "hidden_states":
        return list(block["output"][0])
    query, key = block["q_proj"][0], block["k_proj"][0]  # (H, N, d)
    rows = [torch.softmax(k @ q[0] / math.sqrt(len(q[0])), 0) for q, k in zip(query, key, strict=True)]
    return [torch.log(sum(rows) / len(rows))]


def _last(model, image):
    return paired.read(model, image[None])[-1]["output"]


def bregman(student, teacher, pixel_values, labels, representation="", coefficients=0.0, objective=None):
    """The objective, image by image and row by row; of ViTs with one grid. It knows the objective's head, V and m."""
    v, m, name = objective.layer.directions, objective.layer.mean, objective.layer.link.name
    of, layer = objective.layer.provenance.of, objective.layer.provenance.layer
    values = []
    for image in pixel_values:
        features = _last(student, image)[0]
        if of != "hidden_states":
            features = student.vit.layernorm(features)[:1]
        rows = [a.detach() for a in _outputs(teacher, image, of, layer)]
        terms = []
        for feature, a in zip(features, rows, strict=True):
            c = objective.head.weight @ feature + objective.head.bias
            at = v @ c + m
            y = f(name, a)
            term = F[name](at) - F[name](a) - sum(p * (x - b) for p, x, b in zip(y, at, a, strict=True))
            if coefficients:
                term = term + coefficients * sum(
                    (x - b) ** 2 for x, b in zip(c, _best(objective, name, a), strict=True)
                )
            terms.append(term)
        values.append(sum(terms) / len(terms))
    return torch.stack(values)


def _best(objective, name, a):
    """The best coefficients of one row, of BFGS, and then to the last bit by Newton steps with autograd's Hessian."""
    fit = objective.layer.representation
    c = encode(name, fit.directions, fit.mean, a)
    for _ in range(3):
        gradient = fit.directions.T @ (f(name, fit.directions @ c + fit.mean) - f(name, a))
        c = c - torch.linalg.solve(
            fit.directions.T @ hessian(name, fit.directions @ c + fit.mean) @ fit.directions, gradient
        )
    return c
