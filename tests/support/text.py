"""Tiny models of images and texts, with tokenizers made on the spot."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    ViTImageProcessor,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def clip_tokenizer():
    """Letters as tokens, and no merges."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


def letter_tokenizer():
    """Letters as tokens, </s> at the end, where no sentencepiece model is at hand."""
    tokens = ["<pad>", "</s>", "<unk>", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=10**9
    )


def build_text(kind, image_size=32, longest=40, seed=0):
    """(model, tokenizer) of kind clip or siglip."""
    tokenizer = clip_tokenizer() if kind == "clip" else letter_tokenizer()
    last = len(tokenizer) - 1
    ends = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
    ends = ends if kind == "clip" else {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    text = SMALL | {"vocab_size": len(tokenizer), "max_position_embeddings": longest} | ends
    vision = SMALL | {"image_size": image_size, "patch_size": 8}
    config_class, model_class, more = {
        "clip": (CLIPConfig, CLIPModel, {"projection_dim": 24}),
        "siglip": (SiglipConfig, SiglipModel, {}),
    }[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(text_config=text, vision_config=vision, **more))
        for parameter in model.parameters():
            parameter.detach().add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval(), tokenizer


def save_text(folder, kind, **options):
    """`build_text` in a folder, with an image processor."""
    model, tokenizer = build_text(kind, **options)
    for part in (model, tokenizer, ViTImageProcessor(size={"height": 32, "width": 32})):
        part.save_pretrained(folder)
    return str(Path(folder))
