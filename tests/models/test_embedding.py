"""One embedding an image, of classifiers and of models without a head: what is read, and what never is."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from hf_kdtl.models import Needs, Teacher, capture
from hf_kdtl.models.forward.embedding import HeadReader, is_headless, untrained_pooler
from hf_kdtl.models.forward.geometry import describe
from hf_kdtl.models.teachers.backbone import open_student
from hf_kdtl.models.teachers.resolve import open_classifier
from tests.support.headless import HEADLESS, headless
from tests.support.helpers import largest_difference, weights
from tests.support.tiny import build

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(6))
BOTH = Needs(pooled=True, patches=True)


@pytest.mark.parametrize(
    "name", ["vit", "dinov2", "dinov2_with_registers", "beit", "ijepa", "swinv2", "convnextv2", "resnet",
             "mobilenet_v2", "efficientnet", "segformer"]
)  # fmt: skip
def test_a_headless_student_is_read_as_the_classifiers_of_its_family_read_it(name):
    classifier = build(name, image_size=64 if name == "mobilenet_v2" else 32)
    backbone = getattr(classifier, classifier.base_model_prefix)
    assert is_headless(backbone) and not is_headless(classifier)
    with torch.no_grad():
        expected, found = (capture(model, PIXELS, BOTH) for model in (classifier, backbone))
    torch.testing.assert_close(found.pooled, expected.pooled, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.patches, expected.patches, rtol=0, atol=0)
    assert found.logits is None and describe(backbone, PIXELS).pooling == "head"


def test_reading_the_head_draws_nothing_and_changes_nothing():
    model = headless("mobilenet_v2")
    before, state = weights(model), torch.get_rng_state()
    model.train()
    pooled = capture(model.eval(), PIXELS, Needs(pooled=True)).pooled
    assert torch.equal(torch.get_rng_state(), state) and largest_difference(weights(model), before) == 0
    assert pooled.requires_grad and HeadReader.of(model) is HeadReader.of(model)


def test_a_saved_backbone_takes_a_head_that_reads_the_same(tmp_path):
    model = headless("dinov2")
    model.save_pretrained(tmp_path)
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=3).eval()
    with torch.no_grad():
        found, expected = (capture(one, PIXELS, Needs(pooled=True)).pooled for one in (classifier, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# What the models themselves give: tests/support/headless.py.
OWN = {
    "vit": (lambda o: o.last_hidden_state[:, 0], lambda o, m: o.last_hidden_state[:, 1:]),
    "dinov2_with_registers": (lambda o: o.pooler_output, lambda o, m: o.last_hidden_state[:, 5:]),
    "dinov3_vit": (lambda o: o.pooler_output, lambda o, m: o.last_hidden_state[:, 5:]),
    "dinov3_convnext": (lambda o: o.pooler_output, lambda o, m: o.last_hidden_state[:, 1:]),
    "siglip": (lambda o: o.pooler_output, lambda o, m: o.last_hidden_state),
    "clip": (
        lambda o: o.image_embeds,
        lambda o, m: m.vision_model.post_layernorm(o.last_hidden_state)[:, 1:],
    ),
    "ijepa": (lambda o: o.last_hidden_state.mean(1), lambda o, m: o.last_hidden_state),
    "convnextv2": (lambda o: o.pooler_output, lambda o, m: o.last_hidden_state.flatten(2).transpose(1, 2)),
    "swinv2": (lambda o: o.pooler_output, lambda o, m: o.last_hidden_state),
    "resnet": (lambda o: o.pooler_output.flatten(1), lambda o, m: o.last_hidden_state.flatten(2).transpose(1, 2)),
}


@pytest.mark.parametrize("name", OWN)
def test_a_teacher_gives_its_own_embedding_and_patches(name):
    model = headless(name, **({"layers": 2}))
    if name == "vit":
        model.pooler.dense.bias.data.zero_()  # as transformers makes a pooler that a file lacks
    with torch.no_grad():
        outputs = model(pixel_values=PIXELS)
        seen = describe(model, PIXELS, "auto", not untrained_pooler(model))
        found = capture(model, PIXELS, BOTH, seen)
    embedding, patches = OWN[name]
    torch.testing.assert_close(found.pooled, embedding(outputs), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.patches, patches(outputs, model), rtol=0, atol=1e-6)
    assert found.patch_grid[0] * found.patch_grid[1] == found.patches.shape[1]
    assert seen.pooled == found.pooled.shape[1]


def test_pools_can_be_named_and_absent_ones_are_refused():
    model = headless("dinov2_with_registers")
    with torch.no_grad():
        tokens = model(pixel_values=PIXELS).last_hidden_state
        found = {pool: capture(model, PIXELS, BOTH, describe(model, PIXELS, pool)) for pool in ("class", "mean")}
    torch.testing.assert_close(found["class"].pooled, tokens[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found["mean"].pooled, tokens[:, 5:].mean(1), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"pool is 'class' and IJepaModel has none. Use 'mean'"):
        describe(headless("ijepa"), PIXELS, "class")
    with pytest.raises(ValueError, match="pool is 'pooler' and ViTModel has none: its pooler was not in its file"):
        describe(headless("vit"), PIXELS, "pooler", pooler=False)


def test_a_classifiers_embedding_is_what_its_head_reads_unless_another_pool_is_named():
    model = build("siglip")
    seen = {pool: describe(model, PIXELS, pool) for pool in (None, "auto", "mean")}
    assert [one.pooling for one in seen.values()] == ["classifier", "classifier", "mean"]


def test_another_image_size_has_its_own_grid():
    model = headless("dinov2")
    seen = describe(model, PIXELS)
    found = capture(model, torch.randn(2, 3, 48, 32), BOTH, seen)
    assert found.patch_grid == (6, 4) and found.patches.shape == (2, 24, 32)


@pytest.mark.parametrize("name", [n for n in HEADLESS if n not in ("siglip2", "vit_mae")])
def test_every_family_is_known_as_headless(name):
    assert is_headless(headless(name))


def test_a_pooler_that_the_file_lacks_is_not_used(tmp_path):
    """SigLIP's pooler shows no new linear layer by a bias of 0: the file alone tells."""
    model = headless("siglip")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.startswith("head.")]:
        del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with torch.no_grad():
        found = Teacher.from_pretrained(tmp_path).capture(PIXELS, BOTH)
    torch.testing.assert_close(found.pooled, found.patches.mean(1), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_vision_tower_saved_alone_takes_the_head_of_its_family(tmp_path, name):
    model = headless(name)
    model.save_pretrained(tmp_path)
    opened = open_classifier(
        tmp_path, keep_head=False, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2}
    )
    assert sorted(opened.new_head) == ["classifier.bias", "classifier.weight"] and opened.model.config.num_labels == 3
    with torch.no_grad():
        found, expected = (capture(one, PIXELS, Needs(pooled=True)).pooled for one in (opened.model.eval(), model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    opened.model.save_pretrained(tmp_path / "again")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "again").config.id2label[2] == "c"


def test_a_masked_autoencoder_is_a_student_as_the_vit_that_it_is(tmp_path):
    model = headless("vit_mae")
    model.save_pretrained(tmp_path)
    student = open_student(tmp_path).model
    assert type(student).__name__ == "ViTModel"
    with torch.no_grad():
        found, expected = student(pixel_values=PIXELS), Teacher(model).model(pixel_values=PIXELS)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=0, atol=1e-6)
