"""Folders without a classifier: the vision model is opened, every weight of it from the file."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Backbone,
    Siglip2ImageProcessor,
    SiglipConfig,
    SiglipModel,
    ViTImageProcessor,
    ViTModel,
)

from hf_kdtl.models import Needs, Teacher
from hf_kdtl.models.teachers.backbone import open_backbone
from tests.support.headless import headless
from tests.support.tiny import build

PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(6))
BOTH = Needs(pooled=True, patches=True)
_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 9}
_TEXT |= {"bos_token_id": 0, "eos_token_id": 1}


def _both_towers(config, model, vision):
    torch.manual_seed(0)
    made = model(config(text_config=_TEXT, vision_config=headless(vision).config.to_dict(), projection_dim=24))
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made.eval()


def _opened(folder, **options):
    teacher = Teacher.from_pretrained(folder, **options)
    teacher.match(build("vit"), None, compare_classes=False)
    with torch.no_grad():
        return teacher, teacher.capture(PIXELS, BOTH)


@pytest.mark.parametrize(
    "name", ["dinov2_with_registers", "dinov3_vit", "dinov3_convnext", "siglip", "clip", "convnextv2", "swinv2"]
)
def test_a_vision_model_opens_as_it_was_saved(tmp_path, name):
    model = headless(name, seed=3)
    model.save_pretrained(tmp_path)
    teacher, found = _opened(tmp_path)
    outputs = model(pixel_values=PIXELS)
    expected = outputs.image_embeds if name == "clip" else outputs.pooler_output
    torch.testing.assert_close(found.pooled, expected, rtol=0, atol=1e-6)
    assert not any(p.requires_grad for p in teacher.model.parameters()) and not teacher.new_head


@pytest.mark.parametrize(
    ("config", "model", "vision"), [(CLIPConfig, CLIPModel, "clip"), (SiglipConfig, SiglipModel, "siglip")]
)
def test_of_two_towers_the_vision_tower_alone_is_opened(tmp_path, config, model, vision):
    both = _both_towers(config, model, vision)
    both.save_pretrained(tmp_path)
    teacher, found = _opened(tmp_path)
    with torch.no_grad():
        expected = both.get_image_features(pixel_values=PIXELS).pooler_output
    torch.testing.assert_close(found.pooled, expected, rtol=0, atol=1e-6)
    assert not any("text" in name for name, _ in teacher.model.named_modules())
    with pytest.raises(ValueError, match=r"which reads text.*vision tower is opened alone"):
        Teacher(both)


def test_a_clip_tower_without_its_projection_gives_its_pooled_output(tmp_path):
    both = _both_towers(CLIPConfig, CLIPModel, "clip")
    both.vision_model.save_pretrained(tmp_path)
    _, found = _opened(tmp_path)
    expected = both.vision_model(pixel_values=PIXELS).pooler_output
    torch.testing.assert_close(found.pooled, expected, rtol=0, atol=1e-6)


def test_a_pooler_that_is_not_in_the_file_is_never_used(tmp_path):
    vit = build("vit", seed=5).vit  # made without a pooler
    vit.save_pretrained(tmp_path / "without")
    _, found = _opened(tmp_path / "without")
    torch.testing.assert_close(found.pooled, vit(pixel_values=PIXELS).last_hidden_state[:, 0], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="its pooler was not in its file"):
        _opened(tmp_path / "without", pool="pooler")
    whole = headless("vit", seed=5)
    whole.save_pretrained(tmp_path / "with")
    _, found = _opened(tmp_path / "with")
    torch.testing.assert_close(found.pooled, whole(pixel_values=PIXELS).pooler_output, rtol=0, atol=1e-6)
    # A model in memory: a pooler that nobody trained is known by its bias.
    reopened = ViTModel.from_pretrained(tmp_path / "without")
    assert Teacher(reopened).pooler is False and Teacher(whole).pooler is True


def test_a_backbone_class_opens_with_its_feature_maps(tmp_path):
    config = headless("dinov2").config
    config.apply_layernorm, config.reshape_hidden_states = True, True
    model = Dinov2Backbone(config).eval()
    model.save_pretrained(tmp_path)
    _, found = _opened(tmp_path)
    last = model(pixel_values=PIXELS).feature_maps[-1]
    torch.testing.assert_close(found.patches, last.flatten(2).transpose(1, 2), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.pooled, last.mean((2, 3)), rtol=0, atol=1e-6)


def test_vit_mae_masks_nothing_and_keeps_its_patches_in_order(tmp_path):
    model = headless("vit_mae")
    model.save_pretrained(tmp_path)
    _, first = _opened(tmp_path)
    _, again = _opened(tmp_path)
    assert first.patches.shape == (3, 16, 32) and torch.equal(first.patches, again.patches)
    # The same weights in a ViT, whose patches are row by row.
    vit = headless("vit")
    vit.load_state_dict({n: p for n, p in model.state_dict().items()} | {
        n: p for n, p in vit.state_dict().items() if n.startswith("pooler")})  # fmt: skip
    torch.testing.assert_close(first.patches, vit(pixel_values=PIXELS).last_hidden_state[:, 1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(first.pooled, vit(pixel_values=PIXELS).last_hidden_state[:, 0], rtol=0, atol=1e-5)


def test_siglip2_sees_what_its_own_processor_would_show_it(tmp_path):
    model = headless("siglip2", image_size=32)
    processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image = Image.effect_noise((32, 32), 60).convert("RGB")
    student = ViTImageProcessor(size={"height": 32, "width": 32})
    teacher = Teacher.from_pretrained(tmp_path)
    teacher.match(build("vit"), student, compare_classes=False)
    shown = student(images=[image], return_tensors="pt")["pixel_values"].requires_grad_()
    found = teacher.capture(shown, BOTH)
    expected = model(**processor(images=[image], return_tensors="pt"))
    torch.testing.assert_close(found.pooled, expected.pooler_output, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.patches, expected.last_hidden_state, rtol=0, atol=1e-4)
    assert torch.autograd.grad(found.pooled.sum(), shown)[0].abs().sum() > 0
    assert teacher.provenance().architecture == "Siglip2VisionModel"


def test_what_is_no_vision_model_is_refused(tmp_path):
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=9, **fields)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"is a BertModel, which reads text; expected .* pixel_values"):
        Teacher.from_pretrained(tmp_path / "bert")
    # A tower that transformers does not open alone: LLaVA's may be of any kind.
    config = SimpleNamespace(model_type="two", architectures=["Two"], vision_config=SimpleNamespace(model_type="own"))
    config.text_config = None
    with pytest.raises(ValueError, match=r"is a two with the vision tower 'own'.*Expected CLIP, SigLIP"):
        open_backbone(tmp_path, config)


def test_weights_of_the_backbone_that_are_missing_are_an_error(tmp_path):
    model = headless("dinov2")
    model.config.architectures = ["Dinov2Model"]
    model.config.save_pretrained(tmp_path)
    torch.save({n: p for n, p in model.state_dict().items() if "layer.1" not in n}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lacks \d+ weights of Dinov2Model, which would be random"):
        Teacher.from_pretrained(tmp_path)


def test_the_embedding_that_is_taken_can_be_named():
    model = headless("dinov2")
    teacher = Teacher(model, pool="mean")
    teacher.match(build("vit"), None, compare_classes=False)
    found = teacher.capture(PIXELS, BOTH)
    torch.testing.assert_close(found.pooled, found.patches.mean(1))
    with pytest.raises(ValueError, match="pool is 'max'; expected 'auto' or 'pooler'"):
        Teacher(model, pool="max")


def test_pixels_are_matched_with_the_processor_of_two_towers(tmp_path):
    _both_towers(CLIPConfig, CLIPModel, "clip").save_pretrained(tmp_path)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(tmp_path)
    teacher = Teacher.from_pretrained(tmp_path)
    teacher.match(build("vit"), ViTImageProcessor(size={"height": 32, "width": 32}), compare_classes=False)
    assert not torch.equal(teacher.pixels(PIXELS), PIXELS)
