"""Objectives on pairs of models that differ in depth, heads, width, patch grid, prefix tokens and family."""

from dataclasses import replace

import pytest
import torch

from hf_kdtl.functional.attention import align_columns, attention_rows
from hf_kdtl.functional.random import Draws
from hf_kdtl.models import Teacher, capture, plan
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.objectives.paired import class_columns
from hf_kdtl.trainer.distiller import Distiller
from tests.support.tiny import build

VIT = ("vit", {})
ATTENTION = {
    "depth": (VIT, ("vit", {"layers": 5})),
    "deeper student": (("vit", {"layers": 4}), VIT),
    "heads": (("vit", {"num_attention_heads": 4}), VIT),
    "width": (VIT, ("vit", {"hidden_size": 48, "num_attention_heads": 3})),
    "finer teacher": (("vit", {"patch_size": 16}), VIT),
    "coarser teacher": (VIT, ("vit", {"patch_size": 16})),
    "distillation token": (VIT, ("deit", {})),
    "registers": (VIT, ("dinov2_with_registers", {})),
    "registers on both": (("dinov2_with_registers", {}), ("deit", {})),
    "position bias": (VIT, ("beit", {})),
    "biased student": (("beit", {}), VIT),
    "two towers": (VIT, ("clip", {})),
}
NO_CLASS = {"no class token": (("siglip", {}), VIT), "neither": (("ijepa", {}), ("siglip", {"layers": 3}))}
FEATURES = {
    "ViT <- ResNet": (VIT, ("resnet", {})),
    "ResNet <- ViT": (("resnet", {}), VIT),
    "Swin <- ViT": (("swin", {}), VIT),
    "ViT <- ConvNeXt": (VIT, ("convnext", {})),
    "PVT <- Swin": (("pvt", {}), ("swin", {})),
}
BIASED = ("position bias", "biased student")
OPTIONS = {
    "attention_map": [
        {},
        {"distance": "mse"},
        {"rows": "all"},
        {"rows": "all", "distance": "mse", "layers": "last"},
        {"rows": "all", "heads": "relation"},
        {"rows": "all", "heads": "relation", "relation_heads": 1},
    ],
    "relation": [{}, {"layers": "uniform"}],
    "attention_transfer": [{}, {"mode": "paper"}],
    "hidden_states": [
        {},
        {"distance": "cosine", "projector": "orthogonal"},
        {"distance": "smooth_l1", "normalize": "teacher"},
        {"normalize": "none", "layers": "last"},
    ],
}
INPUTS = {
    "pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4)),
    "labels": torch.tensor([0, 1, 2]),
}
DRAWS = Draws(0, 0, (0, 1, 2))


def _pair(student, teacher):
    return build(student[0], **student[1]), build(teacher[0], seed=5, **teacher[1])


def _distiller(student, teacher, name, options):
    return _distiller_of(student, teacher, {name: OBJECTIVES[name](**options)})


def _distiller_of(student, teacher, objectives):
    source = Teacher(teacher)
    source.match(student, None, False)
    torch.manual_seed(0)
    weights = dict.fromkeys(objectives, 1.0)
    return Distiller(student, objectives, weights, {"teacher": source}, {"teacher": plan(student, source)})


