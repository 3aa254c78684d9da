"""One embedding an image and patch tokens after the last norm, of models with and without a classifier."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_BACKBONE_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING_NAMES,
)

from hf_kdtl.models.blocks import find_blocks

Pool = Literal["auto", "pooler", "class", "mean"]
POOLS = ("auto", "pooler", "class", "mean")
Pooling = Literal["", "classifier", "head", "image_embeds", "pooler", "class", "mean"]
"""How an embedding is made: what the classifier reads; what the head of the family's classifiers would read;
CLIP's projection; `pooler_output`; the class token; the mean of the patch tokens. Empty: there is none."""
SENTENCES: dict[str, str] = {
    "classifier": "what its classifier reads",
    "head": "what the classifiers of its family read",
    "image_embeds": "its projected image embedding (image_embeds)",
    "pooler": "its pooler_output",
    "class": "its class token after the last norm",
    "mean": "the mean of its patch tokens",
}
_CLASSES = 7919  # outputs of a head that is only looked at: a number that no layer has by chance


def _names() -> frozenset[str]:
    found: set[str] = set()
    for names in (*MODEL_MAPPING_NAMES.values(), *MODEL_FOR_BACKBONE_MAPPING_NAMES.values()):
        found |= {names} if isinstance(names, str) else {*names}
    return frozenset(found | {f"{name}WithProjection" for name in found if name.endswith("VisionModel")})


HEADLESS = _names()


def plain_model(model: Any) -> Any:
    """The model inside PEFT's wrapper, or the model."""
    return model.get_base_model() if hasattr(type(model), "get_base_model") else model


def is_headless(model: Any) -> bool:
    """Whether a model of transformers has no head: what AutoModel and AutoBackbone open."""
    base = plain_model(model)
    return bool(getattr(type(base), "headless", False)) or (
        isinstance(base, PreTrainedModel) and any(cls.__name__ in HEADLESS for cls in type(base).__mro__)
    )


@contextmanager
def tower_outputs(model: nn.Module) -> Iterator[list[Any]]:
    """Around a forward: what the part without a head gave, its last hidden state among it."""
    found: list[Any] = []
    base = plain_model(model)
    part = base if is_headless(base) else base.get_submodule(find_blocks(base)[0][0].split(".")[0])
    handle = part.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()


def last_hidden_state(outputs: Any) -> Tensor | None:
    """(B, N, D) tokens or a (B, D, gh, gw) map: the last that a model without its head gives; None without any."""
    maps = getattr(outputs, "feature_maps", None)
    found = maps[-1] if maps else getattr(outputs, "last_hidden_state", None)
    if found is None and isinstance(outputs, tuple | list):
        found = next((x for x in outputs if isinstance(x, Tensor) and x.ndim >= 3), None)
    return found if isinstance(found, Tensor) and found.ndim in (3, 4) else None


def last_norm(model: nn.Module, final: Tensor, last_block: Tensor) -> nn.Module | None:
    """The norm that a model keeps for its class token alone (CLIP), where its tokens come without one."""
    if final.shape != last_block.shape or not torch.equal(final, last_block):
        return None
    return next((m for name, m in model.named_modules() if name.split(".")[-1] == "post_layernorm"), None)


def untrained_pooler(model: nn.Module) -> bool:
    """Whether a pooler has a linear layer whose bias is 0 everywhere, as a new one has and a trained one has not."""
    poolers = [m for name, m in plain_model(model).named_modules() if name.split(".")[-1] == "pooler"]
    linear = [m for pooler in poolers for m in pooler.modules() if isinstance(m, nn.Linear) and m.bias is not None]
    biases = [m.bias.full_tensor() if isinstance(m.bias, DTensor) else m.bias for m in linear]
    return any(not bias.any() for bias in biases)


def patch_tokens(
    final: Tensor, prefix: tuple[str, ...], norm: nn.Module | None = None
) -> tuple[Tensor, Tensor | None]:
    """Patches (B, P, D) row by row, and the class token (B, D) or None, of a last hidden state."""
    if final.ndim == 4:
        return final.flatten(2).transpose(1, 2), None
    final = final if norm is None else norm(final)
    return final[:, len(prefix) :], final[:, prefix.index("class")] if "class" in prefix else None


