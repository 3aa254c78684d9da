"""What every objective must obey, over all of the registry: a class added later is tested without a new file."""

import copy

import pytest
import torch

from hf_kdtl import DistillationConfig
from hf_kdtl.functional.random import Draws
from hf_kdtl.models import Teacher, capture, plan
from hf_kdtl.models.teachers.start import StartingPoint
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.trainer.distiller import Distiller
from tests.objectives.derivative_variants import takes_differences
from tests.objectives.variants import CASES, FURTHER
from tests.reference.bregman import bregman
from tests.reference.derivatives import REFERENCES_DERIVATIVES
from tests.reference.embeddings import EMBEDDINGS
from tests.reference.objectives import REFERENCES as UNPAIRED
from tests.reference.paired import PAIRED
from tests.reference.start import START
from tests.support.representations import complete
from tests.support.tiny import build

REFERENCES = UNPAIRED | PAIRED | REFERENCES_DERIVATIVES | START | EMBEDDINGS | {"bregman": bregman}
IMAGES, CLASSES, SIZE = 5, 4, 16
DRAWS = Draws(seed=7, step=3, positions=tuple(range(IMAGES)))


def _models(dtype=torch.float64):
    student, teacher = (build("vit", num_labels=CLASSES, layers=n, image_size=SIZE).to(dtype) for n in (2, 3))
    # A random model is too sure of nothing: spread the logits.
    torch.manual_seed(1)
    for model in (student, teacher):
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return student, teacher


def _distiller(name, options, student, teacher):
    """With the teacher in the start's place, where an objective compares with that."""
    objective, dtype = OBJECTIVES[name](**complete(name, options, teacher)), next(student.parameters()).dtype
    source = StartingPoint(teacher) if objective.source == "start" else Teacher(teacher)
    if objective.source == "teacher":
        source.match(student, None, objective.compares_classes)
    pairing = plan(student, source) if objective.needs_plan else None
    sides = {objective.source: source}, {objective.source: pairing}
    distiller = Distiller(student, {name: objective}, {name: 1.0}, *sides).to(dtype)
    if objective.sample:
        generator = torch.Generator().manual_seed(4)
        pixels = torch.randn(16, 3, SIZE, SIZE, generator=generator).to(dtype)
        distiller.observe(lambda number: [{"pixel_values": pixels, "labels": torch.arange(16) % CLASSES}])
    return distiller


def _inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(IMAGES, 3, SIZE, SIZE, generator=generator).to(dtype)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 3, -100, 1, 2])}


def _value(distiller, inputs, draws=DRAWS):
    ((_, value),) = distiller.terms(inputs, draws)[1].items()
    return value


@pytest.mark.parametrize("name", OBJECTIVES)
def test_has_a_reference_and_says_where_it_comes_from(name):
    assert name in REFERENCES, f"write tests/reference/objectives.py:{name}"
    doc = OBJECTIVES[name].__doc__
    assert doc and "Cost:" in doc and "Raises:" in doc and "Args:" in doc


def _reference(name, options, distiller, student, teacher, inputs, draws):
    """What the slow reference gives, with what it cannot know: random draws, projectors, the default step."""
    arguments, known = (student, teacher, inputs["pixel_values"], inputs["labels"]), dict(options)
    objective = distiller.objective(name)
    if name == "hidden_states":
        known["projectors"] = objective.projectors
    if options.get("of") == "embedding":
        known["projectors"] = [objective.projector]
    if name in EMBEDDINGS:
        known["projectors"] = [objective.projector, getattr(objective, "patch_projector", None)]
    if name == "lwf":
        known["head"] = objective.head
    if name == "bregman":
        known["objective"] = objective
    if name == "delta":
        known["importance"] = list(objective.buffers())
    if name in REFERENCES_DERIVATIVES:
        arguments += (draws,)
        if getattr(objective, "choice", None) and objective.choice.estimator == "finite_difference":
            known |= {"step": objective.choice.step, "estimator": "finite_difference"}
    return REFERENCES[name](*arguments, **known)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_value_and_gradient_agree_with_the_reference(name, options):
    _agrees(name, options)


@pytest.mark.parametrize(("name", "options"), FURTHER)
def test_every_combination_agrees_with_the_reference(name, options):
    _agrees(name, options)


