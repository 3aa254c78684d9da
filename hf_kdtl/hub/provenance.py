"""What a run's models are and where they came from: the section `models` of results.json, for the card."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakKeyDictionary

from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from hf_kdtl.evaluation.cost import parameters
from hf_kdtl.evaluation.model_records import Models
from hf_kdtl.hub import license as licenses
from hf_kdtl.models.adapters import adapter_kinds
from hf_kdtl.models.blocks import vision_config
from hf_kdtl.models.fingerprint import fingerprint
from hf_kdtl.models.forward.embedding import HEADLESS
from hf_kdtl.models.labels import is_multi_label
from hf_kdtl.models.teachers import SelfTeacher, SignalSource
from hf_kdtl.utils.redaction import local_name
from hf_kdtl.utils.text import one_line


def origin(name_or_path: str | Path | None, revision: str | None = None, license: str | None = None) -> dict[str, Any]:
    """Where a model was loaded from: name (of a folder its last part alone), hub, revision, license; None each where
    it is not known. Never a path: it may be published. The license is read from its card where none is given."""
    text = str(name_or_path or "")
    if not text:
        return {"name": None, "hub": False, "revision": None, "licence": license}
    hub = is_on_hub(text)
    return {
        "name": text if hub else one_line(local_name(text)),
        "hub": hub,
        "revision": revision if hub else None,
        "licence": license or licenses.license_of(text),
    }


def origin_of(model: Any) -> dict[str, Any]:
    """`origin` of a model in memory, by what its config says. A license that was found is not asked for again."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return _known_origin(base, getattr(base.config, "_name_or_path", None), getattr(base.config, "_commit_hash", None))


def origin_of_source(source: SignalSource) -> dict[str, Any]:
    """`origin` of the model that teacher signals are of."""
    info = source.provenance()
    if info.license is not None:
        return origin(info.name_or_path, info.revision, info.license)
    return _known_origin(source, info.name_or_path, info.revision)


def _known_origin(key: Any, name: str | None, revision: str | None) -> dict[str, Any]:
    known = _origins.setdefault(key, {})
    if known.get("licence") is None or known["asked"] != name:
        known |= {"asked": name, **origin(name, revision)}
    return {fact: value for fact, value in known.items() if fact != "asked"}


_origins: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()


def made_from(trainer: Any) -> Models:
    """Which models a trainer's student was made from."""
    return Models.of(_made_from(trainer), "models")


def _made_from(trainer: Any) -> dict[str, Any]:
    start, teacher = origin_of(trainer.model), getattr(trainer, "teacher", None)
    # Without a name it is random or cut, and nobody knows which.
    found = {"student": {"start": {"how": "pretrained" if start["name"] else None, **start}}}
    members = {} if teacher is None else teacher.members()
    origins = {n: origin_of_source(one) for n, one in members.items() if not isinstance(one, SelfTeacher)}
    return _by_name(origins) | found


def _by_name(teachers: dict[str, Any]) -> dict[str, Any]:
    """The part of the section `models` on the teacher, or on several."""
    return teachers if teachers.keys() <= {"teacher"} else {"teachers": teachers}


def is_on_hub(text: str) -> bool:
    """Whether it is taken for a name on the Hub: it can be one, and is no path here."""
    return is_hub_name(text) and not Path(text).expanduser().exists()


