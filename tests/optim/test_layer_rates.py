"""From two models and images to multipliers: every source against its reference, and what a measurement leaves."""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_kdtl.functional.random import Draws
from hf_kdtl.models import Needs, Teacher, capture, plan
from hf_kdtl.models.teachers.pixels import PixelAdapter, PixelFormat
from hf_kdtl.optim import LayerRates, layer_groups
from hf_kdtl.optim.layerwise import layerwise
from tests.reference import discrepancy as slow
from tests.support.state import Broken, broken, mixed, state_of
from tests.support.tiny import build

SOURCES = [
    {"source": "attention"},
    {"source": "attention", "map": "class"},
    {"source": "jacobian"},
    {"source": "hessian"},
    {"source": "jacobian", "wrt": "inputs"},
    {"source": "hessian", "wrt": "inputs", "probes": 2},
]


def name(options):
    return "-".join(str(v) for v in options.values())


def pixels(number=4, size=32, dtype=torch.float32):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def rates(options, student, teacher, x=None, **settings):
    return LayerRates(options, student, plan(student, teacher, pixel_values=x), **settings)


def discrepancies(found):
    return list(found.history[-1]["discrepancies"].values())


# ---- Laws ----


# The other ViTs differ in their attention; derivatives meet the same blocks in all of them.
@pytest.mark.parametrize(
    ("options", "key"),
    [
        *((options, key) for options in SOURCES for key in ("vit", "swin", "resnet")),
        *((options, key) for options in SOURCES[:2] for key in ("deit", "dinov2")),
        *(pytest.param(options, "convnext", marks=pytest.mark.slow) for options in SOURCES),
    ],
    ids=lambda x: x if isinstance(x, str) else name(x),
)
def test_equal_models_give_one(options, key):
    student, x = build(key), pixels(2)
    if options.get("map") == "class" and key in ("swin", "convnext", "resnet"):
        with pytest.raises(ValueError, match=r"map='class' needs a class token .*the student's block has none"):
            rates(options, student, copy.deepcopy(student), x)
        return
    same = rates(options, student, copy.deepcopy(student), x)
    assert same.measure(student, copy.deepcopy(student), [x]) == pytest.approx([1.0] * len(same.rates.sizes), abs=1e-9)
    if key != "vit":
        return
    other = rates(options, student, build(key, seed=5), x)
    found = other.measure(student, build(key, seed=5), [x])
    assert all(0 < d < math.log(2) for d in discrepancies(other)) and max(found) > 1 > min(found)


@pytest.mark.parametrize("options", SOURCES, ids=name)
def test_the_split_changes_nothing(options):
    student, teacher = build("vit"), build("vit", seed=5)
    full, parts = (rates(options, student, teacher) for _ in range(2))
    full.measure(student, teacher, [pixels(6)])
    parts.measure(student, teacher, list(pixels(6).split(2)))
    assert discrepancies(parts) == pytest.approx(discrepancies(full), rel=1e-4)


@pytest.mark.parametrize("options", SOURCES[1:4], ids=name)
def test_ranks_with_different_numbers_of_images_agree(options):
    """Two ranks played one after the other: gather sees what the other has at the same call."""
    student, teacher, x = build("vit"), build("vit", seed=5), pixels(5)
    full = rates(options, student, teacher)
    full.measure(student, teacher, [x])
    sides = [rates(options, student, teacher) for _ in range(2)]
    for side, part, first in zip(sides, x.split([3, 2]), (0, 3), strict=True):
        side.add(student, teacher, part, Draws(0, 0, tuple(range(first, first + len(part)))))
    rows = [side._rows[0] for side in sides]
    padded = [torch.cat([r, r.new_zeros(3 - len(r), *r.shape[1:])]) for r in rows]
    for side in sides:
        answers = [torch.cat(padded), torch.tensor([3, 2])]
        assert side.finish(0, lambda tensor, answers=answers: answers.pop()) == pytest.approx(
            full.rates.multipliers, abs=1e-5
        )
        assert discrepancies(side) == pytest.approx(discrepancies(full), rel=1e-3)
    assert sides[0].rates.multipliers == sides[1].rates.multipliers


