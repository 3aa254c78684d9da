"""First-order importance against its definition: the loss's derivative when an output is scaled down."""

import pytest
import torch
import torch.nn.functional as F

from hf_kdtl.models import Teacher, make_student
from hf_kdtl.models.blocks import find_blocks
from hf_kdtl.models.cutting.importance import first_order
from tests.models.cutting.test_cut import teacher_of
from tests.support.tiny import build


def rows(count=3, labels=True):
    pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [{"pixel_values": pixels[i], "labels": i % 3 if labels else -100} for i in range(count)]


def slope(model, data, scale):
    """d loss / d s at s = 1 where `scale(s)` puts hooks that multiply an output by s, by central differences."""
    pixels, labels = (torch.stack([torch.as_tensor(row[key]) for row in data]) for key in ("pixel_values", "labels"))
    values = []
    for s in (1 + 1e-5, 1 - 1e-5):
        handles = scale(s)
        with torch.no_grad():
            values.append(F.cross_entropy(model(pixel_values=pixels).logits, labels, reduction="sum"))
        for handle in handles:
            handle.remove()
    return float((values[0] - values[1]).abs() / 2e-5)


@pytest.mark.parametrize("family", ["vit", "dinov2_gated", "beit"])
def test_scores_are_the_slope_of_the_loss(family):
    model, data = teacher_of(family).double(), rows()
    found = first_order(model, data)

    def columns(module, chosen):
        def hook(s):
            def pre(_, args):
                mask = torch.ones(args[0].shape[-1], dtype=torch.float64)
                mask[chosen] = s
                return (args[0] * mask,)

            return [module.register_forward_pre_hook(pre)]

        return hook

    def whole(block):
        return lambda s: [block.register_forward_hook(lambda _, args, out: args[0] + s * (out - args[0]))]

    for i, (_, block) in enumerate(find_blocks(model)):
        assert float(found.blocks[i]) == pytest.approx(slope(model, data, whole(block)), rel=1e-4, abs=1e-8)
        assert len(found.heads[i]) == 2
        out = next(m for n, m in block.mlp.named_modules() if n in ("fc2", "down_proj", "weights_out"))
        for head in range(2):
            end = block.attention.output.dense if hasattr(block.attention, "output") else block.attention.o_proj
            expected = slope(model, data, columns(end, slice(16 * head, 16 * head + 16)))
            assert float(found.heads[i][head]) == pytest.approx(expected, rel=1e-4, abs=1e-8)
        for neuron in (0, 5):
            expected = slope(model, data, columns(out, neuron))
            assert float(found.neurons[i][neuron]) == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_distributions_and_several_labels_have_scores():
    model, data = teacher_of("vit").double(), rows()
    one_hot = [row | {"labels": F.one_hot(torch.tensor(row["labels"]), 3).double()} for row in data]
    assert torch.equal(first_order(model, one_hot).blocks, first_order(model, data).blocks)
    model.config.problem_type = "multi_label_classification"
    several = [row | {"labels": torch.tensor([1.0, 0.0, -100.0])} for row in data]
    several.append(data[0] | {"labels": torch.full((3,), -100.0)})
    (found, *_), (_, block) = first_order(model, several).blocks, find_blocks(model)[0]
    values = []
    for s in (1 + 1e-5, 1 - 1e-5):
        hook = block.register_forward_hook(lambda _, args, out, s=s: args[0] + s * (out - args[0]))
        logits = model.eval()(pixel_values=torch.stack([row["pixel_values"] for row in data])).logits[:, :2]
        values.append(F.binary_cross_entropy_with_logits(logits, torch.tensor([[1.0, 0.0]] * 3).double()) * 3)
        hook.remove()
    assert float(found) == pytest.approx(float((values[0] - values[1]).detach().abs() / 2e-5), rel=1e-4)


@pytest.mark.parametrize("name", ["vit", "convnext", "swin"])
def test_a_frozen_teacher_is_scored_and_left_as_it_was(name):
    teacher = Teacher(build(name))
    model = teacher.classifier()
    make_student(teacher, layers=0.5, importance="first_order", data=rows())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_highest_stay():
    teacher, data = build("vit", layers=4, num_attention_heads=4), rows(4)
    scores = first_order(teacher, data)
    student = make_student(teacher, layers=2, heads=1, mlp=5, importance="first_order", data=data)
    kept = sorted(scores.blocks.topk(2).indices.tolist())
    for mine, block in zip(student.vit.layers, kept, strict=True):
        its, head = teacher.vit.layers[block], int(scores.heads[block].argmax())
        neurons = scores.neurons[block].topk(5).indices.sort().values
        assert torch.equal(mine.attention.q_proj.weight, its.attention.q_proj.weight[8 * head : 8 * head + 8])
        assert torch.equal(mine.mlp.fc2.weight, its.mlp.fc2.weight[:, neurons])
        assert torch.equal(mine.mlp.fc1.bias, its.mlp.fc1.bias[neurons])


def test_one_bias_table_for_all_blocks_means_the_same_heads():
    teacher, data = teacher_of("beit_shared_bias", num_attention_heads=4), rows(4)
    head = int(sum(first_order(teacher, data).heads.values()).argmax())
    student = make_student(teacher, heads=1, importance="first_order", data=data)
    name = next(key for key in teacher.state_dict() if key.endswith("relative_position_bias_table"))
    assert torch.equal(student.state_dict()[name], teacher.state_dict()[name][:, head : head + 1])
    for mine, its in zip(student.beit.layers, teacher.beit.layers, strict=True):
        assert torch.equal(mine.attention.v_proj.weight, its.attention.v_proj.weight[8 * head : 8 * head + 8])


def test_a_family_that_cannot_be_cut_is_refused_before_it_is_scored():
    with pytest.raises(ValueError, match="ResNetForImageClassification is built in stages"):
        make_student(build("resnet"), layers=0.5, importance="first_order", data=rows(4))


def test_what_it_needs():
    vit = build("vit")
    for data in (None, []):
        with pytest.raises(ValueError, match="needs data: rows with pixel_values and labels"):
            make_student(vit, heads=1, importance="first_order", data=data)
    with pytest.raises(ValueError, match="needs images with labels"):
        make_student(vit, heads=1, importance="first_order", data=rows(labels=False))
    with pytest.raises(ValueError, match="ViTModel has no classifier; type importance='uniform'"):
        make_student(vit.vit, heads=1, importance="first_order", data=rows())
