"""Tiny random image classifiers of many families, built from configs (nothing is downloaded).

    build("vit")                              2 blocks of width 32, 32 x 32 images, 3 classes
    build("swin", layers=[1, 2], num_labels=5)
    TINY["clip"](layers=4, seed=1)
    build("perceiver_learned")                a key of EVERY: TINY, and what differs in its depth or in what it reads

Weights are transformers' initialisation plus noise on every parameter, because zero biases, unit norms and a layer
scale of 1e-6 would hide a tensor that was not copied or a block that does nothing.
"""

import io
import pickle
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

# Families whose depth is num_hidden_layers -> stem of their class names.
_VIT_LIKE = {
    "vit": "ViT",
    "deit": "DeiT",
    "deit_teacher": "DeiT",
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
    "beit": "Beit",
    "data2vec-vision": "Data2VecVision",
    "vit_msn": "ViTMSN",
    "ijepa": "IJepa",
    "siglip": "Siglip",
    "clip": "CLIP",
    "metaclip_2": "MetaClip2",
}
_STAGED = {
    "swin": "Swin",
    "swinv2": "Swinv2",
    "convnext": "ConvNext",
    "convnextv2": "ConvNextV2",
    "resnet": "ResNet",
    "regnet": "RegNet",
    "pvt": "Pvt",
    "segformer": "Segformer",
    "hiera": "Hiera",
    "focalnet": "FocalNet",
    "poolformer": "PoolFormer",
    "cvt": "Cvt",
    "levit": "Levit",
    "efficientnet": "EfficientNet",
    "mobilevit": "MobileViT",
}
# Further families: name -> (config class, model class). Their depth is fixed, or is not what the families above say.
_FURTHER = {
    "donut-swin": ("DonutSwinConfig", "DonutSwinForImageClassification"),
    "pvt_v2": ("PvtV2Config", "PvtV2ForImageClassification"),
    "levit_teacher": ("LevitConfig", "LevitForImageClassificationWithTeacher"),
    "mobilevitv2": ("MobileViTV2Config", "MobileViTV2ForImageClassification"),
    "swiftformer": ("SwiftFormerConfig", "SwiftFormerForImageClassification"),
    "bit": ("BitConfig", "BitForImageClassification"),
    "mobilenet_v1": ("MobileNetV1Config", "MobileNetV1ForImageClassification"),
    "mobilenet_v2": ("MobileNetV2Config", "MobileNetV2ForImageClassification"),
    "hgnet_v2": ("HGNetV2Config", "HGNetV2ForImageClassification"),
    "pp_lcnet": ("PPLCNetConfig", "PPLCNetForImageClassification"),
    "textnet": ("TextNetConfig", "TextNetForImageClassification"),
    "perceiver_learned": ("PerceiverConfig", "PerceiverForImageClassificationLearned"),
    "perceiver_fourier": ("PerceiverConfig", "PerceiverForImageClassificationFourier"),
    "perceiver_conv": ("PerceiverConfig", "PerceiverForImageClassificationConvProcessing"),
    "imagegpt": ("ImageGPTConfig", "ImageGPTForImageClassification"),  # reads colour ids, not pixels
    "siglip2": ("Siglip2Config", "Siglip2ForImageClassification"),  # reads flattened patches, a mask and their grid
}
VIT_LIKE, STAGED = tuple(_VIT_LIKE), tuple(_STAGED)
_TWO_TOWERS = ("siglip", "clip", "metaclip_2", "siglip2")  # their vision settings lie in config.vision_config


def _vit_like(name: str, image_size: int, layers: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": 8,
    }
    if name.startswith("dinov2"):
        return settings | {"mlp_ratio": 2}
    if name in ("beit", "data2vec-vision"):
        settings |= {"use_relative_position_bias": True}
    return settings | {"intermediate_size": 64}