@pytest.mark.parametrize(
    ("options", "key"),
    [*((o, key) for o in SOURCES if "map" not in o for key in ("vit", "resnet")), ({"source": "jacobian"}, "levit")],
    ids=lambda x: x if isinstance(x, str) else name(x),
)
def test_measuring_changes_nothing(options, key):
    x = pixels(2, 128 if key == "levit" else 32)
    student, teacher = build(key, image_size=x.shape[-1]).train(), Teacher(build(key, image_size=x.shape[-1], seed=5))
    next(student.children()).eval()
    found = rates(options, student, teacher, x)
    before = [copy.deepcopy(m.state_dict()) for m in (student, teacher.model)]
    modes = [m.training for m in student.modules()]
    random = torch.random.get_rng_state()
    found.measure(student, teacher, [x])
    for state, model in zip(before, (student, teacher.model), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
        assert all(p.grad is None for p in model.parameters())
    assert modes == [m.training for m in student.modules()] and all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.model.parameters()) and x.grad is None
    assert torch.equal(random, torch.random.get_rng_state())


@pytest.mark.parametrize("fails", ["student", "teacher"])
@pytest.mark.parametrize("options", SOURCES, ids=name)
def test_a_measurement_that_fails_leaves_nothing_behind(options, fails, monkeypatch):
    x = pixels(2)
    student, teacher = mixed(build("vit")), Teacher(build("vit", seed=5))
    found = rates(options, student, teacher, x)
    broken(student if fails == "student" else teacher.model, monkeypatch)
    before = state_of(student, teacher.model)
    with pytest.raises(Broken):
        found.measure(student, teacher, [x])
    assert state_of(student, teacher.model) == before


# ---- References ----


def test_attention_against_the_reference():
    """Other width, depth, grid and prefix."""
    student = build("vit").double()
    teacher = build("deit", layers=4, hidden_size=48, patch_size=16, seed=5).double()
    x = pixels(3, dtype=torch.float64)
    found = rates({"source": "attention"}, student, teacher, x)
    found.measure(student, teacher, [x])
    hs, ht = (m(pixel_values=x, output_hidden_states=True).hidden_states for m in (student, teacher))
    # The blocks' outputs are hidden_states[1:]; uniform pairs 0 with 1 and 1 with 3.
    expected = [slow.attention(hs[s + 1], ht[t + 1], 1, 2, (4, 4), (2, 2)) for s, t in ((0, 1), (1, 3))]
    assert discrepancies(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [option for option in SOURCES if option.get("map") != "class"], ids=name)
def test_images_of_another_size_are_compared_on_their_own_grid(options):
    """64 x 128 pixels by rates that were planned for 128 x 64: as many patches, on another grid."""
    student, teacher = build("dinov2", patch_size=16, image_size=64), build("dinov2", image_size=64, seed=5)
    x = torch.randn(2, 3, 64, 128, generator=torch.Generator().manual_seed(1))
    found = [rates(options, student, teacher, planned) for planned in (x, x.transpose(2, 3))]
    for one in found:
        one.measure(student, teacher, [x])
    assert discrepancies(found[1]) == pytest.approx(discrepancies(found[0]), rel=1e-6) and min(discrepancies(found[0]))


def test_class_attention_against_the_models_own():
    student, teacher = (build(k, seed=s, attn_implementation="eager") for k, s in (("vit", 0), ("dinov2", 5)))
    x = pixels(3)
    found = rates({"source": "attention", "map": "class"}, student, teacher, x)
    found.measure(student, teacher, [x])
    maps = [m(pixel_values=x, output_attentions=True).attentions for m in (student, teacher)]
    expected = []
    for a, b in zip(*maps, strict=True):
        rows = [[slow.distribution(w[i].mean(0)[0, 1:]) for i in range(3)] for w in (a, b)]
        expected.append(sum(slow.jsd(p, q) for p, q in zip(*rows, strict=True)) / 3)
    assert discrepancies(found) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("source", ["jacobian", "hessian"])
