"""Students without heads, neurons, channels and blocks: the teacher with their outputs set to zero."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, DINOv3ViTConfig, DINOv3ViTModel, ViTModel

from hf_kdtl.models import make_student
from hf_kdtl.models.blocks import find_blocks
from hf_kdtl.models.student import Cut, plan_cut
from hf_kdtl.utils.versions import DINOV2_HEAD_DIM
from tests.support.helpers import and_slow
from tests.support.tiny import build

PIXELS = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).sin()
HEADS = ["vit", "deit", "deit_teacher", "dinov2", "dinov2_with_registers", "beit", "vit_msn", "ijepa"]
TOWERS = ["siglip", "clip"]
SAVED_TOO = ["deit", "deit_teacher", "dinov2_with_registers", "beit", "vit_msn", "ijepa", "clip"]
SHARED_BIAS = {"use_relative_position_bias": False, "use_shared_relative_position_bias": True}
VARIANTS = {
    "beit_shared_bias": ("beit", SHARED_BIAS),
    "dinov2_gated": ("dinov2", {"use_swiglu_ffn": True, "mlp_ratio": 4}),
}
WHOLE_HEADS = [] if DINOV2_HEAD_DIM else ["dinov2", "dinov2_with_registers", "dinov2_gated"]
LOSE_HEADS = [family for family in (*HEADS, *VARIANTS) if family not in WHOLE_HEADS]


def teacher_of(family, **more):
    if family == "dinov3":
        return dinov3(**more)
    name, overrides = VARIANTS.get(family, (family, {}))
    if name.startswith("dinov2"):
        overrides = {"mlp_ratio": 4} | overrides
    return build(name, **overrides, **more)


def dinov3(layers=2, **more):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DINOv3ViTModel(DINOv3ViTConfig(num_hidden_layers=layers, **(sizes | more))).eval()
        for parameter in model.parameters():
            parameter.detach().add_(torch.randn_like(parameter), alpha=0.05)
    return model


@torch.no_grad()
def answers(model):
    found = model(pixel_values=PIXELS)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def evenly(count, of):
    return [(s + 1) * of // count - 1 for s in range(count)]


def masked(teacher, heads=None, neurons=None, head_width=8):
    """A copy of the teacher with the outputs of all other heads and neurons set to zero, by hooks.

    Args:
        heads, neurons: those that stay, {block: [...]}.
    """
    model = copy.deepcopy(teacher)

    def keep(columns):
        def hook(module, args):
            mask = torch.zeros(args[0].shape[-1])
            mask[columns] = 1
            return (args[0] * mask,)

        return hook

    for i, (_, block) in enumerate(find_blocks(model)):
        for name, module in block.named_modules():
            last = name.rpartition(".")[2]
            if heads is not None and last in ("o_proj", "out_proj"):
                columns = [h * head_width + c for h in heads[i] for c in range(head_width)]
                module.register_forward_pre_hook(keep(columns))
            if neurons is not None and (last in ("fc2", "down_proj", "weights_out") or name == "output.dense"):
                module.register_forward_pre_hook(keep(neurons[i]))
    if neurons is not None and hasattr(getattr(model, "vision_model", None), "head"):  # SigLIP's pooling has an MLP
        model.vision_model.head.mlp.fc2.register_forward_pre_hook(keep(neurons["head"]))
    return model


def close(student, expected):
    mine, its = answers(student), answers(expected)
    assert (mine - its).abs().max() <= 1e-6 * max(1, its.abs().max())


@pytest.mark.parametrize("family", LOSE_HEADS)
def test_heads_and_neurons_removed_is_the_teacher_with_them_masked(family):
    teacher = teacher_of(family, layers=3, num_attention_heads=4)
    student = make_student(teacher, heads=3, mlp=0.5)
    of = 64 if family not in ("dinov2", "dinov2_with_registers", "dinov2_gated") else 128
    of = 88 if family == "dinov2_gated" else of
    count = 48 if family == "dinov2_gated" else of // 2
    expected = masked(teacher, {i: evenly(3, 4) for i in range(3)}, {i: evenly(count, of) for i in range(3)})
    assert (answers(student) - answers(teacher)).abs().max() > 1e-3
    close(student, expected)


@pytest.mark.parametrize("family", [*TOWERS, "dinov3", *WHOLE_HEADS])
def test_neurons_removed_is_the_teacher_with_them_masked(family):
    teacher = teacher_of(family, layers=3)
    student = make_student(teacher, mlp=0.5 if family in WHOLE_HEADS else 24)
    left, of = (24, 64) if family not in WHOLE_HEADS else (48, 88) if family == "dinov2_gated" else (64, 128)
    neurons = {i: evenly(left, of) for i in (0, 1, 2, "head")}
    assert (answers(student) - answers(teacher)).abs().max() > 1e-3
    close(student, masked(teacher, neurons=neurons))


@pytest.mark.parametrize("family", [*HEADS, *VARIANTS, *TOWERS, "dinov3", "swin", "swinv2", "convnext", "convnextv2"])
def test_full_size_gives_the_teachers_own_output_and_config(family):
    teacher = teacher_of(family)
    share = {"layers": 1.0}
    if family not in ("convnext", "convnextv2"):
        share |= {"mlp": 1.0}
    if family in (*HEADS, *VARIANTS, *TOWERS, "dinov3"):
        share |= {"width": 1.0}
    if family in LOSE_HEADS:
        share |= {"heads": 1.0}
    student = make_student(teacher, **share)
    assert torch.equal(answers(student), answers(teacher))
    assert student.config.to_dict() == teacher.config.to_dict()


@pytest.mark.parametrize("family", and_slow(["vit", "dinov2", "beit_shared_bias", "siglip"], SAVED_TOO))
def test_saved_and_opened_by_plain_transformers(family, tmp_path):
    fixed = family in (*TOWERS, *WHOLE_HEADS)
    width = {"width": 16} if fixed else {"width": 24, "heads": 1}
    student = make_student(teacher_of(family, layers=4), layers=2, mlp=0.5, **width)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(student) and torch.equal(answers(loaded), answers(student))
    vision = getattr(loaded.config, "vision_config", loaded.config)
    assert (vision.num_hidden_layers, vision.hidden_size, vision.num_attention_heads) == (2, 16 if fixed else 24, 1)
    assert loaded.num_parameters() < teacher_of(family, layers=4).num_parameters() / 3


def test_a_student_without_heads_can_lose_more_of_them():
    teacher = build("vit", num_attention_heads=4)
    twice = make_student(make_student(teacher, heads=2), heads=1)
    close(twice, masked(teacher, {0: [3], 1: [3]}))


@pytest.mark.parametrize("family", ["vit", "dinov2", "siglip"])
def test_channels_are_the_same_everywhere(family):
    teacher = teacher_of(family)
    student = make_student(teacher, width=16)
    channels = evenly(16, 32)
    for name, tensor in student.state_dict().items():
        original = teacher.state_dict()[name]
        if original.shape == (32,) and not any(
            part in name for part in ("q_proj", "k_proj", "v_proj", "query", "key", "value")
        ):
            assert torch.equal(tensor, original[channels]), name
    assert torch.isfinite(answers(student)).all()
    if family == "dinov2":  # its classifier reads the class token and the mean of the patches, side by side
        both = [*channels, *(32 + c for c in channels)]
        assert torch.equal(student.classifier.weight, teacher.classifier.weight[:, both])


@pytest.mark.parametrize("name", ["vit", "dinov2", "beit"])
def test_a_teacher_without_a_head(name, tmp_path):
    teacher = getattr(build(name), {"vit": "vit"}.get(name, name))
    if name == "vit":
        teacher = ViTModel(build("vit").config).eval()  # with a pooler
    width = {"width": 16} if name in WHOLE_HEADS else {"width": 20, "heads": 1}
    student = make_student(teacher, layers=1, mlp=0.5, **width)
    student.save_pretrained(tmp_path)
    assert torch.equal(answers(AutoModel.from_pretrained(tmp_path).eval()), answers(student))
    assert answers(student).shape[-1] == width["width"]


@pytest.mark.parametrize("name", WHOLE_HEADS)
def test_heads_that_go_with_the_width_alone(name):
    teacher = teacher_of(name, layers=3, num_attention_heads=4)
    with pytest.raises(ValueError, match=r"heads of Dinov2.*are width // heads wide.*transformers 5\.18 and later"):
        make_student(teacher, heads=2)
    student = make_student(teacher, width=16, mlp=0.5)
    assert student.config.num_attention_heads == 2 and torch.isfinite(answers(student)).all()
    rows = [head * 8 + c for head in evenly(2, 4) for c in range(8)]
    mine, its = (model.state_dict() for model in (student, teacher))
    key = next(key for key in mine if key.endswith("0.attention.attention.query.weight"))
    assert torch.equal(mine[key], its[key][rows][:, evenly(16, 32)])
    out = next(key for key in mine if key.endswith("0.attention.output.dense.weight"))
    assert torch.equal(mine[out], its[out][evenly(16, 32)][:, rows])


@pytest.mark.parametrize("name", ["swin", "swinv2", "convnext", "convnextv2"])
def test_blocks_of_each_stage(name):
    teacher = build(name, layers=[4, 2])
    student = make_student(teacher, layers=[2, 2])
    shortened = copy.deepcopy(teacher)
    first = find_blocks(shortened)[0][0].rpartition(".")[0]
    kept = [0, 3] if name.startswith("swin") else [1, 3]  # a block with shifted windows takes the place of one
    blocks = shortened.get_submodule(first)
    for index in (3, 2, 1, 0):
        if index not in kept:
            del blocks[index]
    assert student.config.depths == [2, 2]
    assert torch.equal(answers(student), answers(shortened))
    assert torch.equal(answers(make_student(teacher, layers=0.5)), answers(make_student(teacher, layers=[2, 1])))


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_neurons_of_a_model_in_stages(name):
    teacher = build(name, layers=[2, 2])
    neurons = {0: evenly(16, 32), 1: evenly(16, 32), 2: evenly(32, 64), 3: evenly(32, 64)}
    close(make_student(teacher, mlp=0.5), masked(teacher, neurons=neurons))


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("vit", {"heads": 0.7}, r"heads=0.7 does not divide: of 2 it is 1.4. Type heads=1 or heads=2"),
        ("vit", {"heads": 3}, r"heads=3 for a teacher of 2; type a whole number from 1 to 2"),
        ("vit", {"layers": 0.3}, r"layers=0.3 does not divide: of 2 it is 0.6"),
        ("vit", {"mlp": 0}, r"mlp=0 for a teacher of 64"),
        ("vit", {"width": -1.0}, r"width=-1.0 for a teacher of 32"),
        ("siglip", {"width": 24}, r"width 24 is not a whole number of SiglipForImageClassification's heads, of 16"),
        (
            "siglip",
            {"heads": 1},
            r"heads of SiglipForImageClassification are width // heads wide.*layers= or mlp=",
        ),
        ("dinov2", {"mlp": 0.3}, r"mlp_ratio 1.2; Dinov2Config holds whole numbers alone. Type one of mlp=0.25, 0.5"),
        ("dinov2", {"mlp": 40}, r"no number of neurons; type a share"),
        ("convnext", {"mlp": 0.5}, r"ConvNextConfig has no intermediate_size and no mlp_ratio.*type layers="),
        ("swin", {"width": 0.5}, r"the width of SwinForImageClassification differs by stage"),
        ("data2vec-vision", {"mlp": 0.5}, r"Data2VecVisionForImageClassification can lose blocks alone"),
        ("resnet", {"mlp": 0.5}, r"ResNetForImageClassification is built in stages"),
        ("vit", {"importance": "magnitude"}, r"importance.*first_order"),
        ("vit", {"flops": 0.5, "parameters": 0.5}, r"flops and parameters; expected one budget"),
    ],
)
def test_what_cannot_be_cut(name, asked, message):
    with pytest.raises(ValueError, match=message):
        make_student(teacher_of(name), **asked)


def test_the_plan_is_a_table_of_what_goes():
    lines = str(plan_cut(build("vit", layers=6, num_attention_heads=4), Cut(layers=2, heads=3, mlp=0.5))).splitlines()
    cells = {line.split("  ")[0]: line.split() for line in lines[1:]}
    assert cells["blocks"][1:] == ["6", "2", "33%", "blocks", "0-1,", "3-4"]
    assert cells["heads of a block"][4:7] == ["4", "3", "75%"]
    assert cells["neurons of a block"][4:7] == ["64", "32", "50%"]
    assert cells["width"][1:] == ["32", "32", "100%", "nothing"]


def test_a_layer_of_the_teacher_that_was_exchanged_is_refused():
    teacher = build("vit")
    teacher.vit.layers[0].mlp.fc1 = nn.Linear(32, 50)
    with pytest.raises(ValueError, match=r"fc1.bias: expected \(64,\), found \(50,\)"):
        make_student(teacher, heads=1)
