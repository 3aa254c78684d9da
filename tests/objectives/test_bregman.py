"""The objective `bregman`: equal to the slow reference, for every kind of output, and what it refuses."""

import copy
import math

import pytest
import torch

from hf_kdtl.functional.bregman import fit
from hf_kdtl.models import Teacher, capture, plan
from hf_kdtl.models.bregman.layer import BregmanLayer, Provenance
from hf_kdtl.models.bregman.outputs import LINKS_OF
from hf_kdtl.models.run_context import RunContext
from hf_kdtl.objectives.bregman import Bregman
from tests.reference import bregman as slow
from tests.support.representations import complete, made_up
from tests.support.tiny import build

PIXELS = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def pair(student="vit", teacher="vit", dtype=torch.float64, **options):
    """A student and a deeper teacher with spread outputs."""
    models = [build(student, num_labels=4, image_size=16), build(teacher, num_labels=4, layers=3, image_size=16)]
    if options:
        models[1] = build(teacher, num_labels=4, image_size=16, **{"layers": 3} | options)
    torch.manual_seed(1)
    for model in models:
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return [model.to(dtype) for model in models]


def made(student, teacher, objective, pixels=PIXELS):
    """The objective, ready for this pair, and its value as a function of the student."""
    source, pixels = teacher if isinstance(teacher, Teacher) else Teacher(teacher), pixels.to(student.dtype)
    source.match(student, None, objective.compares_classes)
    pairing = plan(student, source, pixel_values=pixels)
    torch.manual_seed(0)
    objective.prepare(RunContext.of(student, {"teacher": source}))
    objective.build(pairing)
    objective.to(student.dtype)
    mine, its = objective.needs(pairing)

    def value(pixels=pixels):
        with torch.no_grad():
            signals = source.capture(pixels, its)
        return objective(capture(student, pixels, mine, pairing.student), signals, {})

    return value


def bregman(of, teacher, **options):
    return Bregman(**complete("bregman", {"representation": of, **options}, teacher))


