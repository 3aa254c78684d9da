"""results.json: what a run folder says about itself. Reports and cards are made from it and from nothing else."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from hf_kdtl.utils.redaction import relative_paths

FILE = "results.json"
SCHEMA = 1
SECTIONS = (
    "run",
    "data",
    "objectives",
    "models",
    "pairing",
    "curves",
    "layer_rates",
    "gradient_rule",
    "representation",
    "evaluation",
    "judged",
)


def read_results(folder: str | Path) -> dict[str, Any]:
    """The results of a run folder.

    Raises:
        FileNotFoundError: when there are none.
        ValueError: when the file is not JSON, or of another version of the schema.
    """
    path = Path(folder, FILE)
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {FILE}; expected the output_dir of a recipe.")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it, or run the recipe again.") from error
    found = results.get("schema") if isinstance(results, dict) else None
    if found != SCHEMA:
        raise ValueError(
            f"{path} has schema {found!r} and this version reads {SCHEMA}. Use the version of hf_kdtl that wrote it, "
            "or run the recipe again in another output_dir."
        )
    return results


def update_results(folder: str | Path, section: str, value: Any) -> dict[str, Any]:
    """Replace one section, and return all of them. The file is made when it is missing, and never half-written.

    Paths below the working directory and the home directory are shortened to what follows them: the file may be
    published.

    Raises:
        ValueError: for an unknown section, or a file of another schema.
    """
    if section not in SECTIONS:
        raise ValueError(f"unknown section {section!r} of {FILE}; expected one of {', '.join(SECTIONS)}.")
    path = Path(folder, FILE)
    results = read_results(folder) if path.exists() else {"schema": SCHEMA}
    results[section] = to_json(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)
    return results


def to_json(value: Any) -> Any:
    """As JSON knows it: numpy's and torch's numbers as numbers, what is not finite as null, tuples as lists."""
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return to_json(value.tolist())
    return relative_paths(str(value))
