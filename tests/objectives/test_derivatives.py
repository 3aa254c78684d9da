"""Derivative objectives: unbiased estimators, orders of convergence, and the traps that public code fell into.

Each test of a trap fails when the trap is put in: a detached gradient, one buffer for both models, a class for the
full batch, `backward()` for `autograd.grad`, other masks in another pass, an unguarded norm.
"""

import copy

import pytest
import torch
from torch.func import hessian, jacrev

from hf_kdtl.functional.derivatives import math_attention
from hf_kdtl.functional.random import Draws
from hf_kdtl.models import Teacher, plan
from hf_kdtl.models.teachers.pixels import PixelAdapter, PixelFormat
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.trainer.distiller import Distiller
from tests.functional.smooth import SHAPE, Smooth, images, slope
from tests.objectives.derivative_variants import short
from tests.reference.derivatives import REFERENCES_DERIVATIVES
from tests.support.tiny import build

N = 10_000
FD = {"estimator": "finite_difference"}
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def _distiller(student, teacher, name, options):
    source, objective = Teacher(teacher), OBJECTIVES[name](**options)
    source.match(student, None, False)
    pairing = plan(student, source) if objective.needs_plan else None
    return Distiller(student, {name: objective}, {name: 1.0}, {"teacher": source}, {"teacher": pairing})


def _values(student, teacher, name, options, x, labels=None, draws=None):
    labels = torch.zeros(len(x), dtype=torch.long) if labels is None else labels
    draws = draws or Draws(3, 5, tuple(range(len(x))))
    distiller = _distiller(student, teacher, name, options)
    return distiller.terms({"pixel_values": x, "labels": labels}, draws)[1][name]


def _gradients(student, value):
    found = torch.autograd.grad(value.sum(), list(student.parameters()), allow_unused=True)
    pairs = zip(found, student.parameters(), strict=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])


def _smooth_pair(**options):
    return Smooth(seed=0, **options), Smooth(seed=1, **options)


def _vits(size=16, dtype=torch.float64, **options):
    models = (build("vit", num_labels=4, layers=n, image_size=size, seed=n, **options).to(dtype) for n in (2, 3))
    student, teacher = models
    generator = torch.Generator().manual_seed(1)
    for model in (student, teacher):
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(dtype)
    return student, teacher


def _pixels(number=4, size=16, dtype=torch.float64):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(2)).to(dtype)


def test_every_image_step_and_purpose_has_draws_of_its_own():
    """Directions that repeat within a batch would make the mean over images no mean over directions."""
    like = torch.zeros(1)
    draws = [Draws(0, step, tuple(range(256))) for step in range(20)]
    rows = torch.cat([d.normal((4,), purpose, like) for d in draws for purpose in ("direction-0", "direction-1")])
    assert len(rows.unique(dim=0)) == len(rows)
    share = torch.cat([d.uniform((), "fraction", like) for d in draws])
    assert abs(float((share < 0.25).float().mean()) - 0.25) < 4 * (0.25 * 0.75 / len(share)) ** 0.5


# ---- Monte-Carlo: unbiased, and the error falls as one over the root of the number of draws ----


def _jacobians(x, quantity=lambda z: z):
    """d quantity(logits) / d x of the pair, (K, 8) each."""
    return [jacrev(lambda one, m=m: quantity(m.logits(one[None])[0]))(x).flatten(1) for m in _smooth_pair()]


def _exact(case, x):
    student, teacher = _smooth_pair()
    j_s, j_t = _jacobians(x)
    log_s, log_t = _jacobians(x, lambda z: torch.log_softmax(z, 0))
    p = torch.softmax(teacher.logits(x[None])[0], 0)
    if case == "label":
        return (j_s[0] - j_t[0]).square().sum()
    if case in ("projection", "all"):
        return (j_s - j_t).square().sum()
    if case == "fisher":
        return 0.5 * (p * (log_s - log_t).square().sum(1)).sum()
    if case == "softmax":
        return -(p[:, None] * log_t * log_s).sum()
    if case == "norm":
        return log_s[0].square().sum()
    h_s, h_t = (
        hessian(lambda flat, m=m: m.logits(flat.reshape(1, *SHAPE))[0, 0])(x.flatten()) for m in (student, teacher)
    )
    a = h_s - h_t
    if case == "hvp":
        return a.square().sum()
    assert case == "curvature"  # of +-1: E (v'Av)^2 = (tr A)^2 + 2 sum over i != j of A_ij^2
    return a.trace() ** 2 + 2 * (a.square().sum() - a.diagonal().square().sum())