def is_hub_name(text: str) -> bool:
    """Whether it can be a name on the Hub: "name" or "owner/name"."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.isascii()


def model_facts(model: Any) -> dict[str, Any]:
    """What a model is now: `origin`, architecture, parameters, image size, adapters, and the hash of its weights."""
    return _facts(model) | {"fingerprint": student_hash(model)}


def _facts(model: Any) -> dict[str, Any]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config
    size = getattr(vision_config(config), "image_size", None)
    return {
        **origin_of(model),
        "architecture": type(base).__name__,
        "model_type": config.model_type,
        "num_labels": config.num_labels,
        "multi_label": is_multi_label(base),
        "parameters": parameters(model),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "image_size": [size, size] if isinstance(size, int) else size,
        "adapters": adapter_kinds(model),
    }


def student_hash(student: Any) -> str:
    """The hash of the weights that are saved of a student: `fingerprint`, and of a model with adapters that of its
    adapters, for without them it is what others are too. `saved_hash` finds the same."""
    if not (kinds := getattr(student, "peft_config", None)):
        return fingerprint(student)
    name = "default" if "default" in kinds else next(iter(kinds))
    return fingerprint(_Tensors(get_peft_model_state_dict(student, adapter_name=name)))


def saved_hash(folder: Path, adapter: bool) -> str:
    """`student_hash` of a student in a folder, of the one of the two kinds that may lie there."""
    if adapter:
        return fingerprint(_Tensors(load_file(folder / SAFETENSORS_WEIGHTS_NAME)))
    with TemporaryDirectory(prefix="student-") as alone:  # transformers would load an adapter in the same folder
        for path in folder.glob("*"):
            if path.is_file() and not path.name.startswith("adapter_"):
                Path(alone, path.name).symlink_to(path.absolute())
        headless = {*(AutoConfig.from_pretrained(alone).architectures or [])} & HEADLESS
        return fingerprint((AutoModel if headless else AutoModelForImageClassification).from_pretrained(alone))


class _Tensors(nn.Module):
    """Tensors under names that are none of a module."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        self.tensors = tensors

    def state_dict(self, *args, **kwargs):
        return self.tensors


def models_section(trainer: Any, start: dict[str, Any] | None = None) -> dict[str, Any]:
    """The section `models` of results.json.

    Args:
        trainer: before or after training.
        start: what the student began as, {"how": pretrained | cut | random, ...}; by default what its config says.
    """
    distiller = trainer.distiller
    student = model_facts(trainer.model)
    for name in ("name", "hub", "revision", "licence"):  # they are of its start
        del student[name]
    student["start"] = _made_from(trainer)["student"]["start"] | (start or {})
    if (size := _shown_size(trainer.processing_class)) is not None:
        student["image_size"] = size
    section: dict[str, Any] = {"student": student, "pairing": pairing_tables(distiller)}
    if trainer.teacher is not None:
        members = trainer.teacher.members().items()
        section = _by_name({name: _teacher(one, trainer.model) for name, one in members}) | section
    return section


def _teacher(source: SignalSource, student: Any) -> dict[str, Any]:
    """The facts of a teacher, which may be the student with its adapters off."""
    info = source.provenance()
    return {
        **(origin_of(student) if info.is_student else origin_of_source(source)),
        "architecture": info.architecture,
        "model_type": info.model_type,
        "num_labels": info.num_labels,
        "parameters": info.parameters,
        "trainable": info.trainable,
        "image_size": info.image_size,
        "adapters": info.adapters,
        "fingerprint": source.fingerprint,
    } | ({"self": True} if info.is_student else {})


def pairing_tables(distiller: Any) -> dict[str, str]:
    """{what pairs layers (keys of objectives, layer_rates): the table of its pairs}; alike ones under one name."""
    users: dict[str, list[str]] = {}
    choices = [(key, distiller.plans[one.source], getattr(one, "layers", None))
               for key, one in distiller.objectives.items() if getattr(one, "pairs", None)]  # fmt: skip
    if distiller.rates is not None and distiller.rates.pairs:
        choices.append(
            ("layer_rates", distiller.plans[distiller.rates.options.teacher_name], distiller.rates.options.layers)
        )
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


def histories(trainer: Any) -> dict[str, Any]:
    """{section of results.json: what a run records there in addition to its log}, of what the run has."""
    rates, rule, weights = trainer.layer_rates, trainer.gradient_rule, trainer.auto_weights.state_dict()
    found: dict[str, Any] = {}
    if rates is not None:
        found["layer_rates"] = {"options": asdict(rates.options), "history": rates.history}
    found |= {"gradient_rule": rule.state_dict()} if rule is not None else {}
    return found | ({} if weights is None else {"auto_weights": weights})
