"""feature_kd and similarity: the laws of each, the bank, and what is refused."""

import pytest
import torch

from hf_kdtl import DistillationConfig
from hf_kdtl.functional import embeddings as fe
from hf_kdtl.models import Teacher, plan
from hf_kdtl.models.forward.capture import Capture
from hf_kdtl.objectives.embeddings import FeatureKD, Similarity
from hf_kdtl.trainer.distiller import Distiller
from tests.reference.embeddings import similarity
from tests.support.headless import headless
from tests.support.helpers import Images, trainer
from tests.support.tiny import build

G = torch.Generator().manual_seed(0)


def _draw(*shape):
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def _observed(objective, student, teacher, bank, rows=None):
    """An objective without models: its plan is made of widths, its sample of one batch."""
    side = plan(build("vit"), build("vit", layers=3))
    objective.build(side)
    objective.projector = torch.nn.Identity()
    objective.observe([(Capture(pooled=bank, image_index=rows), None)])
    return lambda **batch: objective(Capture(pooled=student), Capture(pooled=teacher), batch)


def test_rotating_teacher_bank_and_projection_together_changes_nothing():
    s, t, bank = _draw(3, 8), _draw(3, 8), _draw(10, 8)
    rotation, _ = torch.linalg.qr(_draw(8, 8))
    before = fe.similarity_divergence(s, t, bank, 0.07)
    torch.testing.assert_close(fe.similarity_divergence(s @ rotation, t @ rotation, bank @ rotation, 0.07), before)
    assert before.min() > 0.01


def test_permuting_the_bank_changes_nothing():
    s, t, bank = _draw(3, 8), _draw(3, 8), _draw(10, 8)
    order = torch.randperm(10, generator=G)
    expected = fe.similarity_divergence(s, t, bank, 0.07)
    torch.testing.assert_close(fe.similarity_divergence(s, t, bank[order], 0.07), expected)


def test_lengths_of_embeddings_do_not_count():
    s, t, bank = _draw(3, 8), _draw(3, 8), _draw(10, 8)
    expected = fe.similarity_divergence(s, t, bank, 0.07)
    torch.testing.assert_close(fe.similarity_divergence(3 * s, 0.2 * t, 5 * bank, 0.07), expected)


def test_an_images_own_entry_is_left_out_on_both_sides():
    student, teacher, bank = _draw(2, 32), _draw(2, 32), _draw(4, 32)
    bank[1] = teacher[0]
    value = _observed(Similarity(local_weight=0), student, teacher, bank, torch.tensor([5, 7, 9, 11]))
    without = value(image_index=torch.tensor([7, 8]))  # the second image is not in the bank
    every = value()
    expected = fe.similarity_divergence(student[:1], teacher[:1], bank[[0, 2, 3]], 0.07)
    torch.testing.assert_close(without[:1], expected)
    torch.testing.assert_close(without[1], every[1])
    assert (without[0] - every[0]).abs() > 1e-3


def test_the_reference_leaves_out_the_same():
    student, teacher = (build("vit", seed=i, num_labels=4, image_size=16).double() for i in (0, 1))
    source = Teacher(teacher)
    source.match(student, None, False)
    objective = Similarity(projector="identity", temperature=0.3)
    distiller = Distiller(
        student, {"s": objective}, {"s": 1.0}, {"teacher": source}, {"teacher": plan(student, source)}
    )
    pixels = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(4)).double()
    distiller.double().observe(lambda n: [{"pixel_values": pixels, "image_index": torch.arange(16)}])
    few = {"pixel_values": pixels[[3, 0]], "image_index": torch.tensor([3, 0])}
    found = distiller.terms(few, None)[1]["s"]
    expected = similarity(student, teacher, pixels[[3, 0]], None, projectors=[torch.nn.Identity()], temperature=0.3,
                          left_out=[3, 0])  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("standardize", ["isotropic", "channel"])
