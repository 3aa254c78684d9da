"""Fidelity the slow way: one image, one pair of blocks at a time, in float64."""

import math

import torch

from tests.reference.features import redistribute


def hsic(k, l):  # noqa: E741
    """The unbiased estimator, written as its sums over the images."""
    n = len(k)
    k, l = k * (1 - torch.eye(n)), l * (1 - torch.eye(n))  # noqa: E741
    trace = sum(k[i, j] * l[j, i] for i in range(n) for j in range(n))
    sums = k.sum() * l.sum() / ((n - 1) * (n - 2))
    both = sum(k[:, i].sum() * l[i].sum() for i in range(n))
    return (trace + sums - 2 / (n - 2) * both) / (n * (n - 3))


def cka(batches):
    """batches: [(student features (n, D_S), teacher features (n, D_T))] of one pair of blocks."""
    cross = own_s = own_t = 0.0
    for s, t in batches:
        k, l = (x.double() @ x.double().T for x in (s, t))  # noqa: E741
        cross, own_s, own_t = (a + len(s) * hsic(*b) for a, b in ((cross, (k, l)), (own_s, (k, k)), (own_t, (l, l))))
    return cross / math.sqrt(own_s * own_t)


def jacobian_cosine(student, teacher, pixel_values):
    """student, teacher: (1, C, h, w) -> (1, K) logits, the same classes in the same order."""
    values = []
    for image in pixel_values:
        slopes = []
        top = int(teacher(image[None]).argmax())
        for model in (student, teacher):
            x = image[None].clone().requires_grad_()
            torch.log(torch.softmax(model(x), 1))[0, top].backward(inputs=[x])
            slopes.append(x.grad.flatten())
        values.append(slopes[0] @ slopes[1] / (slopes[0].norm() * slopes[1].norm()))
    return torch.stack(values)


def class_row(attention, prefix, grid, grid_to):
    """Of one image (H, N, N), the class token first: its row over the class token and the patches of another grid."""
    row = attention[:, 0].mean(0)
    kept = torch.cat([row[:1], row[prefix:]])
    kept = kept / kept.sum()
    return torch.cat([kept[:1], redistribute(kept[1:], grid, grid_to)])


def agreement(p, q):
    middle = (p + q) / 2
    divergence = sum(
        0.5 * a * math.log(a / m) for r in (p, q) for a, m in zip(r.tolist(), middle.tolist(), strict=True)
    )
    return 1 - divergence / math.log(2)
