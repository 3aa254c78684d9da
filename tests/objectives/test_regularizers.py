"""What holds a student to its start: weights, features, answers; and shrinkage of its features."""

import copy

import pytest
import torch
from scipy.stats import spearmanr

from hf_kdtl.functional.divergences import cross_entropy
from hf_kdtl.functional.random import Draws
from hf_kdtl.models import Teacher, capture, plan
from hf_kdtl.models.teachers.start import StartingPoint
from hf_kdtl.objectives.lwf import LwF
from hf_kdtl.objectives.regularizers import BSS, L2SP, PROBE_C, Delta, linear_probe
from hf_kdtl.trainer.distiller import Distiller, micro_batch_counts
from tests.reference import start as slow
from tests.support.tiny import build

IMAGES, CLASSES, SIZE = 6, 4, 16


def _model(seed=0, dtype=torch.float64, **settings):
    """A random ViT that is moved away from its first weights, so that no two channels do the same."""
    model = build("vit", seed=seed, image_size=SIZE, **({"num_labels": CLASSES} | settings)).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model


def _inputs(number=IMAGES, dtype=torch.float64):
    pixels = torch.randn(number, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2)).to(dtype)
    return {"pixel_values": pixels, "labels": torch.arange(number) % CLASSES}


def _distiller(objective, student, start=None, teacher=None):
    source, held = teacher and Teacher(teacher), start and StartingPoint(start)
    if source:
        source.match(student, None, objective.compares_classes)
    sources = {"teacher": source, "start": held}
    plans = {name: one and plan(student, one) for name, one in sources.items()}
    made = Distiller(student, {"it": objective}, {"it": 1.0}, sources, plans)
    return made.to(next(student.parameters()).dtype)


def _value(distiller, inputs):
    return distiller.terms(inputs, Draws(0, 0, tuple(range(len(inputs["pixel_values"])))))[1]["it"]


def _agree(distiller, value, expected):
    """Same value and same gradient for every parameter."""
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)
    gradients = []
    for result in (value, expected):
        weights = torch.linspace(0.5, 2.0, result.numel(), dtype=result.dtype).reshape(result.shape)
        found = torch.autograd.grad((weights * result).sum(), list(distiller.parameters()), allow_unused=True)
        pairs = zip(found, distiller.parameters(), strict=True)
        gradients.append([torch.zeros_like(p) if g is None else g for g, p in pairs])
    assert any(g.abs().max() > 1e-6 for g in gradients[0]), "nothing to compare: no gradient"
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


# --- l2_sp


@pytest.mark.parametrize("options", [{}, {"head_weight": 0.5}])
def test_l2_sp_agrees_with_the_reference(options):
    student, start, inputs = _model(), _model(1), _inputs()
    distiller = _distiller(L2SP(**options), student, start)
    _agree(distiller, _value(distiller, inputs), slow.l2_sp(student, start, **inputs, **options))


def test_l2_sp_is_zero_at_the_start_and_takes_no_notice_of_frozen_weights():
    start, inputs = _model(), _inputs()
    student = copy.deepcopy(start)
    distiller = _distiller(L2SP(), student, start)
    assert (value := _value(distiller, inputs)) == 0
    assert torch.autograd.grad(value, student.classifier.weight, allow_unused=True) == (None,)
    with torch.no_grad():
        student.vit.layers[0].mlp.fc1.weight += 1
        student.classifier.weight += 1
    assert _value(distiller, inputs).item() == pytest.approx(student.vit.layers[0].mlp.fc1.weight.numel() / 2)
    student.vit.layers[0].requires_grad_(False)
    assert _value(distiller, inputs) == 0
    student.vit.requires_grad_(False)
    with pytest.raises(ValueError, match=r"only 2 tensors of the head are trained\. Unfreeze the backbone"):
        _value(distiller, inputs)


@pytest.mark.parametrize("sizes", [(6,), (1, 5), (2, 2, 2), (4, 2)])
def test_l2_sp_does_not_depend_on_the_split(sizes):
    student, start, inputs = _model(), _model(1), _inputs()
    distiller = _distiller(L2SP(head_weight=0.5), student, start)
    counts = micro_batch_counts(inputs)
    parts = [dict(zip(inputs, part, strict=True)) for part in zip(*(v.split(sizes) for v in inputs.values()))]  # noqa: B905
    loss = sum(distiller(part, Draws(0, 0, tuple(range(len(part["labels"])))), counts)["loss"] for part in parts)
    torch.testing.assert_close(loss.double(), _value(distiller, inputs), rtol=1e-6, atol=0)