def choose_pooling(
    model: nn.Module, outputs: Any, pool: Pool | None, pooler: bool, has_class: bool, has_patches: bool
) -> Pooling:
    """How the embedding of a model without a classifier is made.

    Args:
        pool: None for a student, of which what its family's classifiers read is taken; for a teacher its `pool`.
        pooler: whether its pooler is trained.

    Raises:
        ValueError: for a pool that it does not have.
    """
    projected = isinstance(getattr(outputs, "image_embeds", None), Tensor)
    pooled = projected or isinstance(getattr(outputs, "pooler_output", None), Tensor)
    there: dict[str, bool] = {"pooler": pooled and pooler, "class": has_class, "mean": has_patches}
    if pool is None and HeadReader.of(model) is not None:
        return "head"
    chosen = next((name for name, has in there.items() if has), "") if pool in (None, "auto") else pool
    if chosen and not there[chosen]:
        why = ": its pooler was not in its file, so its weights are random" if chosen == "pooler" and pooled else ""
        others = " or ".join(repr(name) for name, has in there.items() if has)
        raise ValueError(f"pool is {pool!r} and {type(model).__name__} has none{why}. Use {others or 'auto'}.")
    return "image_embeds" if chosen == "pooler" and projected else chosen  # type: ignore[return-value]


def pooled_output(
    pooling: Pooling,
    model: nn.Module,
    outputs: Any,
    patches: Tensor | None,
    token: Tensor | None,
    pixel_values: Tensor,
) -> Tensor:
    """The embedding (B, D) of a model without a classifier, from its outputs."""
    if pooling == "head":
        reader = HeadReader.of(model)
        assert reader is not None
        found: Any = reader(outputs, pixel_values)
    else:
        names = {"image_embeds": "image_embeds", "pooler": "pooler_output"}
        mean = None if patches is None else patches.mean(1)
        found = getattr(outputs, names[pooling]) if pooling in names else token if pooling == "class" else mean
    if found is None:
        raise ValueError(f"{type(model).__name__} gives neither a pooled output nor tokens, so it has no embedding.")
    return found.flatten(1)


class NoHead(ValueError):
    """A family's image classifier is not a backbone with one linear layer on what it gives."""


class HeadReader:
    """What the image classifier of a headless model's family reads of its outputs, by that class's own forward.

    The class is made without weights, its backbone replaced by the outputs that are there, and its last linear layer
    by one that keeps what it was given. So a student that is trained on it loses nothing when it takes a head.
    """

    def __init__(self, classifier: nn.Module, device: torch.device):
        self.given, self.read = _Given(), _Read()
        backbone = max(classifier.named_children(), key=lambda child: sum(1 for _ in child[1].modules()))[0]
        setattr(classifier, backbone, self.given)
        heads = [n for n, m in classifier.named_modules() if isinstance(m, nn.Linear) and m.out_features == _CLASSES]
        if len(heads) != 1:
            raise NoHead(f"{type(classifier).__name__} has {len(heads)} linear heads.")
        classifier.set_submodule(heads[0], self.read)
        for module in classifier.modules():  # the norms of a head, as they are made
            if any(p.is_meta for p in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
                if not hasattr(module, "reset_parameters"):
                    raise NoHead(f"{type(module).__name__}, a part of the head, cannot be made again.")
                module.to_empty(device=device, recurse=False)
                module.reset_parameters()  # type: ignore[operator]
        self.classifier = classifier.eval()

    @classmethod
    def of(cls, model: nn.Module) -> HeadReader | None:
        """That of a model; None where its family has no image classifier, or one that is made otherwise."""
        base = plain_model(model)
        if base not in _readers:
            try:
                with torch.random.fork_rng(devices=[]), torch.device("meta"):
                    made = _classifier_of(base.config)
                _readers[base] = None if made is None else cls(made, next(base.parameters()).device)
            except NoHead:
                _readers[base] = None
        return _readers[base]

    def __call__(self, outputs: Any, pixel_values: Tensor) -> Tensor:
        """(B, D) of a model's outputs."""
        self.given.outputs = outputs
        try:
            self.classifier(pixel_values=pixel_values)
            assert self.read.found is not None
            return self.read.found
        finally:
            self.given.outputs = self.read.found = None


_readers: WeakKeyDictionary[nn.Module, HeadReader | None] = WeakKeyDictionary()


class _Given(nn.Module):
    outputs: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.outputs


class _Read(nn.Module):
    found: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.found = x
        return x


def classifier_config(config: Any) -> Any:
    """The config whose image classifier has a model of this config as its backbone; None where there is none.

    A vision tower's config (SigLIP's, CLIP's) is put into that of both towers, as their classifiers are saved.
    """
    if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return copy.deepcopy(config)
    kinds: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    for kind in kinds:
        if getattr(kind, "sub_configs", {}).get("vision_config") is type(config):
            return kind(vision_config=config.to_dict())
    return None


def _classifier_of(config: Any) -> nn.Module | None:
    found = classifier_config(config)
    if found is None:
        return None
    found.num_labels = _CLASSES
    kind: Any = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(found)]
    return (kind[0] if isinstance(kind, tuple) else kind)(found)
