"""Whoever looks at a model leaves it as it was, also where the model fails: hooks, modes, kernels, gradients."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_kdtl.models import Needs, capture
from hf_kdtl.models.adapters import adapters_off
from hf_kdtl.models.cutting.importance import first_order
from hf_kdtl.models.forward.classifier import classifiers
from hf_kdtl.models.forward.geometry import describe
from hf_kdtl.models.measure import flops, latency
from tests.support.state import Broken, broken, mixed, state_of
from tests.support.tiny import build

PIXELS = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))  # of one image norms get hooks, too
ALL = frozenset({0, 1})
EVERYTHING = Needs(attention=ALL, hidden_states=ALL, block_calls=ALL, pooled=True, patches=True, logits=True)
SECOND = Needs(input_gradient=True, order=2, hidden_states=ALL, pooled=True)


def further_pass(model, needs=SECOND):
    found = capture(model, PIXELS, needs)
    return found._rerun(PIXELS)


def with_adapters_off(model):
    with adapters_off(model):
        model(pixel_values=PIXELS)


LOOKS = {
    "capture": lambda model: capture(model, PIXELS, EVERYTHING),
    "maps": lambda model: capture(model, PIXELS, Needs(hidden_states=ALL, block_calls=ALL, pooled=True)),
    "derivatives": further_pass,
    "describe": lambda model: describe(model, PIXELS),
    "classifiers": lambda model: classifiers(model, PIXELS),
    "flops": lambda model: flops(model, PIXELS),
    "latency": lambda model: latency({"model": (model, PIXELS)}, repeats=1),
    "importance": lambda model: first_order(model, [{"pixel_values": PIXELS[0], "labels": 1}] * 3),
    "adapters": with_adapters_off,
}
CASES = [
    *(("vit", look) for look in LOOKS if look not in ("maps", "adapters", "classifiers")),
    *(("siglip", look) for look in ("capture", "classifiers")),  # its settings are the tower's own
    ("swin", "capture"),  # attention as finished weights, by the eager kernel
    *(("resnet", look) for look in ("maps", "derivatives", "describe", "latency")),
    ("lora", "adapters"),
    ("lora", "capture"),
]


def made(name):
    if name == "lora":
        model = get_peft_model(build("vit"), LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"]))
        next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
        return model.train()
    # As many classes as channels: inner layers are as wide as the classifier, and forwards tell them apart.
    return mixed(build(name, num_labels=32))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(("name", "look"), CASES)
def test_a_look_at_a_model_leaves_it_as_it_was(name, look, fails, monkeypatch):
    model = made(name)
    if fails:
        broken(model, monkeypatch)
    before = state_of(model)
    with torch.enable_grad(), pytest.raises(Broken) if fails else nullcontext():
        LOOKS[look](model)
    after = state_of(model)
    # A forward of training draws masks and counts in running statistics, here as in the step that it is part of.
    trains = look in ("capture", "maps", "derivatives")
    changed = [key for key in before if before[key] != after[key]]
    assert [key for key in changed if not (trains and (key == "random" or key.endswith("/buffer")))] == []
