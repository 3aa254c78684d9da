"""Class names as a head: the models' own image-text logits, a text tower that runs once, and what is refused."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionConfig,
    Siglip2Config,
    SiglipConfig,
    SiglipTokenizer,
    ViTImageProcessor,
)

from hf_kdtl import DistillationTrainer
from hf_kdtl.models import Needs, Teacher, plan
from hf_kdtl.models.teachers import SeveralTeachers
from hf_kdtl.models.teachers.text_head import TextHeadTeacher, has_text_tower
from hf_kdtl.models.text_classifier import text_embeddings
from tests.support.helpers import Images, config, largest_difference, weights
from tests.support.text import build_text, save_text
from tests.support.tiny import build

NAMES = ["cat", "dog", "emu"]
PIXELS = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
KINDS = ("clip", "siglip")
PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32})


def own_logits(model, tokenizer, texts, pixels=PIXELS):
    """As the model's documentation calls it."""
    longest = model.config.text_config.max_position_embeddings
    padding = "max_length" if model.config.model_type == "siglip" else "longest"
    inputs = tokenizer(texts, padding=padding, max_length=longest, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs, pixel_values=pixels).logits_per_image


@pytest.mark.parametrize("kind", KINDS)
def test_one_template_gives_the_models_own_logits(tmp_path, kind):
    model, tokenizer = build_text(kind)
    expected = own_logits(model, tokenizer, [f"a photo of a {name}" for name in NAMES])
    teacher = Teacher.from_pretrained(save_text(tmp_path, kind), class_names=NAMES)
    with torch.no_grad():
        found = teacher.classifier()(pixel_values=PIXELS).logits
    assert isinstance(teacher, TextHeadTeacher) and (found - expected).abs().max() < 1e-6
    assert expected.std() > 1e-2 and teacher.provenance().class_names == NAMES


@pytest.mark.parametrize("kind", KINDS)
def test_several_templates_are_the_mean_in_double_precision(kind):
    model, tokenizer = build_text(kind)
    model.double()
    templates = ["a photo of a {}", "a drawing of {}", "{} at night"]
    with torch.no_grad():
        images = F.normalize(model.get_image_features(pixel_values=PIXELS.double()).pooler_output, dim=-1)
        rows = []
        for name in NAMES:
            texts = [template.replace("{}", name) for template in templates]
            one_by_one = []
            for text in texts:
                padding = "max_length" if kind == "siglip" else "longest"
                inputs = tokenizer([text], padding=padding, max_length=40, return_tensors="pt")
                found = model.get_text_features(**inputs).pooler_output[0]
                one_by_one.append(found / found.norm())
            mean = sum(one_by_one) / len(one_by_one)
            rows.append(images @ (mean / mean.norm()))
        expected = model.logit_scale.exp() * torch.stack(rows, 1) + getattr(model, "logit_bias", 0.0)
    teacher = TextHeadTeacher(model, tokenizer, class_names=NAMES, templates=templates)
    with torch.no_grad():
        found = teacher.classifier()(pixel_values=PIXELS.double()).logits
    assert (found - expected).abs().max() < 1e-12
    assert found.std() > 1e-3


def test_siglip_is_padded_to_the_full_length():
    model, tokenizer = build_text("siglip")
    seen = []
    model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    full = text_embeddings(model, tokenizer, NAMES, ["{}"])
    assert seen == [(3, 40)]
    with torch.no_grad():
        short = model.get_text_features(**tokenizer(NAMES, padding="longest", return_tensors="pt")).pooler_output
    assert (full - F.normalize(short, dim=-1)).abs().max() > 1e-3  # what a shorter padding would have given


def test_the_text_tower_runs_once_and_is_freed(tmp_path):
    model, tokenizer = build_text("clip")
    calls = []
    model.text_model.register_forward_pre_hook(lambda *_: calls.append(1))
    tower, teacher = weakref.ref(model.text_model), TextHeadTeacher(model, tokenizer, PROCESSOR, class_names=NAMES)
    kept = sum(p.numel() for p in teacher.classifier().parameters())
    del model
    settings = config(tmp_path, [{"name": "logit_kd"}], max_steps=2)
    DistillationTrainer(build("vit"), settings, teacher=teacher, train_dataset=Images(8),
                        processing_class=PROCESSOR).train()  # fmt: skip
    gc.collect()
    assert calls == [1] and tower() is None and kept < 25_000
    with pytest.raises(ValueError, match="its text tower is freed"):
        teacher.name_classes(NAMES)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_teacher_like_any_other(tmp_path, kind):
    model, tokenizer = build_text(kind)
    teacher = TextHeadTeacher(model, tokenizer, PROCESSOR)
    student = build("vit")
    student.config.id2label = {0: "dog", 1: "golden_retriever", 2: "cat"}
    names = ("logit_kd", "hidden_states", "attention_transfer", "relation", "lwf", "jacobian", "task")
    entries = [{"name": name} for name in names] + [{"name": "attention_map", "rows": "all"}]
    settings = config(tmp_path, entries, max_steps=2)
    runner = DistillationTrainer(student, settings, teacher=teacher, train_dataset=Images(8),
                                 processing_class=PROCESSOR)  # fmt: skip
    before = weights(runner.model)
    runner.train()
    assert largest_difference(weights(runner.model), before) > 1e-5
    assert teacher.provenance().class_names == ["dog", "golden_retriever", "cat"] and teacher.order is None
    captured = teacher.capture(PIXELS, Needs(logits=True, pooled=True))
    assert captured.pooled.norm(dim=-1) == pytest.approx(1.0, abs=1e-5)
    blanks = own_logits(*build_text(kind), ["a photo of a dog", "a photo of a golden retriever", "a photo of a cat"])
    assert (captured.logits - blanks).abs().max() < 1e-5
    assert any("a photo of a {}" in note for note in teacher.notes)
    assert len(plan(student, teacher, pixel_values=PIXELS).pairs) == 2


