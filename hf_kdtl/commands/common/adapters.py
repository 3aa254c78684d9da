"""Students that learn through adapters (PEFT): adding them before training, saving them after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
from torch.nn.modules.batchnorm import _BatchNorm

from hf_kdtl import DistillationConfig
from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.models.adapters import adapted
from hf_kdtl.models.forward.classifier import classifiers
from hf_kdtl.models.labels import match_labels
from hf_kdtl.models.teachers.resolve import open_classifier
from hf_kdtl.utils.options import check_known


def with_adapter(model: Any, settings: dict | str) -> Any:
    """The model with an adapter of PEFT: `peft_type` and that type's options. The head is trained in full too, and
    so is BatchNorm, whose running statistics training changes.

    Raises:
        ValueError: for an unknown type or option, a model that has adapters, or one that this adapter does not fit.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"the student already has the adapters {sorted(model.peft_config)}; another would clash with them. Merge "
            "them first: peft's merge_and_unload(), then save_pretrained."
        )
    options = cli.mapping("adapter", settings)
    kind = str(options.pop("peft_type", "LORA"))
    check_known("peft_type of adapter", kind, [member.name for member in peft.PEFT_TYPE_TO_CONFIG_MAPPING])
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[kind]]
    for name in options:
        check_known(f"option of adapter {kind}", name, sorted(config.__dataclass_fields__))
    if "modules_to_save" in config.__dataclass_fields__:
        heads = {id(head) for head in classifiers(model)}
        full = [n for n, m in model.named_modules() if id(m) in heads or isinstance(m, _BatchNorm)]
        options = {"modules_to_save": full} | options
    try:
        return peft.get_peft_model(model, config(**options))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the adapter {settings} does not fit {type(model).__name__} ({error}). Name the layers that it changes, "
            'of a ViT "target_modules": ["q_proj", "v_proj"].'
        ) from error


def check_self(student: Any, path: str | None, config: DistillationConfig) -> None:
    """Refuse `--teacher self` where the student without adapters has nothing to teach.

    Raises:
        ValueError: for a student without adapters, with random weights, or with a new head that is compared.
    """
    if not adapted(student) or path is None:
        raise ValueError(
            "--teacher self is the student with its adapters off: type --student <a trained model> and --adapter "
            '\'{"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"]}\'.'
        )
    if any(objective.compares_classes for objective in config.build_objectives().values()):
        match_labels(student.config, open_classifier(path, role="the teacher").model.config)


def keep(trainer: Any, folder: Path) -> None:
    """Save the adapters alone in `adapter/`, and with them merged in a plain model in `model.part/`.

    The trainer has done its work: its model is not adapted any more.
    """
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(folder / "adapter")
        trainer.model.merge_and_unload().save_pretrained(folder / "model.part")
        trainer.processing_class.save_pretrained(folder / "model.part")