def test_standardizing_makes_teachers_of_another_scale_and_place_alike(standardize):
    seen = _draw(50, 8)
    sums, far = fe.moments(seen), fe.moments(1e4 + 30 * seen)
    a, b = (fe.mean_and_scale(one, standardize) for one in (sums, far))
    x = _draw(5, 8)
    torch.testing.assert_close((1e4 + 30 * x - b[0]) / b[1], (x - a[0]) / a[1], rtol=1e-9, atol=1e-9)
    whitened = (seen - a[0]) / a[1]
    assert torch.allclose(whitened.var(0, correction=0).mean(), torch.ones((), dtype=torch.float64))
    if standardize == "isotropic":  # a rotation before is a rotation after
        rotation, _ = torch.linalg.qr(_draw(8, 8))
        turned = fe.mean_and_scale(fe.moments(seen @ rotation), standardize)
        torch.testing.assert_close((seen @ rotation - turned[0]) / turned[1], whitened @ rotation)


def test_moments_of_parts_are_those_of_all():
    x = 1e3 + _draw(30, 4)
    found = None
    for part in x.split([7, 20, 3]):
        found = fe.moments(part, found)
    for a, b in zip(fe.mean_and_scale(found, "channel"), fe.mean_and_scale(fe.moments(x), "channel"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_bank_larger_than_the_data_is_refused_and_the_default_is_half(tmp_path):
    entry = {"name": "similarity", "bank": 17}
    with pytest.raises(ValueError, match=r"bank is 17 and there are 16 training images.* it is 8\."):
        _ = trainer(tmp_path, headless("vit"), headless("vit", seed=1), objectives=[entry]).distiller
    runner = trainer(tmp_path, headless("vit"), headless("vit", seed=1), objectives=[{"name": "similarity"}])
    bank = runner.distiller.objective("similarity")
    assert bank.bank.shape == (8, 32) and bank.bank_rows.tolist() == list(range(0, 16, 2))
    batch = next(iter(runner.get_train_dataloader()))
    assert sorted(batch["image_index"].tolist()) != [] and batch["pixel_values"].shape[0] == 8


def test_an_images_value_does_not_depend_on_its_batch(tmp_path):
    entries = [{"name": "similarity"}, {"name": "feature_kd", "sample": 8}]
    runner = trainer(tmp_path, headless("vit"), headless("dinov2", seed=1), Images(12), entries)
    images = runner.train_dataset.pixels
    every = runner.objective_terms({"pixel_values": images})
    for key, values in every.items():
        alone = torch.cat([runner.objective_terms({"pixel_values": x[None]})[key] for x in images])
        torch.testing.assert_close(alone, values, rtol=1e-4, atol=1e-5)


def test_without_a_sample_nothing_is_compared():
    pair = plan(build("vit"), build("vit"))
    for objective, message in ((FeatureKD(), "has not seen how large"), (Similarity(), "has no bank yet")):
        objective.build(pair)
        both = Capture(pooled=torch.randn(2, 32), patches=torch.randn(2, 16, 32), patch_grid=(4, 4))
        with pytest.raises(ValueError, match=message):
            objective(both, both, {})


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (FeatureKD, {"projector": "identity"}, "projector is 'identity' and the embedding.*32 and 64"),
        (Similarity, {}, "the student's last map is 1 x 1, and 2 patches are needed; set local_weight=0"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused(kind, options, message):
    student = build("vit") if options else build("resnet", layers=[1, 1, 1, 1])
    with pytest.raises(ValueError, match=message):
        kind(**options).build(plan(student, build("vit", hidden_size=64)))


@pytest.mark.parametrize(
    "entry",
    [{"name": "feature_kd", "standardize": "phi"}, {"name": "feature_kd", "patch_weight": -1},
     {"name": "similarity", "temperature": 0}, {"name": "similarity", "bank": 1},
     {"name": "similarity", "projector": 3}],
)  # fmt: skip
def test_wrong_options_are_refused_by_name(entry, tmp_path):
    option = [*entry][1]
    with pytest.raises(ValueError, match=f"{option} is .*; expected "):
        DistillationConfig(str(tmp_path), objectives=[entry])


def test_a_teacher_that_gives_one_embedding_for_all_images_is_reported():
    with pytest.raises(ValueError, match=r"the teacher's embeddings: they are the same for all images.*processor"):
        _observed(FeatureKD(patch_weight=0), _draw(2, 32), _draw(2, 32), torch.ones(6, 32))
