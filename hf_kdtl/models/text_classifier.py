"""Class names in place of a trained head: the vision tower of CLIP or SigLIP, and what the text tower gave."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_kdtl.models.forward.modes import evaluating
from hf_kdtl.models.labels import set_class_names

TEMPLATES = ("a photo of a {}",)
"""What stands around a class name where nothing else is given."""
TOWERS = {"clip": "longest", "metaclip_2": "longest", "siglip": "max_length"}
"""{model_type: how its texts are padded}: SigLIP was trained on texts padded to the full length."""
_AT_ONCE = 256  # texts in a forward of the text tower


@dataclass
class TextHeadOutput(ImageClassifierOutput):
    """Also the embedding before it is normalised, and the vision tower's tokens."""

    image_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None


class TextHeadClassifier(PreTrainedModel):
    """The vision tower of a model of images and texts, and a `TextHead`.

    Args:
        model: both towers; the text tower is not kept.
        names: of the classes.
        texts: (K, D) normalised.
    """

    main_input_name = "pixel_values"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, model: Any, names: Sequence[str], texts: Tensor):
        config = copy.deepcopy(model.config)
        set_class_names(config, names)
        super().__init__(config)
        self.architecture = type(model).__name__
        self.vision_model, self.projection = model.vision_model, getattr(model, "visual_projection", None)
        self.classifier = TextHead(texts, model.logit_scale.detach().exp(), getattr(model, "logit_bias", None))
        for placed in ("hf_device_map", "quantization_method", "hf_quantizer"):
            if hasattr(model, placed):
                setattr(self, placed, getattr(model, placed))

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> TextHeadOutput:
        """Class outputs (B, K) of pixel_values (B, C, h, w)."""
        found = self.vision_model(pixel_values=pixel_values, **kwargs)
        pooled = found.pooler_output
        embeds = pooled if self.projection is None else self.projection(pooled)
        logits = self.classifier(embeds / embeds.pow(2).sum(-1, keepdim=True).sqrt())
        return TextHeadOutput(
            logits=logits.to(pixel_values.device),
            hidden_states=found.hidden_states,
            attentions=found.attentions,
            image_embeds=embeds,
            last_hidden_state=found.last_hidden_state,
        )


class TextHead(nn.Linear):
    """z = scale <x, t_k> + bias for normalised x (B, D), in the order of the models' own forward.

    Args:
        texts: t (K, D), normalised.
        scale: a number, exp(logit_scale).
        bias: logit_bias, or None.
    """

    def __init__(self, texts: Tensor, scale: Tensor, bias: Tensor | None):
        super().__init__(texts.shape[1], texts.shape[0], bias is not None, device=texts.device, dtype=texts.dtype)
        self.weight.data.copy_(texts)
        self.scale: Tensor
        self.register_buffer("scale", scale.reshape(()).to(texts))
        if bias is not None:
            self.bias.data.fill_(bias.item())

    def forward(self, input: Tensor) -> Tensor:
        z = (self.weight @ input.t()).t() * self.scale
        return z if self.bias is None else z + self.bias


@torch.no_grad()
def text_embeddings(model: Any, tokenizer: Any, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(K, D): of each class the normalised mean over the templates of the normalised embeddings of its texts.

    Raises:
        ValueError: for a text that is longer than the model takes.
    """
    texts = [template.replace("{}", name.replace("_", " ")) for name in names for template in templates]
    with evaluating(model):
        found = torch.cat([_normalised(batch) for batch in _features(model, tokenizer, texts)])
    if len(templates) == 1:
        return found
    return _normalised(found.view(len(names), len(templates), -1).mean(1))


def _features(model: Any, tokenizer: Any, texts: Sequence[str]) -> Iterator[Tensor]:
    config = model.config
    longest, padding = config.text_config.max_position_embeddings, TOWERS[config.model_type]
    _check_tokens(model, tokenizer, texts)
    for first in range(0, len(texts), _AT_ONCE):
        batch = tokenizer(list(texts[first : first + _AT_ONCE]), padding=padding, max_length=longest,
                          truncation=False, return_tensors="pt")  # fmt: skip
        found = model.get_text_features(**batch.to(model.device))
        yield found if isinstance(found, Tensor) else found.pooler_output  # transformers 5 gives an output object


def _check_tokens(model: Any, tokenizer: Any, texts: Sequence[str]) -> None:
    """Raises ValueError for a text that is too long, and for texts that a tokenizer of another model reads alike."""
    name, config = type(model).__name__, model.config.text_config
    seen: dict[tuple[int, ...], str] = {}
    for text, ids in zip(texts, tokenizer(list(texts))["input_ids"], strict=True):
        if len(ids) > config.max_position_embeddings:
            raise ValueError(
                f"the text {text!r} has {len(ids)} tokens, and {name} takes {config.max_position_embeddings}. Shorten "
                "the class name or the template."
            )
        if (other := seen.setdefault(tuple(ids), text)) != text:
            raise ValueError(
                f"{other!r} and {text!r} have the same tokens, so the teacher cannot tell them apart. Expected the "
                f"tokenizer of {name}, of {config.vocab_size:,} tokens; found a {type(tokenizer).__name__} of "
                f"{len(tokenizer):,}. Save it with the model: tokenizer.save_pretrained(folder)."
            )


def _normalised(x: Tensor) -> Tensor:
    return x / x.pow(2).sum(-1, keepdim=True).sqrt()


def checked_templates(templates: Sequence[str] | str | None) -> tuple[str, ...]:
    """The templates; the default ones for None. Raises ValueError for one without {}."""
    found = TEMPLATES if templates is None else (templates,) if isinstance(templates, str) else tuple(templates)
    lost = [template for template in found if not isinstance(template, str) or "{}" not in template]
    if lost or not found:
        raise ValueError(
            f"templates: {lost[0] if lost else 'none'!r} has no {{}}, where the class name goes; expected texts such "
            'as "a photo of a {}".'
        )
    return found
