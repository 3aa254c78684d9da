"""A teacher of which each process reads its own part, where the launcher asks for FSDP2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModel, AutoModelForImageClassification

from hf_kdtl.models.blocks import find_blocks
from hf_kdtl.models.forward.embedding import classifier_config
from hf_kdtl.models.teachers.backbone import has_classifier
from hf_kdtl.models.teachers.resolve import open_config
from hf_kdtl.utils.distributed import fsdp_requested


def sharded_options(path: str | Path) -> dict[str, Any]:
    """Options of from_pretrained by which transformers builds a model without memory, shards every block by FSDP2 and
    reads of each tensor this process's part alone; {} where FSDP2 is not asked for, on one process, and for what is
    not opened so (stores, two towers, adapters, before transformers 5.23), which every process reads whole and the
    trainer shards.

    Every process calls it, and opens the model.
    """
    if not fsdp_requested() or not dist.is_initialized() or dist.get_world_size() == 1:
        return {}
    try:
        config = open_config(path, role="the teacher")
    except OSError:  # a store, or reported where it is opened
        return {}
    if hasattr(config, "text_config") or type(config) not in _auto(config)._model_mapping:
        return {}
    from transformers.distributed import DistributedConfig

    if "fsdp_plan" not in DistributedConfig.__dataclass_fields__:
        return {}
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        skeleton = _auto(config).from_config(config)
    rules = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in find_blocks(skeleton)}
    plan = dict.fromkeys(sorted(rules), "free_full_weight")
    return {"distributed_config": DistributedConfig(fsdp_size=dist.get_world_size(), fsdp_plan=plan)}


def _auto(config: Any) -> Any:
    classifies = has_classifier(config) and classifier_config(config) is not None
    return AutoModelForImageClassification if classifies else AutoModel
