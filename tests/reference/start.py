"""Objectives towards the start the slow, obvious way, for ViTs whose head is called `classifier`.

What a reference cannot know is handed to it: lwf's head as it is now, and delta's channel weights, which
`importance` works out by really changing one channel after the other.
"""

import torch

from tests.reference.paired import read


def half_squared_distance(now, then):
    total = 0.0
    for a, b in zip(now, then, strict=True):
        for x, y in zip(a.flatten(), b.flatten(), strict=True):
            total = total + (x - y) * (x - y) / 2
    return total


def l2_sp(student, start, pixel_values, labels, head_weight=0.0):
    then, total = dict(start.named_parameters()), 0.0
    for name, now in student.named_parameters():
        if name.startswith("classifier"):
            total = total + head_weight * (now * now).sum() / 2
        else:
            total = total + (now - then[name].detach()).pow(2).sum() / 2
    return total


def channel_distance(student, start, weights):
    values = []
    for s_image, t_image in zip(student, start, strict=True):
        tokens = [(weights * (s - t) ** 2).sum() for s, t in zip(s_image, t_image, strict=True)]
        values.append(sum(tokens) / len(tokens))
    return torch.stack(values)


def delta(student, start, pixel_values, labels, importance, layers="all", sample=None):
    """`importance`: one (D,) a pair of blocks, in their order."""
    mine, its = read(student, pixel_values), read(start, pixel_values)
    indices = {"all": list(range(len(mine))), "last": [-1]}.get(str(layers), layers)
    values = [
        channel_distance(mine[i]["output"], its[i]["output"].detach(), weights)
        for i, weights in zip(indices, importance, strict=True)
    ]
    return sum(values) / len(values)


def pooled(model, pixel_values):
    """What the classifier reads, (B, D), image by image."""
    found = []
    handle = model.classifier.register_forward_pre_hook(lambda module, args: found.append(args[0][0]))
    for image in pixel_values:
        model(pixel_values=image[None])
    handle.remove()
    return torch.stack(found)


def smallest_singular(features, k):
    """By the eigenvalues of the smaller of F F' and F' F."""
    small = features @ features.T if len(features) <= features.shape[1] else features.T @ features
    return sum(torch.linalg.eigvalsh(small)[:k])


def bss(student, start, pixel_values, labels, k=1):
    return smallest_singular(pooled(student, pixel_values), k)


def lwf(student, model, pixel_values, labels, head, source="teacher", temperature=4.0, freeze_head=False):
    values = []
    for f, image in zip(pooled(student, pixel_values), pixel_values, strict=True):
        z_t = model(pixel_values=image[None]).logits[0].detach()
        z_s = head.weight @ f + head.bias
        p, q = ((z / temperature).exp() / (z / temperature).exp().sum() for z in (z_t, z_s))
        values.append(temperature**2 * sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True)))
    return torch.stack(values)


def loss_with_a_channel_scaled(model, pixel_values, layer, channel, scale, loss):
    """loss(pooled features), summed over images, when one channel of a block's output is multiplied by `scale`."""

    def hook(module, args, output):
        factors = torch.ones(output.shape[-1], dtype=output.dtype)
        factors[channel] = scale
        return output * factors

    found = []
    handles = [
        model.vit.layers[layer].register_forward_hook(hook),
        model.classifier.register_forward_pre_hook(lambda module, args: found.append(args[0])),
    ]
    with torch.no_grad():
        model(pixel_values=pixel_values)
    for handle in handles:
        handle.remove()
    return loss(found[0]).item()


def rises(model, pixel_values, layer, loss, step=None):
    """By how much the loss rises for each channel of a block: left out, or (`step`) to first order, by differences."""
    found = []
    for c in range(model.config.hidden_size):
        low, high = (0.0, 1.0) if step is None else (1 - step, 1 + step)
        left, full = (loss_with_a_channel_scaled(model, pixel_values, layer, c, s, loss) for s in (low, high))
        found.append((left - full) / (high - low))
    return torch.tensor(found, dtype=torch.float64)


def importance(rise):
    """Standardised over the channels, then a softmax at temperature 5."""
    mean = sum(rise) / len(rise)
    deviation = (sum((r - mean) ** 2 for r in rise) / len(rise)) ** 0.5
    powers = [((r - mean) / deviation / 5).exp() for r in rise]
    return torch.stack([p / sum(powers) for p in powers])


START = {"l2_sp": l2_sp, "delta": delta, "bss": bss, "lwf": lwf}