@pytest.mark.parametrize("coefficients", [0.0, 0.5])
@pytest.mark.parametrize("of", LINKS_OF)
def test_agrees_with_the_reference(of, coefficients):
    student, teacher = pair()
    objective = bregman(of, teacher, coefficients=coefficients)
    value = made(student, teacher, objective)()
    pixels = PIXELS.double()
    expected = slow.bregman(student, teacher, pixels, None, coefficients=coefficients, objective=objective)
    assert value.shape == (4,) and value.min() > 1e-3
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-9)
    parameters = [*objective.head.parameters(), student.vit.layers[0].mlp.fc1.weight]
    for got, want in zip(*(torch.autograd.grad(v.sum(), parameters) for v in (value, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
        assert got.abs().max() > 1e-6


@pytest.mark.parametrize("link", ["tanh", "leaky_relu"])
def test_other_links_of_the_pooled_feature(link):
    student, teacher = pair()
    made_up(teacher, "pooled", link=link).save("layer")
    objective = Bregman(representation="layer")
    made(student, teacher, objective)
    mine, its = (capture(m, PIXELS.double(), objective.needs(None)[0]) for m in (student, teacher))
    its.pooled = its.pooled.tanh() if link == "tanh" else its.pooled  # no model here has a tanh pooler
    value, layer = objective(mine, its, {}), objective.layer
    for i in range(4):
        at, a = layer.before(objective.head(mine.pooled[i])), layer.link.inverse(its.pooled[i])
        assert value[i].item() == pytest.approx(slow.divergence(link, at, a), rel=1e-8)


def test_the_head_learns_what_can_be_learned():
    """A student that is its teacher, and k = full: a linear head can be exact, and the loss can go to 0."""
    _, teacher = pair()
    student = copy.deepcopy(teacher)
    pixels = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(5)).double()
    y = teacher(pixel_values=pixels).logits.softmax(-1)
    facts = {"width": 4, "dataset": "x", "images": 16, "version": "0"}
    BregmanLayer(fit(y, 3, "softmax"), Provenance.of_source(Teacher(teacher), "probabilities", None, **facts)).save(
        "layer"
    )
    objective = Bregman(representation="layer")
    value = made(student, teacher, objective, pixels)
    optimizer = torch.optim.LBFGS(objective.head.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def step():
        optimizer.zero_grad()
        loss = value().mean()
        loss.backward()
        return loss

    before = value().mean().item()
    optimizer.step(step)
    assert before > 0.1 and value().mean().item() < 1e-4 * before


def test_hidden_states_of_another_grid_and_prefix():
    """Each token is compared with the mean of those in its place; registers of the teacher are left out."""
    for student, teacher, options in (("vit", "vit", {"patch_size": 4}), ("siglip", "dinov2_with_registers", {})):
        mine, its = pair(student, teacher, **options)
        objective = bregman("hidden_states", its)
        value = made(mine, its, objective)
        assert value().shape == (4,) and objective.pair.teacher_layer == 2
        grid = objective.pair.student.grid
        tokens = capture(its, PIXELS.double(), objective.needs(None)[1]).hidden_states[2]
        prefix = len(objective.pair.teacher.prefix)
        side = math.isqrt(tokens.shape[1] - prefix)
        patches = tokens[:, prefix:].reshape(4, grid[0], side // grid[0], grid[1], side // grid[1], -1).mean((2, 4))
        y = patches.flatten(1, 2)
        features = capture(mine, PIXELS.double(), objective.needs(None)[0]).hidden_states[1]
        if "class" in objective.pair.student.prefix:
            y = torch.cat([tokens[:, :1], y], 1)
        expected = 0.5 * (objective.layer(objective.head(features)) - y).square().sum(-1).mean(1)
        torch.testing.assert_close(value(), expected)


def test_images_of_another_size_are_matched_on_their_own_grid():
    """64 x 128 pixels by an objective that was built for 128 x 64: as many tokens, on another grid."""
    student, teacher = build("dinov2", patch_size=16, image_size=64), build("dinov2", image_size=64, seed=3)
    x = torch.randn(2, 3, 64, 128, generator=torch.Generator().manual_seed(2))
    objectives = [bregman("hidden_states", teacher) for _ in range(2)]
    found = [
        made(student, teacher, objective, planned)(x)
        for objective, planned in zip(objectives, (x, x.transpose(2, 3)), strict=True)
    ]
    assert objectives[0].pair.student.grid != objectives[1].pair.student.grid
    torch.testing.assert_close(found[1], found[0])
    assert found[0].abs().min() > 0


def test_conv_teacher_and_conv_student():
    for student, teacher in (("vit", "resnet"), ("resnet", "vit")):
        mine, its = build(student, num_labels=4), build(teacher, num_labels=4, layers=2, seed=3)
        for of in ("probabilities", "pooled", "hidden_states"):
            objective = bregman(of, its)
            value = made(mine, its, objective, torch.randn(3, 3, 32, 32))()
            assert value.shape == (3,) and value.isfinite().all()


def test_the_classes_are_put_in_the_students_order():
    student, teacher = pair()
    names = ["ant", "bee", "cat", "dog"]
    student.config.id2label = teacher.config.id2label = dict(enumerate(names))
    folder = complete("bregman", {}, teacher)["representation"]
    same = made(student, teacher, Bregman(representation=folder))()
    order = [2, 0, 3, 1]
    student.config.id2label = {i: names[j] for i, j in enumerate(order)}
    objective = Bregman(representation=folder)
    torch.testing.assert_close(made(student, teacher, objective)(), same)  # a divergence does not see the order
    assert objective.layer.provenance.classes == [names[i] for i in order]
    torch.testing.assert_close(objective.layer.mean, Bregman(representation=folder).layer.mean.double()[order])
    other = Bregman(representation=folder, coefficients=1.0)
    again = made(student, teacher, other)()
    assert (again > same).all() and again.isfinite().all()


@pytest.mark.parametrize("of", LINKS_OF)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_at_saturated_outputs(of, dtype):
    student, teacher = pair(dtype=dtype)
    with torch.no_grad():
        teacher.classifier.bias.copy_(1e4 * torch.tensor([-1, 1, 1, -1]))
    objective = bregman(of, teacher, coefficients=1.0)
    value = made(student, teacher, objective)()
    grads = torch.autograd.grad(value.sum(), [*objective.parameters(), student.vit.layers[0].mlp.fc1.weight])
    assert value.isfinite().all() and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("of", LINKS_OF)
def test_no_gradient_reaches_the_teacher(of):
    student, teacher = pair()
    objective = bregman(of, teacher, coefficients=0.5)
    made(student, teacher, objective)
    teacher.requires_grad_(True)
    mine, its = (
        capture(m, PIXELS.double(), n) for m, n in zip((student, teacher), objective.needs(None), strict=True)
    )
    value = objective(mine, its, {}).sum()
    assert all(g is None for g in torch.autograd.grad(value, list(teacher.parameters()), allow_unused=True))


def test_autocast_keeps_the_divergence_in_float32():
    student, teacher = pair(dtype=torch.float32)
    for of in LINKS_OF:
        value = made(student, teacher, bregman(of, teacher, coefficients=0.1))
        plain = value()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = value()
        assert rounded.dtype == torch.float32
        torch.testing.assert_close(rounded, plain, rtol=0.1, atol=0.05)
    objective = bregman("pooled", teacher, coefficients=1.0)
    made(student, teacher, objective)
    mine, its = (capture(m, PIXELS, objective.needs(None)[0]) for m in (student, teacher))
    with torch.autocast("cpu", torch.bfloat16):
        value, c = objective(mine, its, {}), objective.head(mine.pooled).float()
    exact = objective.layer.link.divergence(objective.layer.before(c), its.pooled)
    exact = exact + (c - objective.layer.encode(its.pooled)).square().sum(-1)
    assert c.dtype == torch.float32 and ((value - exact) / exact).abs().max() < 1e-5


def test_what_is_saved_and_what_learns():
    student, teacher = pair()
    objective = bregman("probabilities", teacher)
    made(student, teacher, objective)
    assert set(objective.state_dict()) == {"head.weight", "head.bias", "layer.directions", "layer.mean"}
    assert {name for name, _ in objective.named_parameters()} == {"head.weight", "head.bias"}
    assert objective.head.weight.shape == (2, 32)
    (note,) = bregman("probabilities", teacher).prepare(RunContext())
    assert note.startswith("2 coefficients explain 80.0 % of the probabilities of ViTForImageClassification")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "representation is ''; expected the folder of one. Make it with hf-kdtl fit-representation"),
        ({"representation": 3}, "representation is 3"),
        ({"coefficients": -1.0}, "coefficients is -1.0; expected a number of at least 0"),
        ({"coefficients": True}, "coefficients is True"),
    ],
)
def test_options_are_checked(options, match):
    good = complete("bregman", {}, build("vit", image_size=16)) if "coefficients" in options else {}
    with pytest.raises(ValueError, match=match):
        Bregman(**good | options)


def test_a_folder_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"nowhere has no representation.json and no representation.safetens"):
        Bregman(representation="nowhere")


