"""Opening saved image classifiers, with every weight accounted for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoModelForImageClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from hf_kdtl.models.blocks import find_blocks
from hf_kdtl.models.forward.classifier import classifiers
from hf_kdtl.models.forward.embedding import classifier_config
from hf_kdtl.models.teachers.file_names import check_names, describe_missing, unread_weights

# Options of from_pretrained that say where a file lies and whether its code may run: the model's and its processor's.
TRUST = "trust_remote_code"
WHERE = {"subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download", "proxies"}
WHERE |= {TRUST, "code_revision"}


@dataclass(frozen=True)
class Opened:
    """A model, what its file did not hold, and what of it was not read.

    Args:
        model: the classifier, in eval mode as transformers returns it.
        new_head: tensors of the head that the file lacks, which are random now.
        unread: of tensors in the file that the model does not have, a sentence; empty where there are none.
    """

    model: Any
    new_head: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


class Loaded(NamedTuple):
    """What `open_with` read: the model, the tensors that its file lacks, {name: (shape in the file, shape wanted)} of
    those among them that have another shape there, and a sentence where it holds others."""

    model: Any
    lacking: list[str]
    mismatched: dict[str, Any]
    unread: list[str]


def untrusted(options: dict[str, Any]) -> dict[str, Any]:
    """Options of from_pretrained that run no code of the model's folder, unless they ask for it: without this
    transformers would ask on the terminal."""
    return {TRUST: False} | options


def locate(path: str | Path, role: str = "the model") -> str:
    """A model's folder or Hub name, `~` expanded.

    Raises:
        FileNotFoundError: when it looks like a path and nothing is there, or is a file.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        raise FileNotFoundError(f"{role} {str(path)!r} is a file; expected the folder that it is in: {folder.parent}.")
    if folder.exists():
        return str(folder)
    if str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
        raise FileNotFoundError(
            f"{role}'s path {str(path)!r} does not exist; expected a saved model's folder, or a Hub name."
        )
    return str(path)


def open_classifier(path: str | Path, *, role: str = "the model", keep_head: bool = True, **options: Any) -> Opened:
    """Load an image classifier and account for every weight.

    Args:
        path: a folder or Hub name.
        role: what the model is called in messages, such as "the teacher".
        keep_head: whether the classifier must come from the file. Otherwise `new_head` names what is random.
        options: of `from_pretrained`. Code in the model's folder runs only where they allow it; there is no prompt.

    Raises:
        OSError: when nothing is there, or it cannot be read.
        ValueError: when weights of the backbone are not in the file, or those of the head where `keep_head`.
    """
    options = _of_a_tower(path, options)
    model, lacking, mismatched, unread = open_with(AutoModelForImageClassification, path, role=role, **options)
    head = _head_names(model, lacking)
    if backbone := [key for key in lacking if key not in head]:
        saved_alone = [type(model.base_model).__name__] == model.config.architectures
        if saved_alone and "key_mapping" not in options:  # before 5.20 transformers does not know these names here
            options["key_mapping"] = {rf"^(?!{model.base_model_prefix}\.)": f"{model.base_model_prefix}."}
            opened = open_classifier(path, role=role, keep_head=keep_head, **options)
            vars(opened.model).pop("_weight_conversions", None)  # it is saved under the classifier's names
            return opened
        raise ValueError(
            f"{role} {str(path)!r} lacks {len(backbone)} weights of {type(model).__name__}'s backbone, which would be "
            f"random: {describe_missing(backbone, mismatched)}. Expected a file with all of them: save the model "
            "again with model.save_pretrained(folder)."
        )
    if head and keep_head:
        raise ValueError(missing_head(f"{role} {str(path)!r}", head, mismatched))
    random = f"{describe_missing(head, mismatched)} start from random values."
    notes = [f"{role} {str(path)!r} has no trained head in its file: {random}"] if head else []
    return Opened(model, head, [*notes, *unread], unread)


