"""Fidelity: against the slow versions, its laws, and models that cannot give all of it."""

import copy
import doctest
import json
import math

import numpy as np
import pytest
import torch
from transformers import ViTImageProcessor

from hf_kdtl.evaluation import cka as c
from hf_kdtl.evaluation import fidelity as f
from hf_kdtl.models import Teacher, plan
from hf_kdtl.models.forward.capture import Needs, capture
from tests.reference import fidelity as reference
from tests.support.tiny import build


def images(number=6, seed=0, size=32):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed))


def features(number, widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(number, width, generator=generator, dtype=torch.float64) for width in widths]


def cka_of(*batches):
    found = c.CKA()
    for student, teacher in batches:
        found.update(student, teacher)
    return found.value()


def test_doctests():
    assert doctest.testmod(c).failed == 0 and doctest.testmod(c).attempted > 0
    assert doctest.testmod(f).failed == 0 and doctest.testmod(f).attempted > 0


# ---- CKA ----


def test_cka_is_the_slow_one():
    """Batches of different sizes, blocks of different widths, and features that have something in common."""
    batches = []
    for number, seed in ((9, 0), (5, 1), (4, 2)):
        student = features(number, (3, 7), seed)
        teacher = features(number, (4, 2, 5), seed + 10)
        teacher[1] = teacher[1] + student[0][:, :2]
        batches.append((student, teacher))
    found = cka_of(*batches)
    assert found.shape == (3, 2) and found.dtype == torch.float64
    for row in range(3):
        for column in range(2):
            expected = reference.cka([(s[column], t[row]) for s, t in batches])
            assert found[row, column].item() == pytest.approx(expected.item(), abs=1e-10)
    assert found[1, 0] > 0.2


@pytest.mark.parametrize("number", [4, 5, 32])
def test_cka_is_one_with_itself_whatever_the_rotation_the_scale_and_the_shift(number):
    batches = [features(number, (6, 6), seed) for seed in range(3)]
    turn = torch.linalg.qr(features(6, (6,), 7)[0]).Q
    wide = torch.linalg.qr(features(9, (6,), 8)[0]).Q.T  # into more dimensions
    for change in (lambda x: x, lambda x: x @ turn, lambda x: 1e-3 * x, lambda x: x + 100.0, lambda x: x @ wide - 5):
        found = cka_of(*[(b, [change(x) for x in b]) for b in batches])
        torch.testing.assert_close(found.diagonal(), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-9)
    stretched = cka_of(*[(b, [x * torch.arange(1.0, 7) for x in b]) for b in batches])
    assert stretched[0, 0] < 0.999  # stretching is not a rotation


def test_cka_between_two_stays_when_one_is_turned_and_scaled():
    s, t = features(12, (5,), 1)[0], features(12, (5,), 2)[0]
    turn = torch.linalg.qr(features(5, (5,), 3)[0]).Q
    one, other = cka_of(([s], [s + t])), cka_of(([7 * s @ turn + 3], [0.1 * (s + t)]))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert 0.1 < one.item() < 0.95


def test_cka_of_unrelated_features_is_0_in_the_mean_even_for_small_batches():
    def batch(seed):
        return features(8, (64,), seed), features(8, (64,), 9999 + seed)

    found = [cka_of(*[batch(50 * i + k) for k in range(10)]).item() for i in range(60)]
    spread = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found)) < 3 * spread and spread < 0.02
    assert min(found) < 0 < max(found) and max(map(abs, found)) <= 1


def test_cka_estimates_what_large_batches_have():
    s, t = features(4000, (3,), 1)[0], features(4000, (3,), 2)[0]
    t = t + 2 * s
    small = cka_of(*[([s[i : i + 8]], [t[i : i + 8]]) for i in range(0, 4000, 8)]).item()
    large = cka_of(([s[:2000]], [t[:2000]])).item()
    assert small == pytest.approx(large, abs=0.05)


def test_cka_counts_batches_by_their_images():
    """A large batch counts by its size: sums over b of n_b times the estimate."""
    small, large = [(features(n, (3,), n), features(n, (3,), n + 1)) for n in (4, 40)]
    expected = reference.cka([(s[0], t[0]) for s, t in (small, large)])
    assert cka_of(small, large).item() == pytest.approx(expected.item(), abs=1e-10)
    assert abs(cka_of(small, large) - cka_of(large)).item() < abs(cka_of(small, large) - cka_of(small)).item()


