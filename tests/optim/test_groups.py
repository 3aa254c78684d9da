"""Param groups: a partition in depth order, decay as Trainer's, and leftovers distinguished by when they run."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer

from hf_kdtl.models.blocks import find_blocks
from hf_kdtl.models.forward.modes import evaluating
from hf_kdtl.optim.groups import group_table, layer_groups
from tests.support.state import Broken, broken, mixed, state_of
from tests.support.tiny import EVERY, build

LARGER = {"mobilevitv2": 64}
REFUSED = {
    "imagegpt": "does not run on pixel_values",
    "siglip2": "does not run on pixel_values",
    "pp_lcnet": "no logits",
}
# Modules with parameters outside the blocks: what comes first, what comes after, and the head.
PLACES = {
    "vit": ("vit.embeddings vit.embeddings.patch_embeddings.projection", "vit.layernorm", "classifier"),
    "beit": ("beit.embeddings beit.embeddings.patch_embeddings.projection", "beit.pooler.layernorm", "classifier"),
    "dinov2": ("dinov2.embeddings dinov2.embeddings.patch_embeddings.projection", "dinov2.layernorm", "classifier"),
    "deit_teacher": (
        "deit.embeddings deit.embeddings.patch_embeddings.projection",
        "deit.layernorm",
        "cls_classifier distillation_classifier",
    ),
    "swin": ("swin.embeddings.norm swin.embeddings.patch_embeddings.projection", "swin.layernorm", "classifier"),
    "convnext": (
        "convnext.embeddings.layernorm convnext.embeddings.patch_embeddings",
        "convnext.layernorm",
        "classifier",
    ),
    "resnet": ("resnet.embedder.embedder.convolution resnet.embedder.embedder.normalization", "", "classifier.1"),
    "levit_teacher": (
        " ".join(
            f"levit.patch_embeddings.embedding_layer_{i}.{part}"
            for i in (1, 2, 3, 4)
            for part in ("convolution", "batch_norm")
        ),
        "",
        "classifier.batch_norm classifier.linear classifier_distill.batch_norm classifier_distill.linear",
    ),
    "clip": (
        "vision_model.embeddings vision_model.embeddings.patch_embedding vision_model.embeddings.position_embedding "
        "vision_model.pre_layrnorm",
        "vision_model.post_layernorm",
        "classifier",
    ),
    "efficientnet": (
        "efficientnet.embeddings.convolution efficientnet.embeddings.batchnorm",
        "efficientnet.encoder.top_conv efficientnet.encoder.top_bn",
        "classifier",
    ),
}


def names(model, groups):
    """{layer: names of its tensors}; fails where a tensor is in two groups."""
    of = {id(p): n for n, p in model.named_parameters()}
    found = {}
    for group in groups:
        for p in group["params"]:
            found.setdefault(group["layer"], []).append(of.pop(id(p)))
    return found


def modules(found, layer):
    return {name.rpartition(".")[0] for name in found.get(layer, [])}


@pytest.mark.parametrize("key", EVERY)
def test_every_tensor_in_one_group_in_depth_order(key):
    model = build(key, image_size=LARGER.get(key, 32))
    if key in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[key]):
            layer_groups(model)
        return
    groups = layer_groups(model, weight_decay=0.1)
    blocks = find_blocks(model)
    found = names(model, groups)
    assert sorted(n for ns in found.values() for n in ns) == sorted(n for n, _ in model.named_parameters())
    for i, (name, _) in enumerate(blocks):
        inside = {n for n, _ in model.named_parameters() if n.startswith(f"{name}.")}
        assert inside and inside <= set(found[i])
    order = ["embeddings", *range(len(blocks)), "norm", "head"]
    assert [order.index(g["layer"]) for g in groups] == sorted(order.index(g["layer"]) for g in groups)
    assert len({g["name"] for g in groups}) == len(groups) and all(g["lr_multiplier"] == 1.0 for g in groups)
    assert found["embeddings"] and found["head"]


@pytest.mark.parametrize("key", PLACES)
def test_leftovers_by_when_they_run(key):
    found = names(model := build(key), layer_groups(model))
    assert tuple(modules(found, layer) for layer in ("embeddings", "norm", "head")) == tuple(
        set(place.split()) for place in PLACES[key]
    )


@pytest.mark.parametrize("key", ["swin", "convnext", "pvt"])
def test_what_runs_between_blocks_goes_with_the_next(key):
    found = names(model := build(key, layers=[1, 2]), layer_groups(model))
    starts = {name for i, (name, _) in enumerate(find_blocks(model)) if i in found}
    between = {n for n in found[1] if not any(n.startswith(f"{s}.") for s in starts)}
    words = {"swin": "downsample", "convnext": "downsampling_layer", "pvt": "patch_embeddings.1"}
    assert between and all(words[key] in name for name in between)


@pytest.mark.parametrize("key", ["vit", "beit", "dinov2"])
def test_as_many_classes_as_channels_do_not_confuse_norm_and_head(key):
    found = names(model := build(key, num_labels=32), layer_groups(model))
    assert modules(found, "head") == {"classifier"} and modules(found, "norm") == {PLACES[key][1]}


@pytest.mark.parametrize("key", ["vit", "swin", "resnet", "clip", "dinov2_with_registers", "siglip"])
def test_decay_is_trainers(key):
    model = build(key)
    decaying = set(Trainer.get_decay_parameter_names(None, model))
    of = {id(p): n for n, p in model.named_parameters()}
    for group in layer_groups(model, weight_decay=0.1):
        assert group["weight_decay"] in (0.1, 0.0)
        for p in group["params"]:
            assert (group["weight_decay"] == 0.1) == (of[id(p)] in decaying), of[id(p)]


def test_tokens_can_be_spared_of_decay():
    model = build("dinov2_with_registers")
    kept = {False: set(), True: set()}
    of = {id(p): n for n, p in model.named_parameters()}
    for spare in kept:
        groups = layer_groups(model, weight_decay=0.1, spare_tokens=spare)
        kept[spare] = {of[id(p)].rpartition(".")[2] for g in groups if g["weight_decay"] for p in g["params"]}
    spared = {"cls_token", "mask_token", "position_embeddings", "register_tokens"}
    assert kept[False] - kept[True] == spared


def test_objectives_have_a_group_of_their_own():
    model = build("vit")
    objectives = nn.ModuleDict({"hidden_states": nn.Linear(4, 4), "shared": nn.ModuleList([model.classifier])})
    groups = layer_groups(model, objectives, weight_decay=0.1)
    assert [g["layer"] for g in groups[-2:]] == ["objectives", "objectives"]
    assert [tuple(p.shape) for g in groups[-2:] for p in g["params"]] == [(4, 4), (4,)]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters())) + 2, "the shared head counts once"
    assert groups[-2]["weight_decay"] == 0.1 and groups[-1]["weight_decay"] == 0.0


def test_lora():
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    model = get_peft_model(build("vit"), lora)
    groups = layer_groups(model, weight_decay=0.1)
    assert [g["name"] for g in groups] == ["block 0", "block 1", "head", "head (no decay)"]
    held = {id(p) for g in groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_tied_weights_are_in_one_group():
    model = build("vit")
    model.vit.layers[1].mlp.fc1.weight = model.vit.layers[0].mlp.fc1.weight
    found = names(model, layer_groups(model))
    assert "vit.layers.0.mlp.fc1.weight" in found[0] and len(found[1]) == len(found[0]) - 1
    other = build("vit", num_labels=64)
    other.classifier.weight = other.vit.layers[1].mlp.fc1.weight
    found = names(other, layer_groups(other))
    assert found["head"] == ["classifier.bias"] and "vit.layers.1.mlp.fc1.weight" in found[1]


def test_frozen_parts_have_no_group():
    model = build("vit")
    model.vit.embeddings.requires_grad_(False)
    model.vit.layers[0].requires_grad_(False)
    assert {g["layer"] for g in layer_groups(model)} == {1, "norm", "head"}
    with pytest.raises(ValueError, match="no trainable tensor"):
        layer_groups(model.requires_grad_(False))


def test_looking_changes_nothing():
    model = build("levit").train()
    model.levit.encoder.stages[0].eval()  # a part that a user keeps in eval mode
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random = torch.random.get_rng_state()
    layer_groups(model)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(random, torch.random.get_rng_state())
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert modes == [m.training for m in model.modules()]


def test_looking_leaves_nothing_behind_also_where_the_model_fails(monkeypatch):
    model = mixed(build("vit"))
    before = state_of(model)
    layer_groups(model)
    assert state_of(model) == before
    broken(model, monkeypatch)
    before = state_of(model)
    with pytest.raises(Broken):
        layer_groups(model)
    assert state_of(model) == before


class Blocky(nn.Module):
    """An image classifier whose blocks are in no container."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"image_size": 8, "num_labels": 3})()
        self.stem = nn.Conv2d(3, 4, 8)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last, self.answer = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, pixel_values, **kwargs):
        x = self.two(self.one(self.stem(pixel_values).flatten(1)))
        return type("Output", (), {"logits": self.answer(self.last(x))})()


def test_blocks_that_cannot_be_found():
    model = Blocky()
    with pytest.raises(ValueError, match=r"cannot tell which modules of Blocky .* found none.* blocks=\["):
        layer_groups(model)
    found = names(model, layer_groups(model, blocks=["one", "two"]))
    assert {layer: modules(found, layer) for layer in found} == {
        "embeddings": {"stem"}, 0: {"one"}, 1: {"two"}, "norm": {"last"}, "head": {"answer"}
    }  # fmt: skip
    for blocks in (["one", "three"], [], ["one", "one"]):
        with pytest.raises(ValueError, match="expected names of different modules of Blocky"):
            layer_groups(model, blocks=blocks)
    model.extra = nn.ModuleList([nn.Linear(1, 1)])
    with pytest.raises(ValueError, match=r"found extra \(1 entries"):
        layer_groups(model)


def test_the_table():
    table = group_table(layer_groups(build("vit"), weight_decay=0.1)).splitlines()
    assert table[0].split() == ["group", "tensors", "parameters", "weight", "decay", "rate", "x"]
    assert table[1].split() == ["embeddings", "3", "6,720", "0.1", "1.000"]
    assert len({len(line) for line in table}) == 1
