"""A batch of which some images are differentiated is still one batch for everybody else."""

import pytest
import torch

from hf_kdtl.functional.random import Draws, select_images
from hf_kdtl.models import Needs, Teacher, capture, plan
from hf_kdtl.models.forward.partial_batch import capture_subset
from hf_kdtl.models.forward.perturbations import Direction, RNGState
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.trainer.distiller import Distiller
from tests.support.tiny import build

WANTED = Needs(logits=True, pooled=True, hidden_states=frozenset({0, 1}), attention=frozenset({1}))
DERIVED = WANTED | Needs(input_gradient=True, order=2, fraction=0.5)
DRAWS = Draws(3, 1, tuple(range(6)))


def pixels(number=6, size=32):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(4))


def run_of(model):
    return lambda x, needs, **inputs: capture(model, x, needs, **inputs)


@pytest.mark.parametrize("rows", [[], [1], [4, 0], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("name", ["vit", "deit_teacher", "beit"])
def test_the_parts_joined_are_the_full_batch(name, rows):
    model, x = build(name), pixels()
    full = capture(model, x, WANTED)
    got = capture_subset(run_of(model), model, x, DERIVED, torch.tensor(rows, dtype=torch.long))
    for field in ("logits", "pixel_values", "pooled"):
        torch.testing.assert_close(getattr(got, field), getattr(full, field), atol=1e-5, rtol=1e-4)
    for layer in (0, 1):
        torch.testing.assert_close(got.hidden_states[layer], full.hidden_states[layer], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.attention[1].query, full.attention[1].query, atol=1e-5, rtol=1e-4)
    if name == "deit_teacher":
        torch.testing.assert_close(got.outputs.cls_logits, full.outputs.cls_logits, atol=1e-5, rtol=1e-4)
    if name == "beit":
        assert got.attention[1].bias.shape[0] == 1  # shared by the images, whatever their number
    part = got.differentiated or got
    assert (part.x is None) == (not rows)
    if rows:
        gradient = part.input_gradient(part.logits[:, 0], create_graph=False)
        assert gradient.shape == (len(rows), 3, 32, 32)
        inside = rows if got.differentiated_rows is not None else list(range(6))
        torch.testing.assert_close(part.logits, full.logits[inside], atol=1e-5, rtol=1e-4)


def test_batch_norm_in_train_mode_keeps_the_batch_together():
    model, twin, x = build("resnet").train(), build("resnet").train(), pixels()
    rows = torch.tensor([0, 3])
    got = capture_subset(run_of(model), model, x, Needs(logits=True, input_gradient=True, order=2, fraction=0.5), rows)
    torch.testing.assert_close(got.logits, twin(pixel_values=x).logits)
    for name, buffer in model.named_buffers():  # the second pass left no mark
        torch.testing.assert_close(buffer, twin.get_buffer(name), rtol=0, atol=0)
    assert all(module.training for module in model.modules())
    # One image's derivative does not depend on its neighbours: running statistics.
    alone = capture(model, x[3:4], Needs(input_gradient=True, order=2, fraction=1.0))
    both = got.differentiated.input_gradient(got.differentiated.logits[:, 1], create_graph=False)
    torch.testing.assert_close(both[1:], alone.input_gradient(alone.logits[:, 1], create_graph=False))


def test_passes_see_the_same_masks_and_leave_the_random_stream_alone():
    model, x = build("vit", hidden_dropout_prob=0.5).train(), pixels()
    here = Direction("normal", 0.0)
    torch.manual_seed(1)
    got = capture(model, x, Needs(directions=frozenset({Direction("normal", 1e-9)}), fraction=1.0))
    after = torch.get_rng_state()
    again = got.logits_at(Direction("normal", 1e-9), DRAWS)
    torch.testing.assert_close(again, got.logits_at(here, DRAWS), atol=1e-5, rtol=0)
    assert torch.equal(torch.get_rng_state(), after)
    assert (model(pixel_values=x).logits - got.logits).abs().max() > 1e-2  # other masks do show
    masks = RNGState(torch.device("cpu"))
    first = torch.rand(3)
    with masks.replay():
        assert torch.equal(torch.rand(3), first)


def forwards(model):
    """Counts a model's forwards, by batch size."""
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(len(output.logits)))
    return seen


def distiller(student, teacher, entries):
    objectives = {f"{i}_{name}": OBJECTIVES[name](**options) for i, (name, options) in enumerate(entries)}
    source = Teacher(teacher)
    source.match(student, None, True)

    return Distiller(
        student, objectives, dict.fromkeys(objectives, 1.0), {"teacher": source}, {"teacher": plan(student, source)}
    )


FD = {"distance": "squared", "output": "all", "step": 0.05}
SHARED = {
    "vjp": ([("logit_kd", {}), ("jacobian", {}), ("attention_jacobian", {}), ("jacobian_norm", {})], [6], [6]),
    "shifts": ([("jacobian", FD), ("noisy_kd", {"noise": 0.05}), ("logit_kd", {})], [6, 6], [6, 6]),
    "hvp": ([("hessian", {}), ("hessian", {"distance": "squared"})], [6], [6]),
    "curvature": ([("hessian", {"what": "curvature", "estimator": "finite_difference"})], [6, 6, 6], [6, 6, 6]),
    "split": ([("jacobian", {"estimator": "split"})], [6, 6], [6]),
    "central": ([("jacobian", {"estimator": "split", "central": True})], [6, 6, 6], [6]),
}


@pytest.mark.parametrize("case", SHARED)
def test_objectives_share_the_passes_they_can_share(case):
    entries, of_student, of_teacher = SHARED[case]
    student, teacher = build("vit"), build("vit", seed=1, layers=3)
    made = distiller(student, teacher, entries)
    counts = forwards(student), forwards(teacher)
    made.terms({"pixel_values": pixels(), "labels": torch.arange(6) % 3}, DRAWS)
    assert counts == (of_student, of_teacher)


def test_a_part_of_the_batch_costs_a_part_and_no_image_runs_twice():
    student, teacher = build("vit"), build("vit", seed=1, layers=3)
    made = distiller(student, teacher, [("logit_kd", {}), ("jacobian", {"fraction": 0.5})])
    counts = forwards(student), forwards(teacher)
    taking = int(select_images(DRAWS, 0.5, pixels()).sum())
    assert 0 < taking < 6
    _, terms = made.terms({"pixel_values": pixels()}, DRAWS)
    assert counts == ([taking, 6 - taking], [taking, 6 - taking])
    assert (terms["1_jacobian"] != 0).sum() == taking


def test_a_fraction_keeps_the_mean():
    """Each image counts 1 / f when it takes part: over many steps the mean is that of all images."""
    full, part = (distiller(build("vit"), build("vit", seed=1), [("jacobian", {"fraction": f})]) for f in (1.0, 0.5))
    inputs = {"pixel_values": pixels()}
    expected = full.terms(inputs, DRAWS)[1]["0_jacobian"]
    draws = [Draws(3, step, tuple(range(6))) for step in range(60)]
    values = torch.stack([part.terms(inputs, d)[1]["0_jacobian"].detach() for d in draws])
    taken = values != 0
    torch.testing.assert_close(values[taken], (2 * expected.detach()).expand(60, 6)[taken], atol=1e-4, rtol=1e-4)
    assert abs(taken.float().mean().item() - 0.5) < 3 * 0.5 / 360**0.5


def test_a_smaller_fraction_is_inside_a_larger_one():
    x = pixels()
    small, large = select_images(DRAWS, 0.3, x), select_images(DRAWS, 0.8, x)
    assert (small <= large).all() and select_images(DRAWS, 1.0, x).all()
    made = distiller(build("vit"), build("vit", seed=1), [("jacobian", {"fraction": f}) for f in (0.3, 0.8)])
    first, second = made.terms({"pixel_values": x}, DRAWS)[1].values()
    assert torch.equal(first != 0, small) and torch.equal(second != 0, large)