def _of_a_tower(path: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """Options that open a vision tower saved alone (CLIP's, SigLIP's) as its family's classifier; others unchanged."""
    try:
        config = options.get("config") or open_config(path, **options)
    except OSError:  # reported where it is opened
        return options
    if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING or (both := classifier_config(config)) is None:
        return options
    both.update({name: options.pop(name) for name in ("id2label", "label2id") if name in options})
    return options | {"config": both, "key_mapping": {r"^(?!vision_model\.)": "vision_model."}}


def open_with(opener: Any, path: str | Path, *, role: str = "the model", **options: Any) -> Loaded:
    """A model, by a class that has `from_pretrained`.

    Raises:
        OSError, ValueError: as `open_classifier`, for names with a prefix, and for blocks and weights of the file that
            the config leaves out.
    """
    source = locate(path, role)
    options = untrusted(options)
    _refuse_adapter(source, options, f"{role} {str(path)!r}")
    try:
        with _without_report():
            model, info = opener.from_pretrained(source, output_loading_info=True, **options)
    except (TypeError, AttributeError, KeyError):  # of the options, or of code in the model's folder
        raise
    except Exception as error:  # a broken file raises whatever its content leads to
        said = str(error).replace(" For details look at the above report!", "").partition("\n")[0]
        raise OSError(f"{role} {str(path)!r} could not be opened ({said}). {_cure(source, error, options)}") from error
    mismatched = {key: (tuple(found), tuple(wanted)) for key, found, wanted in info["mismatched_keys"]}
    lacking = sorted(k for k in {*info["missing_keys"], *mismatched} if not k.endswith("num_batches_tracked"))
    unexpected = sorted(info["unexpected_keys"])
    check_names(lacking, unexpected, model, f"{role} {str(path)!r}")
    return Loaded(model, lacking, mismatched, unread_weights(unexpected, model, f"{role} {str(path)!r}"))


@contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of missing weights: what it shows is an error here, or a note."""
    logger = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def missing_head(who: str, head: Sequence[str], mismatched: dict[str, Any] | None = None) -> str:
    """The error for class outputs that are wanted of a head with random weights."""
    few = describe_missing(head, mismatched or {})
    return (
        f"{who} has no trained head in its file ({few}), so its class outputs would be "
        "random. Expected a fine-tuned image classifier: train the head first (hf-kdtl train-teacher --model <this "
        "model>), or name a model that has one; leave num_labels and ignore_mismatched_sizes out."
    )


def open_config(path: str | Path, *, role: str = "the model", **options: Any) -> Any:
    """The config of a saved model; of `options` those that say where it is, and whether its code may run.

    Raises:
        OSError: when nothing is there, or it cannot be read.
    """
    source = locate(path, role)
    where = untrusted({key: value for key, value in options.items() if key in WHERE})
    _refuse_adapter(source, where, f"{role} {str(path)!r}")
    try:
        return AutoConfig.from_pretrained(source, **where)
    except (OSError, ValueError) as error:
        cure = _cure(source, error, where)
        raise OSError(f"{role} {str(path)!r} could not be opened ({error}). {cure}") from error


def _refuse_adapter(source: str, options: dict[str, Any], who: str) -> None:
    """Raises ValueError for a folder of a PEFT adapter alone: its base model lies elsewhere."""
    folder = Path(source, options.get("subfolder") or "")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{who} holds a PEFT adapter without its base model (adapter_config.json, and no config.json); expected a "
            "complete model. Merge it first: PeftModel.from_pretrained(<base model>, <adapter>).merge_and_unload()"
            ".save_pretrained(<folder>), and save the base model's image processor there too."
        )


def renew_head(model: Any) -> None:
    """Give a classifier's last layers the random values of a new model of its config."""
    for old, new in zip(classifiers(model), classifiers(type(model)(model.config)), strict=True):
        old.load_state_dict(new.state_dict())


def _cure(source: str, error: Exception, options: dict[str, Any]) -> str:
    inner = [name for name in ("model", "student") if Path(source, name, "config.json").is_file()]
    if inner:
        return f"Did you mean {Path(source, inner[0])}?"
    if TRUST in str(error):
        return f"Its architecture is code in the model's folder: pass {TRUST}=True if you trust it."
    if "ignore_mismatched_sizes" in str(error):
        asked = {key: options[key] for key in ("num_labels", "id2label", "image_size", "config") if key in options}
        if not asked:
            return "Its config.json says other sizes than the file has: save it again with model.save_pretrained."
        return f"The sizes asked for ({asked}) are not the file's: leave them out."
    if "weights_only" in str(error):
        return (
            "Its file holds more than tensors, such as a model pickled whole, and no code of a pickle is run: where "
            "it was made, save it with model.save_pretrained(folder)."
        )
    if type(error).__name__ in ("SafetensorError", "UnpicklingError", "EOFError"):
        return "Its file of weights is cut off, or a pointer of git-lfs (git lfs pull): download it again."
    return "Expected a saved image classifier."


def _head_names(model: Any, keys: Iterable[str]) -> list[str]:
    """Those of the keys that belong to the head: outside the module with the blocks, its classifiers, its pooler."""
    backbone = find_blocks(model)[0][0].split(".")[0]
    heads = [name for name, module in model.named_modules() if any(module is one for one in classifiers(model))]
    return [
        key
        for key in keys
        if key.split(".")[0] != backbone or ".pooler." in key or any(key.startswith(f"{head}.") for head in heads)
    ]