def _staged(name: str, image_size: int, depths: list[int]) -> dict[str, Any]:
    n = len(depths)
    widths = [16 * 2**i for i in range(n)]
    wide = [64 * 2**i for i in range(n)]
    heads = [2**i for i in range(n)]
    maps = {"image_size": image_size, "depths": depths, "hidden_sizes": widths}
    windows = {"image_size": image_size, "depths": depths, "embed_dim": 16, "num_heads": heads}
    pyramid = {"num_encoder_blocks": n, "patch_sizes": [7, 3, 3, 3][:n], "strides": [4, 2, 2, 2][:n]}
    heads_and_ratios = {"num_attention_heads": heads, "mlp_ratios": [2] * n}
    settings: dict[str, dict[str, Any]] = {
        "swin": windows | {"patch_size": 4, "window_size": 4, "mlp_ratio": 2.0},
        "swinv2": windows | {"patch_size": 4, "window_size": 4, "mlp_ratio": 2.0},
        "convnext": maps | {"num_stages": n},
        "convnextv2": maps | {"num_stages": n},
        "resnet": maps | {"embedding_size": 8},
        "regnet": maps | {"embedding_size": 8, "groups_width": 8},
        "pvt": maps
        | pyramid
        | heads_and_ratios
        | {"sequence_reduction_ratios": [2] * (n - 1) + [1], "patch_sizes": [4, 2, 2, 2][:n]},
        "segformer": maps | pyramid | heads_and_ratios | {"sr_ratios": [4, 2, 1, 1][:n]},
        "poolformer": maps | pyramid | {"padding": [2, 1, 1, 1][:n], "mlp_ratio": 2.0},
        "focalnet": maps | {"embed_dim": 16, "focal_levels": [1] * n, "focal_windows": [3] * n, "mlp_ratio": 2.0},
        "hiera": windows
        | {
            "image_size": [image_size, image_size],
            "mlp_ratio": 2.0,
            "num_query_pool": n - 1,
            "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, *[False] * (n - 1)],
        },
        "cvt": {key: [value] * n for key, value in _CVT.items()}
        | {"embed_dim": widths, "num_heads": heads, "depth": depths}
        | {"patch_sizes": [7, 3, 3][:n], "patch_stride": [4, 2, 2][:n], "patch_padding": [2, 1, 1][:n]}
        | {"cls_token": [False] * (n - 1) + [True]},
        "levit": maps
        | {"num_attention_heads": heads, "key_dim": [8] * n, "mlp_ratio": [2] * n, "attention_ratio": [2] * n},
        "efficientnet": {
            "image_size": image_size,
            "width_coefficient": 0.25,  # of the widths below, of the stem's 32 and of the top's 1280
            "depth_coefficient": 1.0,
            "kernel_sizes": [3] * n,
            "in_channels": [32, *wide[:-1]],
            "out_channels": wide,
            "strides": [2] * n,
            "num_block_repeats": depths,
            "expand_ratios": [1, *[2] * (n - 1)],
            "hidden_dim": 320,
        },
        "mobilevit": {
            "image_size": image_size,
            "hidden_sizes": [16, 16, 16],
            "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32],
            "num_attention_heads": 2,
            "expand_ratio": 2.0,
        },
    }
    return settings[name]


_CVT = {
    "mlp_ratio": 2.0,
    "attention_drop_rate": 0.0,
    "drop_rate": 0.0,
    "drop_path_rate": 0.0,
    "qkv_bias": True,
    "qkv_projection_method": "dw_bn",
    "kernel_qkv": 3,
    "padding_kv": 1,
    "stride_kv": 2,
    "padding_q": 1,
    "stride_q": 1,
}