def test_parameter_derivatives_against_the_reference(source):
    student, teacher = build("vit").double(), build("vit", layers=4, hidden_size=48, seed=5).double()
    x = pixels(3, dtype=torch.float64)
    found = rates({"source": source}, student, teacher, x)
    found.measure(student, teacher, list(x.split([2, 1])), step=7)
    expected = []
    for place, layers in enumerate(((0, 1), (1, 3))):
        sides = []
        for model, layer in zip((student, teacher), layers, strict=True):
            block = copy.deepcopy(model.vit.layers[layer]).requires_grad_()  # a teacher's is frozen
            entering = model(pixel_values=x, output_hidden_states=True).hidden_states[layer].detach()
            v = {
                n: Draws(0, 7, (0,)).rademacher(tuple(p.shape), f"layer_rates/{place}/0/{n}", p)[0]
                for n, p in block.named_parameters()
            }
            energies = slow.parameter_energies(block, entering, v if source == "hessian" else None)
            sides.append(slow.distribution(energies))
        expected.append(slow.jsd(*sides))
    assert discrepancies(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("source", ["jacobian", "hessian"])
def test_input_derivatives_are_by_the_students_pixels(source):
    """The teacher sees them re-normalised and in another size; that is part of what is differentiated."""
    student, teacher = build("vit").double(), build("vit", image_size=64, patch_size=16, seed=5).double()
    formats = (((0.5,) * 3, (0.5,) * 3, (32, 32)), ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4), (64, 64)))
    shown = PixelAdapter(*(PixelFormat(1 / 255, *values, "bilinear") for values in formats))
    held = Teacher(teacher)
    held._pixels = shown
    x = pixels(2, dtype=torch.float64)
    found = rates({"source": source, "wrt": "inputs"}, student, held, x)
    found.measure(student, held, [x], step=2)
    v = Draws(0, 2, (0, 1)).rademacher((3, 32, 32), "layer_rates/0", x)
    expected = []
    for layer in (0, 1):
        values = []
        for i in range(2):
            sides = []
            for model, see in ((student, lambda z: z), (teacher, shown)):
                z = x[i : i + 1].clone().requires_grad_()
                with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                    hidden = model(pixel_values=see(z), output_hidden_states=True).hidden_states[layer + 1]
                    (g,) = torch.autograd.grad(slow.output_energy(hidden), z, create_graph=True)
                    if source == "hessian":
                        (g,) = torch.autograd.grad((g * v[i]).sum(), z)
                sides.append(slow.distribution(slow.patch_sums(g[0].detach(), (4, 4))))
            values.append(slow.jsd(*sides))
        expected.append(values[0] if source == "hessian" else sum(values) / 2)  # hessian: every second image
    assert discrepancies(found) == pytest.approx(expected, rel=1e-5)


# ---- When, and of what ----


def test_when_it_measures():
    student, teacher = build("vit"), build("vit", seed=5)
    found = rates({"source": "jacobian", "every": 3}, student, teacher)
    assert [step for step in range(8) if found.due(step)] == [0, 3, 6]
    assert rates({"source": "hessian"}, student, teacher).due(200)
    once = rates({"mode": "frozen"}, student, teacher)
    assert once.due(0)
    once.measure(student, teacher, [pixels(2)])
    assert not any(once.due(step) for step in range(0, 100, 20))
    assert not LayerRates({"mode": "llrd"}, student).due(0)
    with pytest.raises(RuntimeError, match="finish without a measurement"):
        found.finish(0)


def test_captures_of_the_training_step_serve_as_well():
    student, teacher, x = build("vit"), Teacher(build("vit", seed=5)), pixels()
    for options in SOURCES[:2]:
        own, given = (rates(options, student, teacher) for _ in range(2))
        own.measure(student, teacher, [x])
        wanted = given.needs
        captures = (capture(student, x, wanted[0] | Needs(logits=True)), teacher.capture(x, wanted[1]))
        given.observe(*captures)
        given.finish(0)
        assert discrepancies(given) == pytest.approx(discrepancies(own), rel=1e-5)
    assert rates({"source": "jacobian"}, student, teacher).needs == (Needs(), Needs())


def test_blocks_that_no_pair_covers_are_interpolated():
    student, teacher = build("vit", layers=5), build("vit", layers=5, seed=5)
    found = rates({"layers": [[3, 4], [1, 0]], "momentum": 0.0}, student, teacher)
    m = found.measure(student, teacher, [pixels()])
    assert list(found.history[0]["discrepancies"]) == ["1", "3"]
    assert m[0] == m[1] and m[3] == m[4] and m[2] == pytest.approx((m[1] + m[3]) / 2)
    for layers, pairs in (("last", 1), ([[0, 0]], 1)):
        with pytest.raises(ValueError, match=f"compares pairs of layers and has {pairs}; expected two or more"):
            rates({"layers": layers}, student, teacher)
    with pytest.raises(ValueError, match="block 7 of the student, which has the blocks 0 to 4"):
        rates({"layers": [[7, 0], [1, 1]]}, student, teacher)