def refused(student, teacher, objective, match):
    with pytest.raises(ValueError, match=match):
        made(student, teacher, objective)


def test_the_representation_of_another_teacher_is_refused():
    student, teacher = pair()
    trained = copy.deepcopy(teacher)
    trained.vit.layers[0].mlp.fc1.bias.data[0] += 1e-6
    refused(student, trained, bregman("pooled", teacher), "is of ViTForImageClassification with weights .* and the te")
    renamed = copy.deepcopy(teacher)
    renamed.config.id2label = dict(enumerate("dcba"))
    teacher.config.id2label = student.config.id2label = dict(enumerate("abcd"))
    refused(student, renamed, bregman("probabilities", teacher), r"columns are \['a', 'b', .* teacher's \['d', 'c'")
    made(student, renamed, bregman("pooled", teacher))  # which has no classes


def test_layers_and_widths_that_are_not_there_are_refused():
    student, teacher = pair()
    with pytest.raises(ValueError, match="there is no teacher"):
        bregman("pooled", teacher).build(None)
    made_up(teacher, "hidden_states", layer=1).save("layer")
    refused(
        student, teacher, Bregman(representation="layer"), r"block 1, which no block .* one of a block among \[0, 2\]"
    )
    objective, larger = bregman("attention", teacher), torch.zeros(2, 3, 32, 32)
    pairing = plan(build("vit", num_labels=4), build("vit", num_labels=4, layers=3), pixel_values=larger)
    with pytest.raises(
        ValueError, match=r"attention of block 2 of ViT.*, width 5, .* rows of width 17 \(at images of 3"
    ):
        objective.build(pairing)
    with pytest.raises(ValueError, match="has the blocks 0 to 1, and attention of block 2 is asked"):
        objective.build(plan(student, build("vit", num_labels=4, image_size=16)))


def test_tokens_on_no_grid_are_refused():
    teacher = build("perceiver_conv", num_labels=4)
    source, objective = Teacher(teacher), bregman("hidden_states", teacher)
    pairing = plan(build("vit", num_labels=4), source, pixel_values=torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="the teacher's tokens are on no grid of the image"):
        objective.build(pairing)
