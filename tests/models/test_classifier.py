"""The classifier is what the logits are made of, also where an inner layer is as wide as there are classes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_kdtl.models import Needs, capture
from hf_kdtl.models.forward.classifier import classifiers
from hf_kdtl.models.forward.geometry import describe
from tests.support.tiny import build

# Widths of inner layers of the tiny models: SigLIP's channels and MLP, Swin's merging of patches, Perceiver's values.
COLLISIONS = [("siglip", 32), ("siglip", 64), ("swin", 32), ("swinv2", 32), ("perceiver_learned", 64)]


def pixels(model):
    size = getattr(model.config, "vision_config", model.config).image_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "classes"), COLLISIONS)
def test_an_inner_layer_as_wide_as_there_are_classes_is_not_the_classifier(name, classes):
    model = build(name, num_labels=classes)
    with torch.no_grad():
        got = capture(model, pixels(model), Needs(pooled=True))
    classifier = describe(model, pixels(model)).classifier
    assert classifier is not None and not model.training
    torch.testing.assert_close(classifier(got.pooled), got.logits, rtol=1e-5, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_both_heads_of_a_model_with_a_distillation_token_stay():
    model = build("deit_teacher", num_labels=32)  # as many classes as channels
    assert classifiers(model) == [model.cls_classifier, model.distillation_classifier]


def test_a_head_that_peft_trains_next_to_the_original_is_found_whichever_answers():
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"], r=2)
    model = get_peft_model(build("siglip", num_labels=32), config)
    kept = model.base_model.model.classifier
    with model.disable_adapter():
        assert {kept.original_module, kept.modules_to_save["default"]} <= set(classifiers(model))
        assert describe(model, pixels(model.base_model.model)).classifier is kept.original_module
    assert {kept.original_module, kept.modules_to_save["default"]} <= set(classifiers(model))
    assert describe(model, pixels(model.base_model.model)).classifier is kept.modules_to_save["default"]