SQUARED = {"distance": "squared"}
MONTE_CARLO = {
    "label": ("jacobian", SQUARED | FD | {"output": "label", "step": 1e-4}),
    "projection": ("jacobian", SQUARED | {"output": "projection"}),
    "all": ("jacobian", SQUARED | {"output": "all", "step": 1e-4, "central": True}),
    "fisher": ("jacobian", {"distance": "fisher", "output": "all", "step": 1e-4}),
    "softmax": ("jacobian", {"distance": "softmax", "output": "all", "step": 1e-4}),
    "norm": ("jacobian_norm", FD | {"step": 1e-4}),
    "hvp": ("hessian", {"what": "hvp", "distance": "squared", "output": "label"}),
    "curvature": ("hessian", FD | {"what": "curvature", "output": "label", "step": 1e-3}),
}


def monte_carlo(case, number=N):
    """Values of one image under `number` draws, and what their mean estimates."""
    name, options = MONTE_CARLO[case]
    x = images(1)
    with torch.no_grad():
        exact = _exact(case, x[0])
    return _values(*_smooth_pair(), name, options, x.expand(number, *SHAPE)).detach(), exact


@pytest.mark.parametrize("case", MONTE_CARLO)
def test_the_mean_over_draws_is_the_exact_value_and_the_error_falls_as_one_over_the_root(case):
    values, exact = monte_carlo(case)
    deviation = values.std()
    assert deviation > 0.05 * exact.abs(), "nothing random here"
    assert abs(values.mean() - exact) < 3 * deviation / N**0.5
    sizes = [1, 4, 16, 64]
    errors = [float((values[: N - N % n].reshape(-1, n).mean(1) - exact).square().mean().sqrt()) for n in sizes]
    assert abs(slope(sizes, errors) + 0.5) < 0.06


def test_several_probes_are_several_draws_and_their_mean():
    for case in ("label", "projection", "fisher", "curvature"):
        name, options = MONTE_CARLO[case]
        x = images(1).expand(1500, *SHAPE)
        one = _values(*_smooth_pair(), name, options, x)
        four = _values(*_smooth_pair(), name, options | {"probes": 4}, x)
        one, four = one.detach(), four.detach()
        assert 0.18 < float(four.var() / one.var()) < 0.34, case
        assert abs(float(four.mean() - one.mean())) < 4 * float(one.var() / 1200) ** 0.5


def test_a_fraction_of_the_images_keeps_the_mean_and_the_same_images_take_part_whatever_the_split():
    number, options = 4000, SQUARED | FD | {"fraction": 0.2, "step": 1e-4, "output": "label"}
    x, draws = images(1).expand(number, *SHAPE), Draws(3, 5, tuple(range(number)))
    entire = _values(*_smooth_pair(), "jacobian", options | {"fraction": 1}, x, draws=draws).detach()
    part = _values(*_smooth_pair(), "jacobian", options, x, draws=draws).detach()
    taken = part != 0
    assert abs(float(taken.double().mean()) - 0.2) < 4 * (0.16 / number) ** 0.5
    torch.testing.assert_close(part[taken], entire[taken] / 0.2, **EXACT)
    assert abs(part.mean() - entire.mean()) < 4 * part.std() / number**0.5
    later = Draws(3, 5, tuple(range(700, number)))
    torch.testing.assert_close(
        _values(*_smooth_pair(), "jacobian", options, x[700:], draws=later).detach(), part[700:], **EXACT
    )


# ---- Order of convergence, with dropout and drop-path on ----

NOISY_STUDENTS = {
    "drop-path": ("beit", {"drop_path_rate": 0.4}),
    "dropout": ("vit", {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}),
}


def _noisy_pair(which):
    family, options = NOISY_STUDENTS[which]
    student = build(family, num_labels=4, image_size=16, layers=3, **options).double()
    return student, _vits()[1]