def _task_gradient(student, inputs):
    loss = torch.nn.functional.cross_entropy(student(inputs["pixel_values"]).logits, inputs["labels"])
    return torch.autograd.grad(loss, list(student.parameters()))


def test_an_sgd_step_with_l2_sp_is_the_decoupled_step():
    student, start, inputs, lr, weight = _model(), _model(1), _inputs(), 0.1, 0.3
    then = dict(start.named_parameters())
    task = _task_gradient(student, inputs)
    expected = {
        name: (w - lr * (g + (0 if name.startswith("classifier") else weight * (w - then[name])))).detach()
        for (name, w), g in zip(student.named_parameters(), task, strict=True)
    }
    loss = torch.nn.functional.cross_entropy(student(inputs["pixel_values"]).logits, inputs["labels"])
    (loss + weight * _value(_distiller(L2SP(), student, start), inputs)).backward()
    torch.optim.SGD(student.parameters(), lr=lr).step()
    for name, w in student.named_parameters():
        torch.testing.assert_close(w.detach(), expected[name], rtol=1e-12, atol=1e-12)


def test_l2_sp_from_zero_is_weight_decay():
    student, inputs, weight = _model(), _inputs(), 0.3
    other, start = copy.deepcopy(student), copy.deepcopy(student)
    for parameter in start.parameters():
        parameter.data.zero_()
    distiller = _distiller(L2SP(head_weight=1.0), student, start)
    optimizers = (
        torch.optim.SGD(student.parameters(), 0.1),
        torch.optim.SGD(other.parameters(), 0.1, weight_decay=weight),
    )
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(student(inputs["pixel_values"]).logits, inputs["labels"])
        (loss + weight * _value(distiller, inputs)).backward()
        for parameter, gradient in zip(other.parameters(), _task_gradient(other, inputs), strict=True):
            parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# --- delta


def _shown(start, objective, inputs):
    """What a Distiller shows an objective of its sample."""
    needs = objective.sample_needs(None)
    return capture(start, inputs["pixel_values"], needs)


def _measured(options, student, start, inputs):
    objective = Delta(**options)
    distiller = _distiller(objective, student, start)
    objective.observe([(_shown(start, objective, inputs), inputs["labels"])])
    return distiller, objective


@pytest.mark.parametrize("options", [{}, {"layers": "last"}, {"layers": [0, -1], "sample": 8}, {"layers": [1]}])
def test_delta_agrees_with_the_reference(options):
    student, start, inputs = _model(layers=3), _model(1, layers=3), _inputs(8)
    distiller, objective = _measured(options, student, start, inputs)
    importance = [weights.clone() for weights in objective.buffers()]
    assert len(importance) == {"all": 3, "last": 1}.get(str(layers := options.get("layers", "all")), len(layers))
    few = {k: v[:3] for k, v in inputs.items()}
    expected = slow.delta(student, start, **few, importance=importance, **options)
    _agree(distiller, _value(distiller, few), expected)
    same = _distiller(objective := Delta(**options), copy.deepcopy(start), start)
    objective.observe([(_shown(start, objective, inputs), inputs["labels"])])
    assert (_value(same, few) == 0).all()


def test_channels_are_weighed_by_how_much_the_loss_needs_them():
    """To first order exactly, against differences; and leaving each channel out really ranks them much alike."""
    start, inputs = _model(), _inputs(16)
    _, objective = _measured({}, _model(1), start, inputs)
    weight, bias = linear_probe(slow.pooled(start, inputs["pixel_values"]).detach(), inputs["labels"])
    for layer, weights in enumerate(objective.buffers()):

        def loss(features):
            return cross_entropy(features @ weight.T + bias, inputs["labels"]).sum()

        first = slow.rises(start, inputs["pixel_values"], layer, loss, step=1e-4)
        torch.testing.assert_close(weights, slow.importance(first), rtol=1e-5, atol=1e-7)
        left_out = slow.rises(start, inputs["pixel_values"], layer, loss)
        assert spearmanr(left_out, weights).statistic > 0.6
        assert weights.max() / weights.min() > 1.5, "all channels alike"


