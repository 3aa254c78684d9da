"""make_student."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification

from hf_kdtl.models import Teacher, make_student
from hf_kdtl.models.blocks import find_blocks, uniform_layers
from tests.support.tiny import STAGED, VIT_LIKE, build

PIXELS = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)

# Variants whose weights lie elsewhere: one bias table for all blocks, gated MLPs, absolute positions.
VARIANTS = {
    "beit_shared_bias": ("beit", {"use_relative_position_bias": False, "use_shared_relative_position_bias": True}),
    "beit_positions": ("beit", {"use_relative_position_bias": False, "use_absolute_position_embeddings": True}),
    "data2vec_shared_bias": (
        "data2vec-vision",
        {"use_relative_position_bias": False, "use_shared_relative_position_bias": True},
    ),
    "dinov2_gated": ("dinov2", {"use_swiglu_ffn": True}),
}
FAMILIES_IN_STAGES = {"swin", "swinv2", "convnext", "convnextv2"}  # that can lose blocks of each stage
FAMILIES = {name: (name, {}) for name in VIT_LIKE} | VARIANTS


def _build(family, **more):
    name, overrides = FAMILIES[family]
    return build(name, **overrides, **more)


@torch.no_grad()
def _logits(model):
    return model(pixel_values=PIXELS.to(model.dtype)).logits


def _depth(config):
    return getattr(config, "vision_config", config).num_hidden_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_cut_gives_the_teachers_own_logits(family):
    teacher = _build(family, layers=3)
    assert torch.equal(_logits(make_student(teacher, layers=3)), _logits(teacher))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_is_the_teacher_without_the_other_blocks(family):
    teacher = _build(family, layers=5)
    student = make_student(teacher, layers=2)
    # The slow and obvious version: take the blocks out of a copy of the teacher.
    shortened = copy.deepcopy(teacher)
    blocks = find_blocks(shortened)
    container = shortened.get_submodule(blocks[0][0].rpartition(".")[0])
    for index in (4, 3, 2, 1, 0):
        if index not in (1, 4):  # floor(5 / 2) - 1 and 5 - 1
            del container[index]
    assert len(find_blocks(student)) == _depth(student.config) == 2
    assert not torch.equal(_logits(student), _logits(teacher))
    assert torch.equal(_logits(student), _logits(shortened))


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_by_plain_transformers(family, tmp_path):
    student = make_student(_build(family, layers=4), layers=2)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(student) and _depth(loaded.config) == 2
    assert torch.equal(_logits(loaded), _logits(student))
    assert loaded.config.id2label == student.config.id2label


@pytest.mark.parametrize("family", ["vit", "beit", "clip"])
def test_the_teacher_is_left_alone_and_shares_nothing(family):
    teacher = _build(family, layers=4).train().requires_grad_(False)
    before, config = copy.deepcopy(teacher.state_dict()), teacher.config.to_dict()
    draws = torch.random.get_rng_state()
    student = make_student(teacher, layers=2)
    assert torch.equal(torch.random.get_rng_state(), draws)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(7.0)
    student.config.id2label[0] = "changed"
    assert teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert teacher.config.to_dict() == config
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not student.training and all(p.requires_grad and p.is_leaf for p in student.parameters())


def test_labels_are_kept_and_the_name_is_not():
    teacher = build("vit", layers=2)
    teacher.config.id2label, teacher.config.label2id = {0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2}
    teacher.config.name_or_path = teacher.name_or_path = "somebody/large-teacher"
    student = make_student(teacher, layers=1)
    assert student.config.id2label == {0: "a", 1: "b", 2: "c"} and student.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert not student.name_or_path and not student.config.name_or_path
    assert teacher.name_or_path == "somebody/large-teacher"


@pytest.mark.parametrize("family", ["vit", "deit_teacher", "siglip"])
def test_a_teacher_can_be_a_path_or_a_teacher(family, tmp_path):
    teacher = _build(family, layers=4)
    teacher.save_pretrained(tmp_path)
    expected = _logits(make_student(teacher, layers=2))
    for given in (tmp_path, str(tmp_path), Teacher(teacher)):
        student = make_student(given, layers=2)
        assert torch.equal(_logits(student), expected)
        assert not student.name_or_path and all(p.requires_grad for p in student.parameters())


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(OSError, match="does not exist"):
        make_student(tmp_path / "nothing")


@pytest.mark.parametrize("family", ["vit", "beit", "dinov2", "clip"])
def test_a_half_precision_teacher_gives_a_student_that_can_be_trained(family):
    teacher = _build(family, layers=2).to(torch.bfloat16)
    student = make_student(teacher, layers=2)
    assert {tensor.dtype for tensor in student.parameters()} == {torch.float32}
    assert torch.equal(_logits(student), _logits(teacher.float()))


def test_mixed_precision_stays():
    teacher = build("vit", layers=2)
    teacher.vit.layers.to(torch.float64)
    student = make_student(teacher, layers=2)
    assert [p.dtype for p in student.parameters()] == [p.dtype for p in teacher.parameters()]


def test_the_attention_implementation_stays():
    teacher = build("vit", layers=2)
    teacher.set_attn_implementation("eager")
    assert make_student(teacher, layers=1).config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["beit", "data2vec-vision"])
def test_stochastic_depth_is_that_of_the_students_depth(name):
    def rates(model):
        return [module.drop_prob for module in model.modules() if hasattr(module, "drop_prob")]

    teacher = build(name, layers=5, drop_path_rate=0.4)
    assert rates(make_student(teacher, layers=3)) == rates(build(name, layers=3, drop_path_rate=0.4))


@pytest.mark.parametrize("name", ["beit", "dinov2", "dinov2_with_registers"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [3]),  # the last, by default
        ({"out_indices": [0, 2, 3, 6]}, [0, 1, 3]),  # blocks 1, 3, 5 are kept: outputs 2 and 3 become the first's
        ({"out_indices": [-1]}, [3]),
        ({"out_features": ["stem", "stage4"]}, [0, 2]),
    ],
)
def test_backbone_outputs_follow_their_blocks(name, given, expected, tmp_path):
    student = make_student(build(name, layers=6, **given), layers=3)
    stages = ["stem", "stage1", "stage2", "stage3"]
    student.save_pretrained(tmp_path)
    for config in (student.config, AutoModelForImageClassification.from_pretrained(tmp_path).config):
        assert config.stage_names == stages and config.out_indices == expected
        assert config.out_features == [stages[index] for index in expected]


def test_outputs_of_a_config_that_is_no_backbone():
    student = make_student(build("data2vec-vision", layers=6, out_indices=[1, 3, 5]), layers=3)
    assert student.config.out_indices == [0, 1, 2]


@pytest.mark.parametrize(
    ("key", "types"),
    [
        ("layer_types", ["conv", "full_attention", "conv", "sliding_attention"]),
        ("mlp_layer_types", ["dense", "sparse", "dense", "dense"]),
    ],
)
def test_layer_types_follow_their_blocks(key, types):
    teacher = build("vit", layers=4)
    setattr(teacher.config, key, types)
    assert getattr(make_student(teacher, layers=2).config, key) == [types[1], types[3]]
    assert len(getattr(teacher.config, key)) == 4


def test_a_config_that_could_not_be_read_back_is_refused_now():
    teacher = build("beit", layers=4, add_fpn=True, out_indices=[1, 2, 3, 4])
    with pytest.raises(ValueError, match="out_indices"):
        make_student(teacher, layers=2)


@pytest.mark.parametrize("layers", [0, -1, 4, 1.5, "2"])
def test_layers_out_of_range(layers):
    with pytest.raises(ValueError, match="teacher of 3; type a whole number from 1 to 3"):
        make_student(build("vit", layers=3), layers=layers)


@pytest.mark.parametrize("name", sorted({*STAGED} - FAMILIES_IN_STAGES))
def test_staged_families_are_refused(name):
    with pytest.raises(ValueError, match=r"is built in stages .* Type student_config="):
        make_student(build(name), layers=2)


@pytest.mark.parametrize("name", sorted(FAMILIES_IN_STAGES))
def test_one_number_for_several_stages_is_refused(name):
    # Swin with [1, 1]: config.num_hidden_layers, the number of stages, is the number of blocks.
    with pytest.raises(ValueError, match=r"depths \[1, 1\].* such as layers=\[1, 1\], or a share"):
        make_student(build(name, layers=1), layers=1)


def test_what_is_no_vision_model_is_refused():
    vit = build("vit")
    lora = peft.get_peft_model(copy.deepcopy(vit), peft.LoraConfig(target_modules=["q_proj"]))
    for model in (nn.Linear(2, 2), lora):
        with pytest.raises(TypeError, match=f"found {type(model).__name__}. Load the teacher with AutoModelForImage"):
            make_student(model)


def test_merged_lora_is_a_teacher():
    lora = peft.get_peft_model(build("vit", layers=2), peft.LoraConfig(target_modules=["q_proj"]))
    nn.init.normal_(lora.base_model.model.vit.layers[1].attention.q_proj.lora_B["default"].weight)
    merged = lora.merge_and_unload()
    assert torch.equal(_logits(make_student(merged, layers=2)), _logits(merged))


def test_a_replaced_head_is_refused_unless_the_config_says_so():
    teacher = build("vit", layers=2)
    teacher.classifier = nn.Linear(32, 7)
    with pytest.raises(ValueError, match=r"classifier.bias: expected \(3,\), found \(7,\)"):
        make_student(teacher, layers=1)
    teacher.config.num_labels = 7
    assert torch.equal(_logits(make_student(teacher, layers=2)), _logits(teacher))


def test_a_head_of_another_kind_is_refused():
    teacher = build("vit", layers=2)
    teacher.classifier = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"6 tensors .* classifier.0.bias: expected none, found \(8,\)"):
        make_student(teacher, layers=1)


@pytest.mark.parametrize(("layers", "of"), [(3, 7), (6, 12)])  # 12: layers.1 is also how layers.11 begins
def test_blocks_pair_by_the_uniform_rule(layers, of):
    teacher = build("vit", layers=of)
    student = make_student(teacher, layers=layers)
    originals = [block for _, block in find_blocks(teacher)]
    for (_, block), index in zip(find_blocks(student), uniform_layers(layers, of), strict=True):
        for copied, original in zip(block.parameters(), originals[index].parameters(), strict=True):
            assert torch.equal(copied, original)