def _under_masks(student, teacher, name, options, x):
    """The value in train mode, its forwards under the masks that seed 11 begins."""
    student.train()
    distiller = _distiller(student, teacher, name, options)
    torch.manual_seed(11)
    draws, labels = Draws(3, 5, tuple(range(len(x)))), torch.arange(len(x)) % 4
    return distiller.terms({"pixel_values": x, "labels": labels}, draws)[1][name]


ORDERS = {
    "one-sided": ("jacobian", SQUARED | FD | {"output": "label"}, 1),
    "central": ("jacobian", SQUARED | FD | {"output": "label", "central": True}, 2),
    "every class": ("jacobian", {"distance": "fisher", "output": "all", "central": True}, 2),
    "second difference": ("hessian", FD | {"what": "curvature", "output": "label"}, 2),
}


@pytest.mark.parametrize("which", NOISY_STUDENTS)
@pytest.mark.parametrize("case", ORDERS)
def test_differences_converge_at_their_order_with_dropout_on(case, which):
    """With other masks in the second pass the value would grow as 1 / step^2 instead."""
    name, options, order = ORDERS[case]
    student, teacher = _noisy_pair(which)
    x = _pixels()
    finest = 2e-4 if name == "hessian" else 1e-5
    central = {} if name == "hessian" else {"central": True}
    limit = _under_masks(student, teacher, name, options | central | {"step": finest}, x)
    calm = _values(student.eval(), teacher, name, options | {"step": 0.01}, x, torch.arange(4))
    assert (limit - calm).abs().max() > 1e-3 * calm.abs().max(), "the masks do nothing"
    want = _gradients(student, limit)
    steps, values, gradients = [0.02, 0.01, 0.005], [], []
    for step in steps:
        value = _under_masks(student, teacher, name, options | {"step": step}, x)
        values.append(float((value - limit).detach().norm()))
        gradients.append(float((_gradients(student, value) - want).norm()))
    assert abs(slope(steps, values) - order) < 0.25 and abs(slope(steps, gradients) - order) < 0.25


