"""A tiny ViT, terms that work against its task, and the two gradients of them."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from hf_kdtl.gradient_rules import GRADIENT_RULES, GradientAccumulator
from hf_kdtl.models import capture
from hf_kdtl.models.forward.capture import Needs
from tests.support.tiny import build

CLASSES, IMAGES, WIDTH = 3, 6, 8


class Small:
    """A student of two blocks, a projector of an objective "features" that pairs them, and what a batch is made of."""

    def __init__(self, dtype=torch.float32):
        self.student = build("vit", image_size=16, hidden_size=WIDTH, intermediate_size=12).to(dtype)
        generator = torch.Generator().manual_seed(3)
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
        self.projector = nn.Linear(WIDTH, 5, bias=False).to(dtype)
        self.projector.weight.data = draw(5, WIDTH)
        self.pixels, self.targets = draw(IMAGES, 3, 16, 16), draw(2, IMAGES, 5)
        self.labels = torch.arange(IMAGES) % CLASSES
        self.modules = nn.ModuleDict({"student": self.student, "features": self.projector})

    @property
    def parameters(self):
        return [(name, p) for name, p in self.modules.named_parameters() if p.requires_grad]

    @property
    def blocks(self):
        return {b: {n for n, _ in self.parameters if f".layers.{b}." in n} for b in range(2)}

    own: ClassVar = {"features": {"features.weight"}, "wrong": set()}
    pairs: ClassVar = {"features": [0, 1]}

    def window(self, rule="never_hurt", **options):
        layers = [
            n.split(".layers.")[1][0] if ".layers." in n else "objectives" if n.startswith("features") else "rest"
            for n, _ in self.parameters
        ]
        return GradientAccumulator(GRADIENT_RULES[rule](**options), self.parameters, layers, self.blocks, self.own)

    def terms(self, rows=slice(None), wrong=1.0, features=0.0, shift=1, times=1.0, without=None, apart=False):
        """The task's loss, and the transfer terms: labels that are `shift` off, and (pairs,) of features.

        All are divided by the images of the effective batch, so that parts of it add up; `times` is the number of
        ranks.
        `apart`: the pairs' entries as a list of scalars, and not as a vector.
        """
        seen = capture(self.student, self.pixels[rows], Needs(logits=True, hidden_states=frozenset({0, 1})))
        task = F.cross_entropy(seen.logits, self.labels[rows], reduction="sum") / IMAGES
        off = F.cross_entropy(seen.logits, (self.labels[rows] + shift) % CLASSES, reduction="sum") / IMAGES
        self.hidden = [seen.hidden_states[b] for b in range(2)]
        distances = [
            (self.projector(h.mean(1)) - t[rows]).square().sum()
            for h, t in zip(self.hidden, self.targets, strict=True)
        ]
        transfer = {"wrong": times * wrong * off} if wrong else {}
        if features:
            scaled = [times * features * d / IMAGES for d in distances]
            transfer["features"] = scaled if apart else torch.stack(scaled)
        transfer = {} if without == "transfer" else transfer
        return None if without == "task" else times * task, transfer

    def sides(self, **terms):
        """g and d by autograd.grad, None where there is none."""
        task, transfer = self.terms(**terms)
        both = (task, sum((t.sum() for t in transfer.values()), torch.zeros(())))
        tensors = [p for _, p in self.parameters]
        return [list(torch.autograd.grad(x, tensors, retain_graph=True, allow_unused=True)) for x in both]

    def gradients(self):
        return [p.grad for _, p in self.parameters]

    def bytes(self):
        return sum(p.numel() * p.element_size() for _, p in self.parameters)


def dot(x, y):
    return sum(
        (a.double() * b.double()).sum().item() for a, b in zip(x, y, strict=True) if not (a is None or b is None)
    )
