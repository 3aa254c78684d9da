"""Tiny random vision models without a head, of many families, as AutoModel opens them (nothing is downloaded).

headless("dinov3_vit")      2 blocks of width 32, 32 x 32 images
headless("clip", layers=3)  CLIP's vision tower with its projection
"""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.support import tiny

_VIT = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}
# name -> (config class, model class, fields)
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTConfig", "ViTModel", _VIT),
    "dinov2": ("Dinov2Config", "Dinov2Model", _VIT | {"mlp_ratio": 2}),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", _VIT | {"mlp_ratio": 2}),
    "dinov3_vit": ("DINOv3ViTConfig", "DINOv3ViTModel", _VIT | {"num_register_tokens": 4}),
    "dinov3_convnext": ("DINOv3ConvNextConfig", "DINOv3ConvNextModel", {}),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", _VIT),
    "siglip2": ("Siglip2VisionConfig", "Siglip2VisionModel", _VIT),
    "clip": ("CLIPVisionConfig", "CLIPVisionModelWithProjection", _VIT | {"projection_dim": 24}),
    "ijepa": ("IJepaConfig", "IJepaModel", _VIT),
    "vit_mae": ("ViTMAEConfig", "ViTMAEModel", _VIT),
    "convnextv2": ("ConvNextV2Config", "ConvNextV2Model", {}),
    "convnext": ("ConvNextConfig", "ConvNextModel", {}),
    "swinv2": ("Swinv2Config", "Swinv2Model", {}),
    "resnet": ("ResNetConfig", "ResNetModel", {}),
    "mobilenet_v2": ("MobileNetV2Config", "MobileNetV2Model", {}),
}
HEADLESS = tuple(_MODELS)


def headless(name: str, *, layers: int = 2, image_size: int = 32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random model in eval mode, noise on every parameter; the global random stream is left where it was."""
    config, kind, fields = _MODELS[name]
    if name in ("convnextv2", "convnext", "swinv2", "resnet"):
        fields = tiny._staged(name, image_size, [1, layers - 1] if layers > 1 else [1])
    elif name == "dinov3_convnext":
        fields = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": image_size}
    elif name == "mobilenet_v2":
        fields = {"image_size": image_size, "depth_multiplier": 0.25}
    elif name == "siglip2":
        fields = fields | {"num_hidden_layers": layers, "num_patches": (image_size // 8) ** 2}
    else:
        fields = fields | {"num_hidden_layers": layers, "image_size": image_size}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, kind)(getattr(transformers, config)(**(fields | overrides)))
        for parameter in model.parameters():
            parameter.detach().add_(torch.randn_like(parameter), alpha=0.05)
        norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        tiny._calibrate(model, norms, torch.randn(16, 3, image_size, image_size))
    return model.eval()