def test_classes_of_another_order_and_a_second_teacher(tmp_path):
    student = build("vit")
    student.config.id2label = {0: "emu", 1: "cat", 2: "dog"}
    text = TextHeadTeacher(*build_text("clip"), PROCESSOR, class_names=NAMES)
    trained = build("vit", seed=5)
    trained.config.id2label = {0: "emu", 1: "cat", 2: "dog"}
    both = SeveralTeachers({"text": text, "trained": Teacher(trained)})
    entries = [{"name": "logit_kd", "key": name, "teacher": name} for name in ("text", "trained")]
    runner = DistillationTrainer(student, config(tmp_path, entries, max_steps=1), teacher=both,
                                 train_dataset=Images(8), processing_class=PROCESSOR)  # fmt: skip
    runner.train()
    assert text.order == [2, 0, 1]
    assert "class_names" not in str(runner.state.log_history)


def test_what_is_refused(tmp_path):
    clip = save_text(tmp_path / "clip", "clip")
    vit = str(tmp_path / "vit")
    build("vit").save_pretrained(vit)

    def refused(match, path=clip, kind=ValueError, **options):
        with pytest.raises(kind, match=match):
            Teacher.from_pretrained(path, **options)

    refused(r"templates: 'a photo' has no \{\}", templates=["a photo of {}", "a photo"])
    refused(r"templates: 'none' has no \{\}", templates=[])
    refused("expected a text for each class, all different", class_names=["cat", "cat"])
    refused("has 41 tokens, and CLIPModel takes 40", class_names=["cat", "a" * 32], templates="photo of {}")
    refused(r"is of type 'vit': class_names and templates need a text tower\. Expected CLIP", vit, class_names=NAMES)
    build_text("clip")[0].vision_model.save_pretrained(tmp_path / "tower")
    refused("the vision tower alone", str(tmp_path / "tower"), class_names=NAMES)
    CLIPForImageClassification(build_text("clip")[0].config).save_pretrained(tmp_path / "classifier")
    refused("lacks .* weights of CLIPModel", str(tmp_path / "classifier"), class_names=NAMES)
    build_text("clip")[0].save_pretrained(tmp_path / "mute")
    refused("'a photo of a cat' and 'a photo of a dog' have the same tokens", str(tmp_path / "mute"),
            class_names=NAMES)  # fmt: skip
    (tmp_path / "mute" / "tokenizer.json").write_text("{")
    refused("has no tokenizer that can be read", str(tmp_path / "mute"), OSError, class_names=NAMES)
    teacher = TextHeadTeacher(*build_text("clip"), PROCESSOR)
    with pytest.raises(ValueError, match="neither it nor the student has class names"):
        teacher.match(build("vit"), PROCESSOR, True)


def test_siglip_2_of_any_size_is_refused_by_name():
    model = torch.nn.Module()
    model.config = Siglip2Config()
    with pytest.raises(ValueError, match="it reads flat patches of any size; take a SigLIP 2 of a fixed size"):
        TextHeadTeacher(model, None)
    assert has_text_tower(CLIPConfig()) and has_text_tower(SiglipConfig())
    assert not has_text_tower(CLIPVisionConfig())
    assert not has_text_tower(CLIPConfig(architectures=["CLIPForImageClassification"]))


def test_siglips_own_tokenizer(tmp_path):
    pytest.importorskip("sentencepiece", reason="SigLIP's own tokenizer is a sentencepiece model, trained here")
    import sentencepiece

    text = tmp_path / "text.txt"
    text.write_text("a photo of a cat\na photo of a dog\na photo of an emu\n" * 5)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "spiece"), vocab_size=28, model_type="char",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    tokenizer = SiglipTokenizer(str(tmp_path / "spiece.model"))
    model, _ = build_text("siglip")
    expected = own_logits(model, tokenizer, [f"a photo of a {name}" for name in NAMES])
    teacher = TextHeadTeacher(model, tokenizer, class_names=NAMES)
    with torch.no_grad():
        assert (teacher.classifier()(pixel_values=PIXELS).logits - expected).abs().max() < 1e-6