def test_unlabelled_images_are_left_out_and_soft_labels_count_by_their_largest():
    student, start, inputs = _model(1), _model(), _inputs(12)
    hard = inputs["labels"]
    full = list(_measured({}, student, start, inputs)[1].buffers())
    soft = torch.nn.functional.one_hot(hard, CLASSES) * 0.5 + 0.125
    for a, b in zip(_measured({}, student, start, inputs | {"labels": soft})[1].buffers(), full, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    some = {k: v[:9] for k, v in inputs.items()}
    known = list(_measured({}, student, start, some)[1].buffers())
    for labels, unknown in ((hard, -100), (soft, -100.0)):
        marked = labels.clone()
        marked[9:] = unknown
        found = _measured({}, student, start, inputs | {"labels": marked})[1].buffers()
        for a, b, other in zip(found, known, full, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
            assert (a - other).abs().max() > 1e-6


def test_delta_is_measured_once_and_saved():
    student, start, inputs = _model(1), _model(), _inputs(8)
    distiller, objective = _measured({}, student, start, inputs)
    again = _distiller(Delta(), student, start)
    with pytest.raises(ValueError, match="delta has not measured how much each channel matters"):
        _value(again, inputs)
    assert {"importance_0", "importance_1"} <= objective.state_dict().keys()
    again.objective("it").load_state_dict(objective.state_dict())
    torch.testing.assert_close(_value(again, inputs), _value(distiller, inputs), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda labels: None, "the data has none. Give the training data a column 'labels'"),
        (lambda labels: torch.zeros_like(labels), "8 labelled images of 1 classes.*Raise sample, or label more"),
        (lambda labels: torch.arange(8), "8 labelled images of 8 classes.*Raise sample"),
        (lambda labels: torch.full_like(labels, -100), "0 labelled images of 0 classes"),
    ],
)
def test_delta_refuses_a_sample_that_teaches_nothing(change, sentence):
    start, inputs, objective = _model(), _inputs(8), Delta()
    _distiller(objective, _model(1), start)
    with pytest.raises(ValueError, match=sentence):
        objective.observe([(_shown(start, objective, inputs), change(inputs["labels"]))])


def test_delta_works_on_maps_and_refuses_another_architecture():
    student, start = (build("resnet", seed=s, num_labels=CLASSES) for s in (0, 1))
    pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    inputs = {"pixel_values": pixels, "labels": torch.arange(8) % CLASSES}
    distiller, objective = _measured({}, student, start, inputs)
    widths = [layer.width for layer in distiller.plans["start"].student.layers]
    assert [len(weights) for weights in objective.buffers()] == widths
    value = _value(distiller, inputs)
    assert value.shape == (8,) and (value > 0).all()
    with pytest.raises(ValueError, match=r"student block 0.*32\) and its start .*48\); expected the same"):
        _distiller(Delta(), _model(), _model(hidden_size=48, num_attention_heads=3))


def test_a_linear_probe_is_the_minimum_of_its_loss():
    for classes in (2, 3):
        x, y = torch.randn(30, 5, dtype=torch.float64) * 7 + 3, torch.arange(30) % classes
        x[:, 4] = 1.0  # a dead channel
        weight, bias = linear_probe(x, y)
        std = torch.where(x.std(0, correction=0) > 0, x.std(0, correction=0), 1.0)
        scaled, shift = (weight * std).requires_grad_(), bias.clone().requires_grad_()
        loss = cross_entropy(x @ (scaled / std).T + shift, y).sum()
        # Of two classes one difference of weights is fitted, whose square is twice the sum of both halves'.
        penalty = scaled.square().sum() / (2 * PROBE_C) * (2 if classes == 2 else 1)
        gradients = torch.autograd.grad(loss + penalty, [scaled, shift])
        assert max(g.abs().max() for g in gradients) < 1e-4 and weight.abs().max() > 1e-3
        assert linear_probe(x.float(), y)[0].dtype == linear_probe(x.bfloat16(), y)[0].dtype == torch.float32
        assert torch.equal(linear_probe(x, y)[0], weight)


# --- bss


@pytest.mark.parametrize("k", [1, 3])
def test_bss_agrees_with_the_reference_and_depends_on_the_split(k):
    student, inputs = _model(), _inputs()
    distiller = _distiller(BSS(k=k), student)
    value = _value(distiller, inputs)
    assert value.shape == () and value > 1e-6
    _agree(distiller, value, slow.bss(student, None, **inputs, k=k))
    halves = [_value(distiller, {name: v[part] for name, v in inputs.items()}) for part in (slice(4), slice(2, 6))]
    assert all((half - value).abs() / value > 1e-2 for half in halves)
    with pytest.raises(ValueError, match=f"k is {k} and the features are {k} images x 32 channels"):
        _value(distiller, {name: v[:k] for name, v in inputs.items()})