def test_frozen_blocks():
    student, teacher = build("vit", layers=3), build("vit", layers=3, seed=5)
    student.vit.layers[0].requires_grad_(False)
    found = rates({"momentum": 0.0}, student, teacher)
    m = found.measure(student, teacher, [pixels()])
    assert list(found.history[0]["discrepancies"]) == ["1", "2"] and found.rates.sizes[0] == 0
    assert (m[1] + m[2]) / 2 == pytest.approx(1, abs=1e-9)
    with pytest.raises(ValueError, match=r"names the student's blocks \[0\], which are frozen and have no rate"):
        rates({"layers": [[0, 0], [1, 1]]}, student, teacher)
    with pytest.raises(ValueError, match="no block of the student is trainable"):
        LayerRates({"mode": "llrd"}, student.vit.requires_grad_(False) and student)


def test_lora_counts_what_trains():
    teacher = build("vit", seed=5)
    student = get_peft_model(build("vit"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"]))
    for options in SOURCES[2:4]:
        found = LayerRates(options, student, plan(student, teacher))
        assert found.rates.sizes == [128, 128]
        assert sum(found.measure(student, teacher, [pixels(2)])) == pytest.approx(2)


@pytest.mark.parametrize(
    "options, key, message",
    [
        ({"source": "attention"}, "hiera", "tokens are on no known grid.*wrt='parameters', which compares any two"),
        ({"source": "jacobian", "wrt": "inputs"}, "hiera", "the student's tokens are on no known grid"),
        ({"source": "attention"}, "levit", "the student's patches are a single cell"),
    ],
)
def test_pairs_that_a_source_cannot_compare(options, key, message):
    student, teacher = build(key), build(key, seed=5)
    with pytest.raises(ValueError, match=f"^layer_rates: student block 0 <-> teacher block 0: .*{message}"):
        rates(options, student, teacher)
    rates({"source": "jacobian"}, student, teacher)


@pytest.mark.parametrize("options", [SOURCES[0], SOURCES[4]], ids=name)
def test_pairs_are_checked_again_at_another_size(options):
    student, teacher = build("convnext"), build("convnext", seed=5)
    found = rates(options, student, teacher, pixels(2, 64))
    with pytest.raises(ValueError, match=r"student block \d <-> .*: the student's patches are a single cell"):
        found.add(student, teacher, pixels(2, 8))


def test_a_nan_keeps_the_rate_and_is_logged():
    student, teacher = build("vit", layers=3), build("vit", layers=3, seed=5)
    found = rates({"source": "jacobian", "momentum": 0.0}, student, teacher)
    with torch.no_grad():
        teacher.vit.layers[2].mlp.fc1.bias.fill_(math.nan)
    found.measure(student, teacher, [pixels()])
    assert found.history[0]["discrepancies"]["2"] is None and found.rates.ratios[2] == 1.0
    logs = found.log()
    assert logs["lr_discrepancies_skipped"] == 1 and "lr_discrepancy/2" not in logs
    assert all(math.isfinite(v) for v in logs.values()) and set(logs) > {f"lr_multiplier/{i}" for i in range(3)}


def test_the_state_goes_on_and_reaches_the_optimizer():
    student, teacher = build("vit"), build("vit", seed=5)
    full, first, second = (rates({"momentum": 0.5}, student, teacher) for _ in range(3))
    x = list(pixels(8).split(2))
    for step in (0, 20):
        full.measure(student, teacher, [x[step // 20]], step)
    first.measure(student, teacher, [x[0]], 0)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.measure(student, teacher, [x[1]], 20) == full.rates.multipliers
    assert second.history == full.history and second.state_dict() == full.state_dict()
    optimizer = layerwise(torch.optim.SGD)(layer_groups(student), lr=0.1)
    full.apply(optimizer)
    found = {g["layer"]: g["lr_multiplier"] for g in optimizer.param_groups}
    m = full.rates.multipliers
    assert found == {"embeddings": m[0], 0: m[0], 1: m[1], "norm": m[1], "head": 1.0}


def test_half_precision_and_autocast_measure_in_full():
    student, teacher, x = build("vit"), build("vit", seed=5), pixels(2)
    for options in SOURCES[::2]:
        plain, cast = (rates(options, student, teacher) for _ in range(2))
        plain.measure(student, teacher, [x])
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            cast.measure(student, teacher, [x])
        assert discrepancies(cast) == discrepancies(plain)
    half = copy.deepcopy(student).bfloat16()
    found = rates({"source": "jacobian"}, half, teacher)
    assert all(math.isfinite(m) for m in found.measure(half, teacher, [x.bfloat16()]))
