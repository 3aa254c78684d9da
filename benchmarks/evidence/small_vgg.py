"""A plain stack of convolutions, as VGG's, without residuals. With group norm an image's gradient is its own."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class SmallVGGConfig(PreTrainedConfig):
    """Convolutions of each width, with a max pooling after each stage but the last."""

    model_type = "small_vgg"

    def __init__(
        self,
        hidden_sizes: tuple[int, ...] = (16, 32, 64),
        depths: tuple[int, ...] = (1, 1, 1),
        norm: Literal["group", "batch"] = "group",
        **further: Any,
    ):
        self.hidden_sizes, self.depths, self.norm, self.image_size = list(hidden_sizes), list(depths), norm, 32
        super().__init__(**further)


class SmallVGGForImageClassification(PreTrainedModel):
    """3 x 3 convolutions, a norm, ReLU; the mean over all places, and a linear head."""

    config_class = SmallVGGConfig
    main_input_name = "pixel_values"

    def __init__(self, config: SmallVGGConfig):
        super().__init__(config)
        layers: list[nn.Module] = []
        width = 3
        for stage, (size, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
            layers += [nn.MaxPool2d(2)] if stage else []
            for _ in range(depth):
                norm = nn.GroupNorm(8, size) if config.norm == "group" else nn.BatchNorm2d(size)
                layers += [nn.Conv2d(width, size, 3, padding=1, bias=False), norm, nn.ReLU()]
                width = size
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(width, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        logits = self.classifier(self.features(pixel_values).mean((2, 3)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