def _obey(student, teacher, objectives):
    """All on the same captures: one forward of each model, and one more with the images in another order."""
    distiller, order = _distiller_of(student, teacher, objectives), torch.tensor([2, 0, 1])
    found = distiller.terms(INPUTS, DRAWS)[1]
    with torch.no_grad():
        again = distiller.terms({k: v[order] for k, v in INPUTS.items()}, DRAWS.permuted(order))[1]
    assert found.keys() == objectives.keys()
    for key, values in found.items():
        assert values.shape == (3,) and torch.isfinite(values).all() and (values >= -1e-6).all(), key
        assert values.abs().max() > 1e-7, (key, "two different models agree")
        grads = torch.autograd.grad(values.sum(), list(student.parameters()), allow_unused=True, retain_graph=True)
        assert any(g is not None and g.abs().max() > 0 for g in grads), (key, "moves nothing")
        assert all(torch.isfinite(g).all() for g in grads if g is not None), key
        torch.testing.assert_close(again[key], values[order], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", [*ATTENTION, *NO_CLASS, *FEATURES])
def test_every_objective_obeys_on_every_pair(case):
    student, teacher = (ATTENTION | NO_CLASS | FEATURES)[case]
    objectives = {}
    for name, variants in OPTIONS.items():
        if case in FEATURES and name in ("attention_map", "relation"):
            continue
        for options in variants:
            if case in NO_CLASS and name == "attention_map" and "rows" not in options:
                continue
            if case in BIASED and "heads" in options:
                continue
            objectives[f"{name}_{len(objectives)}"] = OBJECTIVES[name](**options)
    _obey(*_pair(student, teacher), objectives)


@pytest.mark.parametrize("case", ATTENTION)
def test_every_row_sums_to_one_after_alignment(case):
    student, teacher = _pair(*ATTENTION[case])
    distiller = _distiller(student, teacher, "attention_map", {"rows": "all"})
    captured = distiller.teacher.capture(INPUTS["pixel_values"], distiller.source_needs["teacher"])
    for pair in distiller.plans["teacher"].pairs:
        a = captured.attention[pair.teacher_layer]
        rows = attention_rows(a.query, a.key, a.scale, a.bias, "all")
        keep = class_columns(pair)[1]
        aligned = align_columns(rows, keep, len(pair.teacher.prefix), pair.teacher.grid, pair.student.grid).exp()
        assert aligned.shape[-1] == len(keep) + pair.student.grid[0] * pair.student.grid[1]
        torch.testing.assert_close(aligned.sum(-1), torch.ones_like(aligned[..., 0]))


@pytest.mark.parametrize(
    ("case", "name", "options", "sentence"),
    [
        ("ViT <- ResNet", "attention_map", {}, "the teacher's block gives no attention.*these work: attention_trans"),
        ("Swin <- ViT", "attention_map", {}, "the student's block attends inside windows"),
        ("PVT <- Swin", "relation", {"layers": [[0, 0]]}, "attends to fewer keys than it has tokens"),
        ("no class token", "attention_map", {}, "the student has no class token; use rows='all'"),
        ("width", "hidden_states", {"projector": "identity"}, "widths are 32 and 48; use projector='linear'"),
        ("width", "relation", {"heads": 5}, "5 relation heads do not divide the width 32 and 48; expected one of"),
        ("heads", "relation", {"layers": [[0, 7]]}, "names block 7 of the teacher"),
    ],
)
def test_what_a_pair_cannot_give_is_refused_with_what_it_can(case, name, options, sentence):
    student, teacher = _pair(*(ATTENTION | NO_CLASS | FEATURES)[case])
    with pytest.raises(ValueError, match=f"objective '{name}': .*{sentence}"):
        _distiller(student, teacher, name, options)


def test_relation_heads_refuse_a_bias_that_belongs_to_other_heads():
    student, teacher = _pair(*ATTENTION["position bias"])
    distiller = _distiller(student, teacher, "attention_map", {"heads": "relation", "rows": "all"})
    with pytest.raises(ValueError, match=r"relative position bias.*use heads='mean'"):
        distiller.terms(INPUTS, DRAWS)


def test_a_student_with_a_distillation_token_can_use_both_heads():
    student, teacher = build("deit_teacher"), build("vit", seed=5)
    source = Teacher(teacher)
    source.match(student, None, True)
    objectives = {
        "task": OBJECTIVES["task"](head="class"),
        "logit_kd": OBJECTIVES["logit_kd"](head="distillation", hard=True),
    }
    distiller = Distiller(student, objectives, dict.fromkeys(objectives, 1.0), {"teacher": source})
    values = distiller.terms(INPUTS, DRAWS)[1]
    out = student(pixel_values=INPUTS["pixel_values"])
    log_class, log_token = (x.log_softmax(-1) for x in (out.cls_logits, out.distillation_logits))
    top = teacher(INPUTS["pixel_values"]).logits.argmax(-1)
    torch.testing.assert_close(values["task"], -log_class.gather(1, INPUTS["labels"][:, None])[:, 0])
    torch.testing.assert_close(values["logit_kd"], -log_token.gather(1, top[:, None])[:, 0])
    plain = Distiller(build("vit"), {"task": OBJECTIVES["task"](head="class")}, {"task": 1.0})
    with pytest.raises(ValueError, match=r"has no class head of its own.*leave head out"):
        plain.terms(INPUTS, DRAWS)


def value_of(name, models, size, planned, options):
    """Of images of `size`, by objectives that were built for images of the size `planned`."""
    student, teacher = models
    source = Teacher(teacher)
    source.match(student, None, True)
    torch.manual_seed(0)  # projectors
    objective = OBJECTIVES[name](**options)
    blank = torch.zeros(2, 3, *planned)
    made = Distiller(
        student,
        {name: objective},
        {name: 1.0},
        {"teacher": source},
        {"teacher": plan(student, source, pixel_values=blank)},
    )
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5))
    return made.terms({"pixel_values": x}, Draws(0, 0, (0, 1)))[1][name]


CONV = (("resnet", {}), ("convnext", {}))
SIZES = [
    ("attention_transfer", CONV, {}),
    ("hidden_states", CONV, {}),
    ("attention_jacobian", CONV, {"layers": "uniform"}),
    ("attention_map", (("dinov2", {"patch_size": 16}), ("dinov2", {})), {"rows": "all"}),
    ("relation", (("dinov2", {"patch_size": 16}), ("dinov2", {})), {}),
]


@pytest.mark.parametrize(("name", "pair", "options"), SIZES)
def test_images_of_another_size_are_matched_on_their_own_grid(name, pair, options):
    """64 x 128 in one batch, 128 x 64 in the next: as many patches, on another grid."""
    models = [build(family, image_size=64, seed=i, **over) for i, (family, over) in enumerate(pair)]
    expected = value_of(name, models, (128, 64), (128, 64), options)
    torch.testing.assert_close(value_of(name, models, (128, 64), (64, 128), options), expected)
    torch.testing.assert_close(
        value_of(name, models, (96, 64), (64, 128), options), value_of(name, models, (96, 64), (96, 64), options)
    )
    assert expected.abs().min() > 0


def test_a_pair_is_checked_again_at_another_size():
    """Tokens that lie on a grid at the plan's size, and on none at a batch's."""
    student, teacher = build("vit"), build("vit", seed=5)
    objective, planned = OBJECTIVES["attention_transfer"](), plan(student, teacher)
    objective.build(planned)
    x = INPUTS["pixel_values"]
    mine, its = (capture(m, x, n) for m, n in zip((student, teacher), objective.needs(planned), strict=True))
    assert objective.forward(mine, its, {}).shape == (3, len(objective.pairs))
    layers = tuple(replace(layer, grid=None) for layer in its.geometry.layers)
    its.geometry = replace(its.geometry, layers=layers)
    with pytest.raises(ValueError, match=r"the teacher's tokens are on no grid.*Name other layers"):
        objective.forward(mine, its, {})
