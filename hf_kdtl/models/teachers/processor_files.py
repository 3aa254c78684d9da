"""Opening the image processors saved with models: absent is None, unreadable is an error."""

from __future__ import annotations

import json
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import __version__

# transformers' own name asks for torchvision before 5.18, also where Pillow does the work.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import has_file

from hf_kdtl.models.teachers.resolve import TRUST, WHERE, locate, untrusted

FILES = ("preprocessor_config.json", "processor_config.json")
SETTINGS = {"do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"}
SETTINGS |= {"do_normalize", "image_mean", "image_std"}


def check_processor(processor: Any) -> Any:
    """The same image processor; raises TypeError for a path or a class in its place."""
    if isinstance(processor, str | Path | type):
        found = processor.__name__ if isinstance(processor, type) else repr(str(processor))
        raise TypeError(
            f"the image processor is {'the class ' if isinstance(processor, type) else ''}{found}; expected one that "
            "was made: AutoImageProcessor.from_pretrained(<a path>)."
        )
    return processor


def processor_differences(one: Any, other: Any) -> list[str]:
    """The settings in which two image processors differ; none where one of them does not say what it does."""
    if one is other or not (hasattr(one, "to_json_string") and hasattr(other, "to_json_string")):
        return []
    ours, its = ({k: v for k, v in json.loads(p.to_json_string()).items() if v is not None} for p in (one, other))
    for settings in (ours, its):  # the same steps, by another library; and a class that holds a tokenizer too
        settings["image_processor_type"] = settings.get("image_processor_type", "").removesuffix("Fast")
        settings.pop("processor_class", None)
    return sorted(name for name in ours.keys() | its.keys() if ours.get(name) != its.get(name))


def open_processor(path: str | Path, *, role: str = "the model", **options: Any) -> Any:
    """The image processor saved with a model, or None where none was saved.

    Args:
        options: those of the model; the ones that locate its files or allow the code in its folder are used.

    Raises:
        OSError: when a processor is there and cannot be read or is not trusted, with what to type.
    """
    source = locate(path, role)
    where = untrusted({key: value for key, value in options.items() if key in WHERE})
    try:
        processor = AutoImageProcessor.from_pretrained(source, **where)
        _check_settings(processor, source, where)
        return processor
    except Exception as error:  # a broken file raises whatever its content leads to
        files = [name for name in FILES if _exists(source, name, where)]
        if not files and not isinstance(error, ImportError):
            return None
        said = str(error).strip().partition("\n")[0][:300]
        raise OSError(
            f"the image processor of {role} {str(path)!r} could not be read from {' or '.join(files) or 'its config'} "
            f"({type(error).__name__}: {said}). {_processor_cure(error)}"
        ) from error


def _exists(source: str, name: str, where: dict[str, Any]) -> bool:
    subfolder = where.get("subfolder") or ""
    if Path(source).is_dir():
        return os.path.lexists(Path(source, subfolder, name))  # also a link to a file that is gone
    keys = ("revision", "proxies", "token", "local_files_only", "cache_dir")
    try:
        return has_file(source, f"{subfolder}/{name}".lstrip("/"), **{k: where[k] for k in keys if k in where})
    except OSError:
        return True  # it cannot be looked up, so nobody knows that it is absent


def _check_settings(processor: Any, source: str, where: dict[str, Any]) -> None:
    """Raises ValueError for a file without settings of pixels, and for a misspelt one: the class's default would stand
    in its place. Settings of their own have timm's class, and one whose code lies in the model's folder."""
    if where.get(TRUST) or not hasattr(processor, "get_image_processor_dict"):
        return
    found = set(processor.get_image_processor_dict(source, **where)[0])
    if "pretrained_cfg" in found:
        return
    if not found & SETTINGS:
        raise ValueError(f"it has none of {', '.join(sorted(SETTINGS))}, so every one would be a default")
    for name in sorted(found - SETTINGS):
        if meant := get_close_matches(name, SETTINGS - found, n=1, cutoff=0.8):
            raise ValueError(f"it has {name!r}; did you mean {meant[0]!r}? That would be a default")


def _processor_cure(error: Exception) -> str:
    by_hand = "or pass the processor: Teacher(model, processing_class=<its image processor>)"
    if TRUST in str(error):
        return f"Its class is code in the model's folder: pass {TRUST}=True if you trust it, {by_hand}."
    if isinstance(error, ImportError):
        return f"Install what it asks for, {by_hand}."
    return (
        f"Expected JSON as written by processor.save_pretrained(folder), of a class that transformers {__version__} "
        f"has. Save it again, remove the file (then the pixels are taken as they are), {by_hand}."
    )