# --- lwf


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "freeze_head": True}, {"source": "start"}])
@pytest.mark.parametrize("classes", [CLASSES, 7])
def test_lwf_agrees_with_the_reference(options, classes):
    student, other, inputs = _model(), _model(1, num_labels=classes), _inputs(3)
    objective = LwF(**options)
    distiller = _distiller(objective, student, **{options.get("source", "teacher"): other})
    assert objective.needs_teacher == (objective.source == "teacher")
    torch.testing.assert_close(objective.head.weight, other.classifier.weight, rtol=1e-7, atol=0)
    assert objective.head.weight is not other.classifier.weight
    with torch.no_grad():  # as if it had been trained
        objective.head.weight += 0.1
    trained = [p for p in distiller.parameters() if p.requires_grad]
    assert len(trained) == len(list(student.parameters())) + (0 if objective.freeze_head else 2)
    for parameter in distiller.parameters():
        parameter.requires_grad_(True)
    expected = slow.lwf(student, other, **inputs, head=objective.head, **options)
    _agree(distiller, _value(distiller, inputs), expected)


@pytest.mark.parametrize("freeze", [False, True])
def test_lwf_is_zero_at_the_source_and_its_head_trains_along_unless_frozen(freeze):
    source, inputs = _model(num_labels=7), _inputs()
    student = copy.deepcopy(source)
    objective = LwF(source="start", freeze_head=freeze)
    distiller = _distiller(objective, student, source)
    torch.testing.assert_close(_value(distiller, inputs), torch.zeros(IMAGES, dtype=torch.float64), rtol=0, atol=1e-12)
    with torch.no_grad():
        student.vit.layers[1].mlp.fc2.weight.normal_(std=0.3)
    before, head = _value(distiller, inputs).mean(), objective.head.weight.detach().clone()
    assert before > 1e-3
    optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=0.02)
    for _ in range(10):
        _value(distiller, inputs).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert _value(distiller, inputs).mean() < 0.9 * before
    assert torch.equal(objective.head.weight, head) == freeze
    assert objective.state_dict().keys() == {"head.weight", "head.bias"}


def test_lwf_between_widths_starts_at_random_and_refuses_to_freeze_that():
    student, teacher, inputs = _model(), _model(1, num_labels=7, hidden_size=48, num_attention_heads=3), _inputs()
    objective = LwF()
    distiller = _distiller(objective, student, teacher=teacher)
    assert objective.head.weight.shape == (7, 32) and objective.head.weight.requires_grad
    value = _value(distiller, inputs)
    assert value.shape == (IMAGES,) and (value > 0).all()
    assert torch.autograd.grad(value.sum(), objective.head.weight)[0].abs().max() > 1e-6
    with pytest.raises(ValueError, match=r"32 channels where the teacher's head reads 48.*Set freeze_head to false"):
        _distiller(LwF(freeze_head=True), student, teacher=teacher)


def test_what_has_no_source_or_no_classifier_is_refused():
    for objective, who in ((LwF(source="start"), "start"), (LwF(), "teacher"), (Delta(), "start")):
        with pytest.raises(ValueError, match=f"{who}.*there is none"):
            objective.build(None)
    student = _model()
    student.config.num_labels = 9  # no linear layer has as many outputs
    with pytest.raises(ValueError, match="ViTForImageClassification has no single linear classifier with one"):
        LwF().build(plan(_model(1), student))
    second = LwF()
    second.build(plan(student, _model(1)))  # it reads the embedding, which needs no classifier
    assert second.head.in_features == student.config.hidden_size


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        (L2SP, {"head_weight": -1}, "'l2_sp': head_weight is -1; expected a number of at least 0"),
        (L2SP, {"head_weight": True}, "head_weight is True"),
        (Delta, {"layers": "uniform"}, r"'delta': layers is 'uniform'; expected 'all', 'last', or block indices"),
        (Delta, {"layers": []}, r"layers is \[\]"),
        (Delta, {"layers": [[0, 0]]}, r"layers is \[\[0, 0\]\]"),
        (Delta, {"sample": 3}, "'delta': sample is 3; expected a whole number of at least 4"),
        (BSS, {"k": 0}, "'bss': k is 0; expected a whole number of at least 1"),
        (BSS, {"k": 1.0}, "k is 1.0"),
        (BSS, {"k": True}, "k is True"),
        (LwF, {"source": "student"}, "'lwf': source is 'student'; expected 'teacher' or 'start'"),
        (LwF, {"temperature": 0}, "'lwf': temperature is 0"),
        (LwF, {"freeze_head": 1}, "'lwf': freeze_head is 1; expected true or false"),
    ],
)
def test_options_out_of_range_are_refused(kind, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        kind(**options)


def test_blocks_that_do_not_exist_or_repeat_are_refused():
    student = _model()
    for layers, sentence in (([2], "block 2"), ([1, -1], "more than once")):
        with pytest.raises(ValueError, match=sentence):
            _distiller(Delta(layers=layers), student, _model(1))