@pytest.mark.parametrize("which", NOISY_STUDENTS)
def test_a_difference_in_train_mode_goes_to_the_derivative_under_the_same_masks(which):
    student, teacher = _noisy_pair(which)
    x, labels = _pixels(), torch.arange(4)
    options = SQUARED | FD | {"output": "label", "central": True, "step": 1e-4}
    value = _under_masks(student, teacher, "jacobian", options, x)
    u = Draws(3, 5, tuple(range(4))).normal((3, 16, 16), "direction-0", x)
    along = []
    for model in (student.train(), teacher.eval()):
        torch.manual_seed(11)
        leaf = x.clone().requires_grad_()
        with math_attention():
            chosen = model(pixel_values=leaf).logits.gather(1, labels[:, None])
        along.append((torch.autograd.grad(chosen.sum(), leaf)[0] * u).flatten(1).sum(1))
    torch.testing.assert_close(value, (along[0] - along[1]).square(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("which", NOISY_STUDENTS)
@pytest.mark.parametrize("distance", ["normalized", "squared"])
def test_split_is_vjp_under_the_same_masks(which, distance):
    student, teacher = _noisy_pair(which)
    x, options = _pixels(), {"distance": distance, "output": "label"}
    exact = _under_masks(student, teacher, "jacobian", options | {"estimator": "vjp"}, x)
    want = _gradients(student, exact)
    for more, tolerance in (({}, 1e-9), ({"central": True, "step": 1e-4}, 1e-5)):
        value = _under_masks(student, teacher, "jacobian", options | {"estimator": "split"} | more, x)
        torch.testing.assert_close(value, exact, **EXACT)
        torch.testing.assert_close(_gradients(student, value), want, rtol=tolerance, atol=tolerance)


def test_a_pass_under_replayed_masks_leaves_the_random_stream_where_it_was():
    student, teacher = _noisy_pair("drop-path")
    left = []
    for options in ({"estimator": "vjp"}, {"estimator": "split"}):
        value = _under_masks(student, teacher, "jacobian", options | {"fraction": 0.5}, _pixels())
        assert 0 < (value != 0).sum() < 4  # a forward of the other images comes in between
        left.append(torch.rand(3))
    torch.testing.assert_close(*left)


# ---- Traps ----

SMOOTH_CASES = [
    ("jacobian", {}),
    ("jacobian", {"estimator": "split", "of": "logprob"}),
    ("jacobian", SQUARED | {"estimator": "split", "central": True, "step": 1e-3}),
    ("jacobian", SQUARED | FD | {"output": "label", "probes": 2}),
    ("jacobian", SQUARED | {"output": "projection"}),
    ("jacobian", {"distance": "fisher", "output": "all"}),
    ("jacobian", {"distance": "softmax", "output": "all", "estimator": "vjp"}),
    ("jacobian_norm", {}),
    ("jacobian_norm", {"estimator": "split"}),
    ("hessian", {}),
    ("hessian", {"distance": "squared", "output": "label"}),
    ("hessian", {"what": "curvature", "probes": 2}),
    ("hessian", FD | {"what": "curvature"}),
    ("noisy_kd", {"probes": 2}),
]
VIT_CASES = [
    ("jacobian", {}),
    ("jacobian", {"estimator": "split"}),
    ("attention_jacobian", {"pool": 1}),
    ("attention_jacobian", {"pool": 1, "estimator": "split", "layers": "uniform"}),
    ("hessian", {}),
    ("hessian", {"what": "curvature"}),
]
CASES = [pytest.param(False, *c, id=short(*c)) for c in SMOOTH_CASES]
CASES += [pytest.param(True, *c, id=f"vit-{short(*c)}") for c in VIT_CASES]


def _case(vit):
    return (*_vits(), _pixels()) if vit else (*_smooth_pair(), images())


@pytest.mark.parametrize(("vit", "name", "options"), CASES)
def test_the_parameter_gradient_is_that_of_the_value(vit, name, options):
    """Against numbers: a gradient that is cut off, or lost in a layer norm, is seen whoever else agrees with it."""
    student, teacher, x = _case(vit)
    labels = torch.tensor([0, 1, 2, -100])
    generator = torch.Generator().manual_seed(5)
    along = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in student.parameters()]
    ends = []
    for sign in (1, -2):
        for p, d in zip(student.parameters(), along, strict=True):
            p.data += sign * 1e-5 * d
        ends.append(_values(student, teacher, name, options, x, labels).sum().item())
    for p, d in zip(student.parameters(), along, strict=True):
        p.data += 1e-5 * d
    numeric = (ends[0] - ends[1]) / 2e-5
    value = _values(student, teacher, name, options, x, labels)
    got = float(_gradients(student, value) @ torch.cat([d.flatten() for d in along]))
    assert abs(numeric) > 1e-3
    assert abs(got - numeric) < 2e-5 * max(1, abs(numeric))


def test_each_models_gradient_is_its_own():
    """A head of zeros has a gradient of 0: what is left is the other's alone. One buffer for both would mix them."""
    x, labels = images(), torch.zeros(4, dtype=torch.long)
    for zeroed in (0, 1):
        models = _smooth_pair()
        expected = []
        for image in x:
            j = jacrev(lambda one: models[1 - zeroed].logits(one[None])[0, 0])(image)  # noqa: B023
            expected.append(j.square().sum())
        models[zeroed].classifier.weight.data.zero_()
        for estimator in ("vjp", "split"):
            value = _values(*models, "jacobian", SQUARED | {"output": "label", "estimator": estimator}, x, labels)
            torch.testing.assert_close(value, torch.stack(expected), **EXACT)


@pytest.mark.parametrize(("vit", "name", "options"), CASES)
def test_an_image_in_a_batch_has_the_value_that_it_has_alone(vit, name, options):
    """The classes differ between images: marking a class for all of the batch would add the others' gradients."""
    student, teacher, x = _case(vit)
    labels = torch.tensor([0, 1, 2, 1])
    if not vit:
        assert len(teacher.logits(x).argmax(1).unique()) > 1, "all images have one class: the trap is not set"
    value = _values(student, teacher, name, options, x, labels)
    alone = torch.cat(
        [
            _values(student, teacher, name, options, x[i : i + 1], labels[i : i + 1], Draws(3, 5, (i,)))
            for i in range(4)
        ]
    )
    torch.testing.assert_close(value, alone, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(("vit", "name", "options"), CASES)
def test_no_gradient_is_left_behind(vit, name, options):
    """`autograd.grad`, not `backward`: every .grad, of pixels and of both models, stays what it was."""
    student, teacher, x = _case(vit)
    for model in (student, teacher):
        for p in model.parameters():
            p.grad = torch.full_like(p, 7.0)
    x.grad = torch.full_like(x, 7.0)
    before = x.clone()
    value = _values(student, teacher, name, options, x, torch.tensor([0, 1, 2, 1]))
    assert all((p.grad == 7).all() for model in (student, teacher) for p in model.parameters())
    assert (x.grad == 7).all() and not x.requires_grad and (x == before).all()
    student.zero_grad()
    value.sum().backward()
    assert all((p.grad == 7).all() for p in teacher.parameters()) and (x.grad == 7).all()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())


@pytest.mark.parametrize("name", ["jacobian", "hessian"])
def test_both_models_are_asked_for_the_teachers_class(name):
    """Where they disagree about the class: the student's own would compare two different outputs."""
    student, teacher = _smooth_pair()
    x = images(24)
    top, own = teacher.logits(x).argmax(1), student.logits(x).argmax(1)
    disagree = top != own
    assert disagree.sum() > 5 and len(top.unique()) > 1
    value = _values(student, teacher, name, SQUARED, x)
    by_label = _values(student, teacher, name, SQUARED | {"output": "label"}, x, top)
    torch.testing.assert_close(value, by_label, **EXACT)
    other = _values(student, teacher, name, SQUARED | {"output": "label"}, x, own)
    assert ((other - value)[disagree].abs() > 1e-6).all()


@pytest.mark.parametrize("estimator", ["vjp", "split"])
@pytest.mark.parametrize("zeroed", ["student", "teacher", "both"])
def test_a_zero_gradient_has_a_finite_value_and_a_finite_gradient(zeroed, estimator):
    for dtype in (torch.float64, torch.float32):
        student, teacher = (m.to(dtype) for m in _smooth_pair())
        for who, model in (("student", student), ("teacher", teacher)):
            if zeroed in (who, "both"):
                model.classifier.weight.data.zero_()
        value = _values(student, teacher, "jacobian", {"estimator": estimator}, images().to(dtype))
        expected = torch.full((4,), float(zeroed != "both"), dtype=dtype)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
        assert torch.isfinite(_gradients(student, value)).all()
    for name in ("hessian", "attention_jacobian"):
        student, teacher = _vits()
        for model in (student, teacher):
            model.classifier.weight.data.zero_()
            model.vit.embeddings.patch_embeddings.projection.weight.data.zero_()  # blind to the pixels
        value = _values(student, teacher, name, {} if name == "hessian" else {"pool": 1}, _pixels())
        assert (value == 0).all() and torch.isfinite(_gradients(student, value)).all()


def test_an_unlabelled_image_counts_nothing_and_moves_nothing():
    student, teacher = _smooth_pair()
    x, labels = images(), torch.full((4,), -100)
    for name, options in (
        ("jacobian", {"output": "label"}),
        ("jacobian", SQUARED | FD | {"output": "label"}),
        ("jacobian_norm", {}),
        ("hessian", {"output": "label"}),
        ("hessian", FD | {"what": "curvature", "output": "label"}),
    ):
        value = _values(student, teacher, name, options, x, labels)
        assert (value == 0).all() and (_gradients(student, value) == 0).all()
        assert OBJECTIVES[name](**options).counts == "labelled"


class Shifted(torch.nn.Module):
    """A net whose logits have a common shift that depends on the pixels: its probabilities are the net's own."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pixel_values):
        outputs = self.net(pixel_values)
        outputs.logits = outputs.logits + torch.sin(3 * pixel_values).flatten(1).sum(1, keepdim=True)
        return outputs


def test_only_logprob_and_centred_ignore_a_common_shift_of_the_logits():
    net = Smooth()
    student, teacher = Shifted(copy.deepcopy(net)), net
    raw = _values(student, teacher, "jacobian", {}, images())
    assert (raw > 0.1).all()
    for of in ("logprob", "centred"):
        value = _values(student, teacher, "jacobian", {"of": of}, images())
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
    for distance in ("fisher",):
        value = _values(student, teacher, "jacobian", {"distance": distance, "output": "all"}, images())
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)


# ---- What the teacher sees is part of its function ----


class Seen(torch.nn.Module):
    """A teacher with its re-normalisation and resizing built in."""

    def __init__(self, model, adapter):
        super().__init__()
        self.model, self.adapter = model, adapter
        self.config = model.config

    def forward(self, pixel_values):
        return self.model(pixel_values=self.adapter(pixel_values))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("jacobian", SQUARED),
        ("jacobian", SQUARED | FD),
        ("hessian", {"distance": "squared"}),
        ("noisy_kd", {}),
    ],
)
@pytest.mark.parametrize("size", [16, 24])
def test_derivatives_are_by_the_students_pixels_through_what_the_teacher_is_shown(name, options, size):
    student, _ = _vits()
    teacher = _vits(size)[1]
    formats = [
        PixelFormat(1.0, (m,) * 3, (s,) * 3, size, "bilinear")
        for m, s, size in ((0.5, 0.5, (16, 16)), (0.3, 0.1, (size, size)))
    ]
    adapter = PixelAdapter(*formats)
    distiller = _distiller(student, teacher, name, options)
    distiller.teacher._pixels = adapter
    inputs = {"pixel_values": _pixels(), "labels": torch.arange(4)}
    draws = Draws(3, 5, tuple(range(4)))
    value = distiller.terms(inputs, draws)[1][name]
    built_in = _values(student, Seen(teacher, adapter), name, options, _pixels(), torch.arange(4), draws)
    torch.testing.assert_close(value, built_in, rtol=1e-6, atol=1e-9)


def test_the_teachers_classes_are_matched_before_they_are_differentiated():
    student, teacher = _vits()
    names = {i: f"kind {i}" for i in range(4)}
    for model in (student, teacher):
        model.config.id2label, model.config.label2id = names, {v: k for k, v in names.items()}
    order = [2, 0, 3, 1]
    other = copy.deepcopy(teacher)
    with torch.no_grad():
        other.classifier.weight.copy_(teacher.classifier.weight[order])
        other.classifier.bias.copy_(teacher.classifier.bias[order])
    other.config.id2label = {i: names[o] for i, o in enumerate(order)}
    other.config.label2id = {v: k for k, v in other.config.id2label.items()}
    found = []
    for model in (teacher, other):
        source = Teacher(model)
        source.match(student, None, True)
        objectives = {n: OBJECTIVES[n](distance="squared") for n in ("jacobian", "hessian")}
        distiller = Distiller(student, objectives, dict.fromkeys(objectives, 1.0), {"teacher": source})
        found.append(distiller.terms({"pixel_values": _pixels()}, Draws(3, 5, tuple(range(4))))[1])
    for n in found[0]:
        torch.testing.assert_close(found[1][n], found[0][n], **EXACT)


# ---- attention_jacobian on grids that differ ----


@pytest.mark.parametrize(
    ("size", "patch", "its_patch", "pool"), [(24, 8, 8, 2), (32, 8, 16, 2), (32, 16, 8, 1), (32, 8, 8, 3)]
)
@pytest.mark.parametrize("estimator", ["vjp", "split"])
def test_attention_jacobian_agrees_with_the_reference_where_grids_and_windows_do_not_divide(
    size, patch, its_patch, pool, estimator
):
    student = _vits(size, patch_size=patch)[0]
    teacher = _vits(size, patch_size=its_patch)[1]
    x, draws = _pixels(2, size), Draws(3, 5, (0, 1))
    options = {"pool": pool, "estimator": estimator, "layers": [[0, 1]]}
    labels = torch.zeros(2, dtype=torch.long)
    value = _values(student, teacher, "attention_jacobian", options, x, labels, draws)
    expected = REFERENCES_DERIVATIVES["attention_jacobian"](student, teacher, x, labels, draws, **options)
    torch.testing.assert_close(value, expected, **EXACT)
    torch.testing.assert_close(_gradients(student, value), _gradients(student, expected), rtol=1e-7, atol=1e-9)


# ---- Several objectives in one step ----


def test_objectives_in_one_step_give_what_each_gives_alone():
    student, teacher = _vits()
    entries = {
        "jacobian": SQUARED | FD | {"step": 0.1},
        "noisy_kd": {"noise": 0.1, "fraction": 0.5},
        "hessian": {},
        "jacobian_norm": {},
        "task": {},
        "logit_kd": {},
    }
    objectives = {name: OBJECTIVES[name](**options) for name, options in entries.items()}
    source = Teacher(teacher)
    source.match(student, None, False)
    distiller = Distiller(student, objectives, dict.fromkeys(objectives, 1.0), {"teacher": source})
    labels, draws = torch.tensor([0, 3, -100, 1]), Draws(3, 5, tuple(range(4)))
    together = distiller.terms({"pixel_values": _pixels(), "labels": labels}, draws)[1]
    for name, options in entries.items():
        alone = _values(student, teacher, name, options, _pixels(), labels, draws)
        torch.testing.assert_close(together[name], alone, rtol=1e-8, atol=1e-10)
    want = sum(
        _gradients(student, v)
        for v in [
            _values(student, teacher, name, options, _pixels(), labels, draws) for name, options in entries.items()
        ]
    )
    got = _gradients(student, sum(v.sum() for v in together.values()))
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


def _calls(student, teacher, entries):
    """Forwards of (student, teacher) in one step."""
    counts = [0, 0]
    for i, model in enumerate((student, teacher)):
        model.register_forward_hook(lambda m, a, out, i=i: counts.__setitem__(i, counts[i] + 1))
    objectives = {name: OBJECTIVES[name](**options) for name, options in entries.items()}
    source = Teacher(teacher)
    source.match(student, None, False)
    distiller = Distiller(student, objectives, dict.fromkeys(objectives, 1.0), {"teacher": source})
    labels = torch.tensor([0, 3, 2, 1])
    distiller.terms({"pixel_values": _pixels(), "labels": labels}, Draws(3, 5, tuple(range(4))))
    return tuple(counts)


@pytest.mark.parametrize(
    ("entries", "forwards"),
    [
        ({"logit_kd": {}, "jacobian": {}}, (1, 1)),
        ({"logit_kd": {}, "task": {}, "jacobian": {}, "jacobian_norm": {}, "hessian": {}}, (1, 1)),
        ({"jacobian": {"estimator": "split"}}, (2, 1)),
        ({"jacobian": {"distance": "fisher", "output": "all"}}, (2, 2)),
        ({"jacobian": {"distance": "fisher", "output": "all", "step": 0.1}, "noisy_kd": {"noise": 0.1}}, (2, 2)),
        ({"jacobian": {"distance": "fisher", "output": "all", "central": True}}, (3, 3)),
        ({"hessian": FD | {"what": "curvature"}}, (3, 3)),
    ],
)
def test_forwards_are_shared_between_objectives(entries, forwards):
    assert all(got <= most for got, most in zip(_calls(*_vits(), entries), forwards, strict=True))


# ---- Bad input ----


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("jacobian", {"distance": "fisher"}, "What goes with what"),
        ("jacobian", {"distance": "softmax", "output": "label"}, "What goes with what"),
        ("jacobian", {"distance": "normalized", "output": "all"}, "What goes with what"),
        ("jacobian", {"distance": "normalized", "output": "projection"}, "What goes with what"),
        ("jacobian", FD, "What goes with what"),
        ("jacobian", SQUARED | FD | {"output": "projection"}, "What goes with what"),
        ("jacobian", SQUARED | {"output": "all", "estimator": "split"}, "What goes with what"),
        ("jacobian", {"estimator": "hvp"}, "What goes with what"),
        ("jacobian", {"distance": "cosine"}, "distance"),
        ("jacobian", {"output": "top1"}, "output"),
        ("jacobian", {"of": "probability"}, "of"),
        ("jacobian", {"distance": "fisher", "output": "all", "of": "logprob"}, "of"),
        ("jacobian", {"distance": "softmax", "output": "all", "of": "logit"}, "of"),
        ("jacobian", {"estimator": "vjp", "central": True}, "central"),
        ("jacobian", {"estimator": "vjp", "step": 0.1}, "step"),
        ("jacobian", {"estimator": "split", "step": 0.1}, "step"),
        ("jacobian", {"estimator": "vjp", "probes": 2}, "probes"),
        ("jacobian", SQUARED | {"output": "all", "estimator": "vjp", "probes": 2}, "probes"),
        ("jacobian", {"fraction": 0}, "fraction"),
        ("jacobian", {"fraction": 1.5}, "fraction"),
        ("jacobian", {"fraction": True}, "fraction"),
        ("jacobian", SQUARED | FD | {"probes": 0}, "probes"),
        ("jacobian", SQUARED | FD | {"probes": 1.0}, "probes"),
        ("jacobian", SQUARED | FD | {"step": 0}, "step"),
        ("jacobian", SQUARED | FD | {"step": float("nan")}, "step"),
        ("jacobian", SQUARED | FD | {"central": "yes"}, "central"),
        ("jacobian_norm", {"of": None}, "of"),
        ("jacobian_norm", {"estimator": "hvp"}, "estimator"),
        ("jacobian_norm", {"probes": 2}, "probes"),
        ("attention_jacobian", {"pool": 0}, "pool"),
        ("attention_jacobian", FD, "estimator"),
        ("hessian", {"what": "trace"}, "what"),
        ("hessian", {"what": "curvature", "distance": "normalized"}, "distance"),
        ("hessian", {"what": "hvp"} | FD, "estimator"),
        ("hessian", {"output": "all"}, "output"),
        ("hessian", {"step": 0.1}, "step"),
        ("hessian", {"estimator": "vjp"}, "estimator"),
        ("noisy_kd", {"noise": 0}, "noise"),
        ("noisy_kd", {"temperature": -1}, "temperature"),
        ("noisy_kd", {"probes": 0}, "probes"),
    ],
)
def test_options_that_do_not_go_together_are_refused(name, options, sentence):
    with pytest.raises(ValueError, match=f"(?s)objective '{name}'.*{sentence}"):
        OBJECTIVES[name](**options)


def test_what_cannot_be_differentiated_is_refused_with_the_reason():
    student, teacher = _vits()
    entire = torch.randint(0, 255, (2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"int64.*floating"):
        _values(student, teacher, "jacobian", {}, entire)
    for name in ("jacobian", "attention_jacobian", "jacobian_norm", "hessian"):
        frozen = copy.deepcopy(student).requires_grad_(False)
        with pytest.raises(ValueError, match=r"no trainable parameter.*gradient path"):
            _values(frozen, teacher, name, {}, _pixels())
    cached = Smooth()
    logits = cached.logits(images()).detach()
    cached.forward = lambda pixel_values: type("Out", (), {"logits": logits[: len(pixel_values)]})()
    with pytest.raises(ValueError, match="gradient path"):
        _values(Smooth(seed=1), cached, "jacobian", {}, images())
    with pytest.raises(ValueError, match="K = 1"):
        _values(*_smooth_pair(classes=1), "jacobian", {}, images())
    kinked = torch.nn.Sequential(Smooth(), torch.nn.ReLU())
    with pytest.raises(ValueError, match=r"ReLU.*0 almost everywhere"):
        _values(kinked, Smooth(), "hessian", {}, images())


@pytest.mark.parametrize(
    ("name", "options"), [("jacobian", {"output": "label"}), ("jacobian_norm", {}), ("hessian", {"output": "label"})]
)
def test_soft_labels_are_refused(name, options):
    with pytest.raises(ValueError, match=r"class indices|soft"):
        _values(*_smooth_pair(), name, options, images(), torch.full((4, 3), 1 / 3))
    assert not OBJECTIVES[name](**options).takes_soft_labels


class _Gate(torch.nn.Module):
    """Squeeze and excitation with a hard-sigmoid, as MobileNetV3 has it."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return x * torch.nn.functional.hardsigmoid(self.scale * x)


def _gated(name):
    model = build(name, image_size=32).double()
    for module in list(model.modules()):
        for key, child in module.named_children():
            if isinstance(child, torch.nn.ReLU):
                setattr(module, key, _Gate())
    assert any(isinstance(m, _Gate) for m in model.modules())
    return model.double()


def test_a_hard_sigmoid_is_matched_exactly_by_both_estimators():
    """torch has no second derivative of it: vjp and split raised at the backward pass."""
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = []
    for estimator in ("vjp", "split"):
        student, teacher = _gated("resnet"), build("vit", seed=3).double()
        value = _values(student, teacher, "jacobian", {"estimator": estimator}, x)
        found.append((value.detach(), _gradients(student, value)))
    (value, gradient), (other, split) = found
    assert gradient.abs().max() > 1e-6
    torch.testing.assert_close(value, other, **EXACT)
    torch.testing.assert_close(gradient, split, rtol=1e-7, atol=1e-9)
