"""What a run's models are and where they came from: the section `models` of results.json, for the card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_kdtl.cards import licence
from hf_kdtl.evaluation.cost import parameters
from hf_kdtl.evaluation.text import one_line
from hf_kdtl.models.adapters import plain_state
from hf_kdtl.models.blocks import vision_config
from hf_kdtl.models.representation import fingerprint

_INNER = ("model", "student")  # how recipes call the folder of a run's model


def origin(name_or_path: str | Path | None, revision: str | None = None) -> dict[str, Any]:
    """Where a model was loaded from: name (of a folder its last part alone), hub, revision, licence; None each where
    it is not known. Never a path: it may be published."""
    text = str(name_or_path or "")
    if not text:
        return {"name": None, "hub": False, "revision": None, "licence": None}
    path = Path(text).expanduser()
    hub = not path.exists() and is_hub_name(text)
    parts = [part for part in path.parts if part not in (path.anchor, ".", "..")]
    short = parts[-2] if len(parts) > 1 and parts[-1] in _INNER else (parts or [""])[-1]
    return {
        "name": text if hub else one_line(short),
        "hub": hub,
        "revision": revision if hub else None,
        "licence": licence.inherited(text),
    }


def is_hub_name(text: str) -> bool:
    """Whether it can be a name on the Hub: "name" or "owner/name"."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.isascii()


def model_facts(model: Any) -> dict[str, Any]:
    """What a model is now: `origin`, architecture, parameters, image size, adapters, and the hash of its weights."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config
    name = getattr(config, "_name_or_path", None)
    size = getattr(vision_config(config), "image_size", None)
    return {
        **origin(name, getattr(config, "_commit_hash", None)),
        "architecture": type(base).__name__,
        "model_type": config.model_type,
        "num_labels": config.num_labels,
        "parameters": parameters(model),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "image_size": [size, size] if isinstance(size, int) else size,
        "adapters": _adapters(model),
        # That of a model with adapters is the one that it has without them, and tells no two apart.
        "fingerprint": None if base is not model else fingerprint(model),
    }


def models_section(trainer: Any, start: dict[str, Any] | None = None) -> dict[str, Any]:
    """The section `models` of results.json.

    Args:
        trainer: before or after training.
        start: what the student began as, {"how": pretrained | cut | random, ...}; by default what its config says.
    """
    distiller = trainer.distiller
    student = model_facts(trainer.model)
    found = {name: student.pop(name) for name in ("name", "hub", "revision", "licence")}
    how = "pretrained" if found["name"] else None  # without a name: random or cut, and nobody knows which
    student["start"] = {"how": how, **found} | (start or {})
    if (size := _shown_size(trainer.processing_class)) is not None:
        student["image_size"] = size
    section: dict[str, Any] = {"student": student, "pairing": pairing_tables(distiller)}
    if trainer.teacher is not None:
        its = trainer.teacher.model
        section = {"teacher": _without_adapters(its) if its is trainer.model else model_facts(its)} | section
    return section


def _without_adapters(model: Any) -> dict[str, Any]:
    """The facts of a teacher that is the student with its adapters off."""
    size = sum(value.numel() for value in plain_state(model).values())
    changed = {"parameters": size, "trainable": 0, "adapters": None, "fingerprint": fingerprint(model)}
    return model_facts(model) | changed | {"self": True}


def pairing_tables(distiller: Any) -> dict[str, str]:
    """{what pairs layers (keys of objectives, layer_rates): the table of its pairs}; alike ones under one name."""
    users: dict[str, list[str]] = {}
    choices = [(key, distiller.plans[one.source], getattr(one, "layers", None))
               for key, one in distiller.objectives.items() if getattr(one, "pairs", None)]  # fmt: skip
    if distiller.rates is not None and distiller.rates.pairs:
        choices.append(("layer_rates", distiller.plan, distiller.rates.options.layers))
    for key, plan, layers in choices:
        users.setdefault(str(replace(plan, layers=layers)), []).append(key)
    return {", ".join(names): table for table, names in users.items()}


def _shown_size(processor: Any) -> list[int] | None:
    """Height and width of what the student is fed."""
    size = getattr(processor, "size", None)
    try:
        return [int(size["height"]), int(size["width"])]  # type: ignore[index]
    except (KeyError, TypeError):
        return None


def _adapters(model: Any) -> dict[str, str] | None:
    """{adapter: its kind} of a model with adapters; None of another."""
    found = getattr(model, "peft_config", None)
    if not found or not hasattr(model, "get_base_model"):
        return None
    return {one_line(name): str(getattr(one.peft_type, "value", one.peft_type)) for name, one in found.items()}
