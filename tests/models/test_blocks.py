"""find_blocks and uniform_layers."""

from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn
from transformers import CLIPModel

from hf_kdtl.models.blocks import find_blocks, uniform_layers
from tests.support.tiny import STAGED, TINY, VIT_LIKE, build

PIXELS = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


def _calls(model: nn.Module) -> list[str]:
    """Names of the blocks in the order in which one forward of the model calls them."""
    called: list[str] = []
    hooks = [
        block.register_forward_hook(lambda *_, name=name: called.append(name)) for name, block in find_blocks(model)
    ]
    with torch.no_grad():
        model(pixel_values=PIXELS)
    for hook in hooks:
        hook.remove()
    return called


@pytest.mark.parametrize("name", TINY)
def test_blocks_are_called_once_each_in_order(name):
    model = TINY[name]()
    blocks = find_blocks(model)
    assert _calls(model) == [name for name, _ in blocks]
    assert all(model.get_submodule(name) is block for name, block in blocks)


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("name", VIT_LIKE)
def test_vit_like_families_give_every_layer(name, layers):
    blocks = [block for _, block in find_blocks(build(name, layers=layers))]
    assert len(blocks) == layers
    assert len({type(block) for block in blocks}) == 1 and type(blocks[0]).__name__.endswith("Layer")


# Their stages hold more than the layers that their config counts.
STAGES_ONLY = {"levit": 3, "mobilevit": 5}


@pytest.mark.parametrize("depths", [[1, 2], [2, 3], [3, 2]])
@pytest.mark.parametrize("name", [name for name in STAGED if name not in STAGES_ONLY])
def test_staged_families_give_the_layers_of_all_stages(name, depths):
    blocks = [block for _, block in find_blocks(build(name, layers=depths))]
    assert len(blocks) == sum(depths)
    assert len({type(block) for block in blocks}) == 1


@pytest.mark.parametrize("name", STAGES_ONLY)
def test_families_that_cannot_be_flattened_give_their_stages(name):
    assert len(find_blocks(TINY[name]())) == STAGES_ONLY[name]


def test_one_layer_in_each_stage_is_not_taken_for_the_patch_embeddings():
    # Two stages of one layer: as many layers as patch embeddings, and these hold more parameters.
    assert find_blocks(build("poolformer", layers=1))[0][0] == "poolformer.encoder.block.0.0"


def test_a_head_larger_than_the_blocks_is_not_taken_for_them():
    model = build("resnet", num_labels=2000)
    assert sum(p.numel() for p in model.classifier.parameters()) > sum(p.numel() for p in model.resnet.parameters())
    assert find_blocks(model)[0][0] == "resnet.encoder.stages.0.layers.0"


@pytest.mark.parametrize("name", ["vit", "clip", "swin"])
def test_lora_gives_the_same_blocks(name):
    model = build(name, layers=[2, 2] if name == "swin" else 3)
    plain = find_blocks(model)
    targets = ["q_proj", "v_proj"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, modules_to_save=["classifier"]))
    blocks = find_blocks(wrapped)
    assert [(f"base_model.model.{name}", block) for name, block in plain] == blocks
    assert _calls(wrapped) == [name for name, _ in blocks]


def test_a_text_tower_is_left_out():
    config = build("clip", layers=2).config
    config.text_config.update(
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 4000}
    )
    assert [name for name, _ in find_blocks(CLIPModel(config))] == [
        "vision_model.encoder.layers.0",
        "vision_model.encoder.layers.1",
    ]


@pytest.mark.parametrize("layers", [2, 3])
def test_a_module_without_config_gives_its_largest_list(layers):
    model = nn.ModuleDict({"small": nn.Sequential(nn.Linear(2, 2), nn.ReLU())})
    model["single"] = nn.Sequential(nn.Linear(50, 50))
    model["blocks"] = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
    assert [name for name, _ in find_blocks(model)] == [f"blocks.{i}" for i in range(layers)]


def test_a_model_without_any_list_is_an_error():
    with pytest.raises(ValueError, match=r"which modules of Linear .* found none"):
        find_blocks(nn.Linear(2, 2))


def test_lists_that_are_too_small_are_named():
    model = nn.ModuleDict({"head": nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "trunk": nn.Linear(50, 50)})
    with pytest.raises(ValueError, match=r"found head \(2 entries, 0\.2%\).*Put the blocks in one nn\.ModuleList"):
        find_blocks(model)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (6, 12, [1, 3, 5, 7, 9, 11]),
        (4, 12, [2, 5, 8, 11]),
        (5, 12, [1, 3, 6, 8, 11]),  # floor(2.4), floor(4.8), floor(7.2), floor(9.6), 12; less one
        (1, 12, [11]),
        (1, 1, [0]),
    ],
)
def test_uniform_layers_by_hand(student, teacher, expected):
    assert uniform_layers(student, teacher) == expected


def test_uniform_layers_are_increasing_and_end_at_the_last():
    for teacher in range(1, 25):
        assert uniform_layers(teacher, teacher) == list(range(teacher))
        for student in range(1, teacher + 1):
            layers = uniform_layers(student, teacher)
            assert layers == sorted(set(layers)) and len(layers) == student
            assert layers[0] >= 0 and layers[-1] == teacher - 1


@pytest.mark.parametrize("student", [0, -1, 13, 2.0, "6"])
def test_uniform_layers_out_of_range(student):
    with pytest.raises(
        ValueError, match=r"found .* student layers for a teacher of 12; type a whole number from 1 to 12"
    ):
        uniform_layers(student, 12)


class _Unit(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3)


class _Wrapped(nn.Module):
    """A backbone of timm in transformers' wrapper: a config without depths."""

    def __init__(self, timm_model):
        super().__init__()
        self.config = SimpleNamespace(num_labels=10)
        self.timm_model = timm_model


def test_stages_next_to_each_other_are_one_list():
    """timm's ResNet-18: layer1 ... layer4, each a Sequential of two; the last alone has most of the parameters."""
    backbone = nn.Module()
    backbone.conv1 = nn.Conv2d(3, 4, 7)
    for i in range(1, 5):
        setattr(backbone, f"layer{i}", nn.Sequential(_Unit(2**i), _Unit(2**i)))
    backbone.fc = nn.Linear(16, 10)
    names = [name for name, _ in find_blocks(_Wrapped(backbone))]
    assert names == [f"timm_model.layer{i}.{j}" for i in range(1, 5) for j in range(2)]


def test_a_head_of_single_layers_is_not_the_blocks():
    """timm's EfficientViT-B0: its head is larger than its stages."""
    backbone = nn.Module()
    backbone.stages = nn.Sequential(_Unit(4), _Unit(8))
    backbone.head = nn.Module()
    backbone.head.classifier = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.Hardswish(), nn.Linear(64, 10))
    assert [name for name, _ in find_blocks(_Wrapped(backbone))] == ["timm_model.stages.0", "timm_model.stages.1"]
