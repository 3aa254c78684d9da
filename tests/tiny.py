"""Tiny random image classifiers of many families, built from configs (nothing is downloaded).

    build("vit")                              2 blocks of width 32, 32 x 32 images, 3 classes
    build("swin", layers=[1, 2], num_labels=5)
    TINY["clip"](layers=4, seed=1)

Weights are transformers' initialisation plus noise on every parameter, because zero biases, unit norms and a layer
scale of 1e-6 would hide a tensor that was not copied or a block that does nothing.
"""

from collections.abc import Callable, Sequence
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
VIT_LIKE, STAGED = tuple(_VIT_LIKE), tuple(_STAGED)
_TWO_TOWERS = ("siglip", "clip", "metaclip_2")  # their vision settings lie in config.vision_config


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


def build(
    name: str,
    *,
    num_labels: int = 3,
    image_size: int = 32,
    layers: int | Sequence[int] = 2,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A tiny random classifier of family `name` (a key of TINY), in eval mode, the same for the same arguments.

    `layers` is the depth of ViT-like families; staged ones take depths, one per stage (an int: two stages of it, three
    for levit; mobilevit's depth is fixed). `overrides` are config fields (of the vision tower for CLIP and SigLIP).
    The global random stream is left where it was.
    """
    if name in _VIT_LIKE:
        assert isinstance(layers, int), f"{name} takes one depth, not {layers!r}"
        stem, settings = _VIT_LIKE[name], _vit_like(name, image_size, layers)
    else:
        depths = [layers] * (3 if name == "levit" else 2) if isinstance(layers, int) else list(layers)
        stem, settings = _STAGED[name], _staged(name, image_size, depths)
    settings |= overrides
    if name in _TWO_TOWERS:
        # No text tower is built; its default token ids would be outside its default vocabulary, with a warning.
        settings = {"vision_config": settings, "text_config": {"bos_token_id": 0, "eos_token_id": 1}}
    config = getattr(transformers, f"{stem}Config")(num_labels=num_labels, **settings)
    suffix = "ForImageClassificationWithTeacher" if name.endswith("_teacher") else "ForImageClassification"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, stem + suffix)(config)
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