def test_cka_in_float32_with_a_large_mean():
    s = features(16, (8,), 1)[0]
    there = (s + 1e4).float()
    assert cka_of(([s], [there])).item() == pytest.approx(1, abs=1e-4)


def test_cka_of_a_constant_feature_is_not_a_number():
    constant = torch.full((6, 3), 0.1, dtype=torch.float32)
    found = cka_of(([constant, *features(6, (3,))], features(6, (3,))))
    assert math.isnan(found[0, 0]) and found[0, 1].item() == pytest.approx(1)


def test_cka_refuses():
    with pytest.raises(ValueError, match="a batch of 3 images; expected the same 4 or more"):
        cka_of((features(3, (2,)), features(3, (2,))))
    with pytest.raises(ValueError, match="a batch of 4 and 5 images"):
        cka_of((features(4, (2,)), features(5, (2,))))
    with pytest.raises(ValueError, match="no batch was added"):
        c.CKA().value()


# ---- Jacobian cosine ----


def matched(student, teacher, processors=(None, None)):
    made = Teacher(teacher, processors[1])
    made.match(student, processors[0], compare_classes=True)
    return made


def test_the_cosine_is_the_slow_one_through_another_processor_and_class_order():
    student, teacher = build("vit").double(), build("vit", layers=3, image_size=48, seed=3).double()
    student.config.id2label = {0: "ant", 1: "bee", 2: "cow"}
    teacher.config.id2label = {0: "cow", 1: "ant", 2: "bee"}
    own = ViTImageProcessor(size={"height": 32, "width": 32})
    its = ViTImageProcessor(size={"height": 48, "width": 48}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25])
    made, pixels = matched(student, teacher, (own, its)), images(5).double()
    found = f.jacobian_cosine(student, made, pixels)
    expected = reference.jacobian_cosine(
        lambda x: student(pixel_values=x).logits,
        lambda x: teacher(pixel_values=made.pixels(x)).logits[:, [1, 2, 0]],
        pixels,
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(f.jacobian_cosine(student, made, pixels[order]), found[order], rtol=0, atol=1e-10)
    assert len({round(v, 3) for v in found.tolist()}) == 5


def test_the_cosine_is_one_with_itself_and_blind_to_a_shift_and_a_scale_of_the_logits():
    student = build("vit").double()
    teacher = copy.deepcopy(student)
    ones = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(f.jacobian_cosine(student, matched(student, teacher), images(4).double()), ones)
    with torch.no_grad():  # a shift of all logits, by what the model sees
        teacher.classifier.weight += torch.randn(32, dtype=torch.float64)
    torch.testing.assert_close(f.jacobian_cosine(student, matched(student, teacher), images(4).double()), ones)


def test_the_cosine_leaves_no_gradient_and_knows_no_direction_of_zero():
    student, teacher = build("vit"), build("vit", seed=5)
    f.jacobian_cosine(student, matched(student, teacher), images(2))
    assert all(p.grad is None for p in (*student.parameters(), *teacher.parameters()))
    with torch.no_grad():
        teacher.classifier.weight.zero_()
    assert f.jacobian_cosine(student, matched(student, teacher), images(2)).tolist() == [0, 0]


# ---- Attention agreement ----


@pytest.mark.parametrize(
    ("name", "options"),
    [("vit", {"seed": 4}), ("dinov2_with_registers", {"image_size": 48}), ("deit_teacher", {}), ("beit", {})],
)
def test_agreement_is_the_slow_one(name, options):
    """Another grid, registers and a distillation token that are dropped, a relative position bias."""
    student, teacher = build("vit", num_attention_heads=4).double(), build(name, layers=3, **options).double()
    side = options.get("image_size", 32)
    seen, pixels = images(3, size=side).double(), images(3).double()
    pair = plan(student, teacher, [[1, 2]], pixels) if side == 32 else None
    if pair is None:  # each at its own size
        from hf_kdtl.models.forward.geometry import describe
        from hf_kdtl.models.pairing import PairingPlan

        pair = PairingPlan(describe(student, pixels), describe(teacher, seen), [[1, 2]])
    (pair,) = pair.pairs
    mine = capture(student, pixels, Needs(attention=frozenset({1}))).attention[1]
    its = capture(teacher, seen, Needs(attention=frozenset({2}))).attention[2]
    found = f.attention_agreement(pair, mine, its)
    student.set_attn_implementation("eager")
    teacher.set_attn_implementation("eager")
    weights_s = student(pixel_values=pixels, output_attentions=True).attentions[1]
    weights_t = teacher(pixel_values=seen, output_attentions=True).attentions[2]
    for i in range(3):
        rows = (
            reference.class_row(weights_s[i], len(pair.student.prefix), pair.student.grid, pair.student.grid),
            reference.class_row(weights_t[i], len(pair.teacher.prefix), pair.teacher.grid, pair.student.grid),
        )
        assert found[i].item() == pytest.approx(reference.agreement(*rows), abs=1e-6)
        assert 0 <= found[i] < 1


def test_agreement_of_blocks_without_attention_is_refused():
    (pair,) = plan(build("vit"), build("resnet"), "last", images(2)).pairs
    with pytest.raises(ValueError, match="the teacher's block has none"):
        f.attention_agreement(pair, None, None)


# ---- All of it ----


def found_by(student, teacher, *batches, **options):
    result = f.fidelity(student, teacher, batches or [images(6), images(6, 1)], **options)
    assert set(result) == {"images", "jacobian_cosine", "cka", "attention_agreement", "reasons"}
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    for name, reason in result["reasons"].items():
        assert result[name] is None and len(reason) > 20
    assert {k for k, v in result.items() if v is None} == set(result["reasons"])
    return result


def test_a_model_is_faithful_to_its_copy():
    student = build("vit", layers=3)
    result = found_by(student, copy.deepcopy(student))
    assert result["images"] == 12 and result["cka"]["images"] == 12 and not result["reasons"]
    assert 1 - 1e-5 < result["jacobian_cosine"] <= 1
    matrix = np.array(result["cka"]["matrix"])
    assert matrix.shape == (3, 3) and np.diag(matrix) == pytest.approx(1, abs=1e-6) and matrix[0, 2] < 0.999
    assert [(p["student"], p["teacher"]) for p in result["attention_agreement"]["pairs"]] == [(0, 0), (1, 1), (2, 2)]
    assert 1 - 1e-6 < result["attention_agreement"]["mean"] <= 1


def test_two_models_side_by_side():
    """What is gathered is what the parts give, whatever the batches; a last batch of 3 is left out of CKA alone."""
    student, teacher = build("vit"), build("vit", layers=4, seed=5)
    x = images(11)
    result = found_by(student, teacher, x[:4], x[4:8], x[8:])
    assert (result["images"], result["cka"]["images"]) == (11, 8)
    made = matched(student, teacher)
    assert result["jacobian_cosine"] == pytest.approx(f.jacobian_cosine(student, made, x).mean().item(), abs=1e-5)
    blocks = plan(student, teacher, "uniform", x)
    every = [Needs(hidden_states=frozenset(range(n)), attention=frozenset(range(n))) for n in (2, 4)]
    mine, its = capture(student, x, every[0]), capture(teacher, x, every[1])
    patches = [[h[:, 1:].mean(1) for h in got.hidden_states.values()] for got in (mine, its)]
    batches = [([h[i : i + 4] for h in patches[0]], [h[i : i + 4] for h in patches[1]]) for i in (0, 4)]
    torch.testing.assert_close(torch.tensor(result["cka"]["matrix"]), cka_of(*batches).float(), rtol=0, atol=1e-5)
    assert torch.tensor(result["cka"]["matrix"]).shape == (4, 2)
    for pair, got in zip(blocks.pairs, result["attention_agreement"]["pairs"], strict=True):
        expected = f.attention_agreement(
            pair, mine.attention[pair.student_layer], its.attention[pair.teacher_layer]
        ).mean()
        assert (got["student"], got["teacher"]) == (pair.student_layer, pair.teacher_layer)
        assert got["agreement"] == pytest.approx(expected.item(), abs=1e-5)
    only_last = found_by(student, teacher, x, layers="last")["attention_agreement"]["pairs"]
    assert [(p["student"], p["teacher"]) for p in only_last] == [(1, 3)]


@pytest.mark.parametrize(
    ("student", "teacher", "words"),
    [("vit", "resnet", "block has none"), ("swin", "vit", "in windows"), ("siglip", "vit", "no class token")],
)
def test_models_without_such_attention_give_none_and_the_reason(student, teacher, words):
    result = found_by(build(student), build(teacher, seed=5))
    assert set(result["reasons"]) == {"attention_agreement"} and words in result["reasons"]["attention_agreement"]
    assert all(v is not None for row in result["cka"]["matrix"] for v in row)


def test_models_of_other_classes_have_no_common_class_to_differentiate():
    result = found_by(build("vit"), build("vit", num_labels=5, seed=5))
    assert set(result["reasons"]) == {"jacobian_cosine"} and "5" in result["reasons"]["jacobian_cosine"]


def test_batches_of_another_size_are_compared_on_their_own_grid():
    """128 x 64 pixels after 64 x 128, and the other way round: as many patches, on another grid."""
    student, teacher = build("dinov2", patch_size=16, image_size=64), build("dinov2", image_size=64, seed=5)
    wide = torch.randn(4, 3, 64, 128, generator=torch.Generator().manual_seed(1))
    tall = torch.randn(4, 3, 128, 64, generator=torch.Generator().manual_seed(2))
    found = [found_by(student, teacher, *batches)["attention_agreement"] for batches in ((wide, tall), (tall, wide))]
    assert found[0]["mean"] == pytest.approx(found[1]["mean"], rel=1e-6) and found[0]["mean"] > 0


def test_small_batches_have_no_cka():
    student, teacher = build("vit"), build("vit", seed=5)
    result = found_by(student, teacher, images(3), images(2, 1))
    assert set(result["reasons"]) == {"cka"} and result["images"] == 5


def test_a_constant_block_is_null_in_the_matrix():
    class Constant(torch.nn.Module):
        def forward(self, hidden, *args, **kwargs):
            return torch.zeros_like(hidden) + hidden * 0

    student, teacher = build("vit"), build("vit", seed=5)
    teacher.vit.layers[1] = Constant()
    result = f.fidelity(student, teacher, [images(6)])
    assert result["cka"]["matrix"][1] == [None, None] and None not in result["cka"]["matrix"][0]


def test_the_student_is_judged_in_eval_mode_and_left_as_it_was():
    student, teacher = build("vit", hidden_dropout_prob=0.5), build("vit", seed=5)
    expected = found_by(student, teacher)
    assert found_by(student.train(), teacher) == expected and student.training
    assert all(p.requires_grad and p.grad is None for p in student.parameters())


def test_the_teacher_is_matched_by_name_and_a_given_one_stays_as_it_is():
    student, other, teacher = build("vit"), build("vit", seed=7), build("vit", seed=5)
    for model, names in ((student, "abc"), (other, "bca"), (teacher, "cab")):
        model.config.id2label = dict(enumerate(names))
    given, x = matched(other, teacher), images(6)
    before = given.capture(x, Needs()).logits
    expected = f.jacobian_cosine(student, matched(student, teacher), x).mean().item()
    assert found_by(student, given, x)["jacobian_cosine"] == pytest.approx(expected, abs=1e-6)
    assert torch.equal(given.capture(x, Needs()).logits, before)


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_a_students_precision(name):
    half, single = found_by(build(name).bfloat16(), build("vit", seed=5)), found_by(build(name), build("vit", seed=5))
    assert half["jacobian_cosine"] == pytest.approx(single["jacobian_cosine"], abs=0.05)
    np.testing.assert_allclose(half["cka"]["matrix"], single["cka"]["matrix"], atol=0.05)


def test_refused():
    student, teacher = build("vit"), build("vit", seed=5)
    with pytest.raises(ValueError, match="there is no image"):
        f.fidelity(student, teacher, [])
    with pytest.raises(ValueError, match="layers is 'unifrom'"):
        f.fidelity(student, teacher, [images(4)], layers="unifrom")
    with pytest.raises(ValueError, match="share parameters"):
        f.fidelity(student, student, [images(4)])
    with pytest.raises(ValueError, match="student's is unknown"):
        f.fidelity(student, Teacher(teacher, ViTImageProcessor()), [images(4)])