def _further(name: str, image_size: int, depths: list[int]) -> dict[str, Any]:
    n = len(depths)
    widths, heads = [16 * 2**i for i in range(n)], [2**i for i in range(n)]
    if name == "levit_teacher":
        return _staged("levit", image_size, depths)
    if name == "donut-swin":
        return _staged("swin", image_size, depths)
    if name == "siglip2":
        settings = _vit_like("siglip", image_size, 2) | {"num_patches": (image_size // 8) ** 2}
        del settings["image_size"]
        return settings
    if name.startswith("perceiver"):
        # 16 latents: a square number, so that counting alone would put them on a grid.
        settings = {"num_self_attends_per_block": 2, "num_self_attention_heads": 2, "num_cross_attention_heads": 1}
        return settings | {"image_size": image_size, "num_latents": 16, "d_latents": 64}
    further: dict[str, dict[str, Any]] = {
        "pvt_v2": {"image_size": image_size, "depths": depths, "hidden_sizes": widths, "num_encoder_blocks": n}
        | {"patch_sizes": [7, 3, 3, 3][:n], "strides": [4, 2, 2, 2][:n], "mlp_ratios": [2] * n}
        | {"num_attention_heads": heads, "sr_ratios": [2] * (n - 1) + [1]},
        "mobilevitv2": {"image_size": image_size, "width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1]}
        | {"base_attn_unit_dims": [32, 48, 64]},
        "swiftformer": {"image_size": image_size, "depths": depths, "embed_dims": widths, "mlp_ratio": 2}
        | {"downsamples": [True] * n},
        "bit": {"depths": depths, "hidden_sizes": widths, "embedding_size": 8, "num_groups": 4},
        "mobilenet_v1": {"image_size": image_size, "depth_multiplier": 0.25},
        "mobilenet_v2": {"image_size": image_size, "depth_multiplier": 0.25},
        # `depths` is left at its default, which HGNetV2's stages do not follow.
        "hgnet_v2": {"embedding_size": 8, "stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 16, 16]}
        | {"stage_mid_channels": [8] * 4, "stage_out_channels": [16] * 4, "stage_num_blocks": [1, 1, 2, 1]}
        | {"stage_numb_of_layers": [2] * 4, "hidden_sizes": [16] * 4},
        "pp_lcnet": {"scale": 0.25, "class_expand": 64},
        "textnet": {"image_size": image_size, "stem_out_channels": 8, "hidden_sizes": [8, 8, 16, 16, 32]},
        "imagegpt": {"vocab_size": 17, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2},
    }
    return further[name]


def build(
    name: str,
    *,
    num_labels: int = 3,
    image_size: int = 32,
    layers: int | Sequence[int] = 2,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A tiny random classifier of family `name` (a key of EVERY), in eval mode, the same for the same arguments.

    `layers` is the depth of ViT-like families; staged ones take depths, one per stage (an int: two stages of it, three
    for levit); some have a fixed depth. `overrides` are config fields (of the vision tower for CLIP and SigLIP). The
    global random stream is left where it was.
    """
    key = repr((name, num_labels, image_size, layers, seed, sorted(overrides.items())))
    if key not in _BUILT:
        _BUILT[key] = _Template(_build(name, num_labels, image_size, layers, seed, overrides))
    return _BUILT[key].copy()


class _Template:
    """A model to be copied: its tensors, and the rest as bytes, which takes a fifth of the time of `deepcopy`."""

    def __init__(self, model: PreTrainedModel):
        self._tensors: dict[int, torch.Tensor] = {}
        written = io.BytesIO()
        pickler = pickle.Pickler(written, protocol=5)
        pickler.persistent_id = self._keep
        pickler.dump(model)
        self._rest = written.getvalue()

    def _keep(self, value: Any) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        self._tensors[id(value)] = value
        return id(value)

    def copy(self) -> PreTrainedModel:
        made: dict[int, torch.Tensor] = {}  # a tensor that two modules share is one in the copy, too

        def tensor(key: int) -> torch.Tensor:
            if key not in made:
                made[key] = deepcopy(self._tensors[key])
            return made[key]

        unpickler = pickle.Unpickler(io.BytesIO(self._rest))
        unpickler.persistent_load = tensor
        return unpickler.load()


_BUILT: dict[str, _Template] = {}


def _build(
    name: str, num_labels: int, image_size: int, layers: int | Sequence[int], seed: int, overrides: dict[str, Any]
) -> PreTrainedModel:
    depths = [layers] * (3 if name.startswith("levit") else 2) if isinstance(layers, int) else list(layers)
    if name in _VIT_LIKE:
        assert isinstance(layers, int), f"{name} takes one depth, not {layers!r}"
        stem, settings = _VIT_LIKE[name], _vit_like(name, image_size, layers)
    elif name in _STAGED:
        stem, settings = _STAGED[name], _staged(name, image_size, depths)
    else:
        stem, settings = "", _further(name, image_size, depths)
    settings |= overrides
    if name in _TWO_TOWERS:
        # No text tower is built; its default token ids would be outside its default vocabulary, with a warning.
        settings = {"vision_config": settings, "text_config": {"bos_token_id": 0, "eos_token_id": 1}}
    suffix = "ForImageClassificationWithTeacher" if name.endswith("_teacher") else "ForImageClassification"
    config_class, model_class = _FURTHER.get(name, (f"{stem}Config", stem + suffix))
    config = getattr(transformers, config_class)(num_labels=num_labels, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config)
        norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.reset_parameters()  # EfficientNet draws them around 0, and then does not see its input
        for parameter in model.parameters():
            parameter.detach().add_(torch.randn_like(parameter), alpha=0.05)
        _calibrate(model, norms, torch.randn(16, 3, image_size, image_size))
    return model.eval()


@torch.no_grad()
def _calibrate(model: PreTrainedModel, norms: list[Any], pixel_values: torch.Tensor) -> None:
    """Give BatchNorm the statistics of these images: with mean 0 and variance 1 a deep net hardly sees its input."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the plain mean over what it has seen
    if norms:
        model.train()(pixel_values=pixel_values)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


TINY: dict[str, Callable[..., PreTrainedModel]] = {name: partial(build, name) for name in (*VIT_LIKE, *STAGED)}
EVERY = TINY | {name: partial(build, name) for name in _FURTHER}