def _agrees(name, options):
    """On three of the images, one of them without a label: the references are slow."""
    some = torch.tensor([0, 2, 3])
    inputs, draws = {k: v[some] for k, v in _inputs().items()}, DRAWS.permuted(some)
    student, teacher = _models()
    distiller = _distiller(name, options, student, teacher)
    value = _value(distiller, inputs, draws)
    expected = _reference(name, options, distiller, student, teacher, inputs, draws)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10)
    weights = torch.linspace(0.5, 2.0, value.numel(), dtype=torch.float64).reshape(value.shape)
    parameters = [p for p in distiller.parameters() if p.requires_grad]
    got = torch.autograd.grad((weights * value).sum(), parameters, allow_unused=True)
    want = torch.autograd.grad((weights * expected).sum(), parameters, allow_unused=True)
    assert any(g is not None and g.abs().max() > 1e-6 for g in got), "the objective moves nothing"
    # The central difference inside split has the error of its step; every other estimator is its reference.
    by_step = options.get("estimator") == "split" and options.get("central")
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if by_step else {"rtol": 1e-7, "atol": 1e-9}
    for g, w, p in zip(got, want, parameters, strict=True):
        zero = torch.zeros_like(p)  # one way of computing touches a parameter that another does not
        torch.testing.assert_close(zero if g is None else g, zero if w is None else w, **tolerance)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_is_zero_where_student_and_teacher_agree(name, options):
    _, teacher = _models()
    distiller = _distiller(name, options, copy.deepcopy(teacher), teacher)
    value = _value(distiller, _inputs())
    if distiller.objective(name).divergence:
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
    else:
        assert value.abs().max() > 1e-3


@pytest.mark.parametrize(("name", "options"), CASES)
def test_no_gradient_reaches_the_teacher(name, options):
    student, teacher = _models()
    distiller = _distiller(name, options, student, teacher)
    inputs = _inputs()
    objective = distiller.objective(name)
    given, source = distiller.plans.get(objective.source), distiller.sources[objective.source]
    source.model.requires_grad_(True)  # even where someone forgot to freeze it
    needs = distiller.source_needs[objective.source]
    signals = source.capture(inputs["pixel_values"], needs, {"draws": DRAWS})
    assert signals.logits.requires_grad or needs.sketches  # which leave no graph
    if distiller.start is not None:
        signals.weights = distiller.start.weights(student)
    mine = capture(student, inputs["pixel_values"], distiller.student_needs, given and given.student)
    value = objective(mine, signals, {"labels": inputs["labels"], "draws": DRAWS})
    grads = torch.autograd.grad(value.sum(), list(source.model.parameters()), allow_unused=True)
    assert all(g is None for g in grads)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_has_the_shape_it_promises_and_permutes_with_the_images(name, options):
    distiller = _distiller(name, options, *_models())
    inputs, order = _inputs(), torch.tensor([3, 0, 4, 1, 2])
    permuted = _value(distiller, {k: v[order] for k, v in inputs.items()}, DRAWS.permuted(order))
    value = _value(distiller, inputs)
    batch_statistic = distiller.objective(name).reduction == "batch"
    assert value.shape == (() if batch_statistic else (IMAGES,))
    assert value.dtype == torch.float64 and value.requires_grad
    torch.testing.assert_close(permuted, value if batch_statistic else value[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_stays_finite_at_extreme_logits(name, options, dtype):
    student, teacher = _models(dtype)
    with torch.no_grad():
        for model, signs in ((student, (1, -1, 1, -1)), (teacher, (-1, 1, 1, -1))):
            model.classifier.bias.copy_(1e4 * torch.tensor(signs))
    if dtype == torch.bfloat16 and takes_differences(options):
        with pytest.raises(ValueError, match="less than 32 bits"):
            _distiller(name, options, student, teacher)
        return
    distiller = _distiller(name, options, student, teacher)
    value = _value(distiller, _inputs(dtype))
    assert torch.isfinite(value).all()
    grads = torch.autograd.grad(value.sum(), list(student.parameters()), allow_unused=True)
    assert all(torch.isfinite(g).all() for g in grads if g is not None)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_config_round_trips_and_refuses_an_unknown_key(name, options, tmp_path):
    entries = [{"name": name, "weight": 0.5, **complete(name, options, _models()[1])}]
    config = DistillationConfig(str(tmp_path), objectives=entries)
    again = DistillationConfig(**{k: v for k, v in config.to_dict().items() if not k.endswith("_token")})
    assert again.objectives == entries and again.weights() == {name: 0.5}
    with pytest.raises(ValueError, match=f"unknown option of objective '{name}': 'wieght'. Did you mean 'weight'"):
        DistillationConfig(str(tmp_path), objectives=[{"name": name, "wieght": 1}])
