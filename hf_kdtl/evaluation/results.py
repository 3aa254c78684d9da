"""results.json: what a run folder reports about itself. Reports and cards are made from it and from nothing else."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from hf_kdtl.evaluation.json_records import FILE as FILE
from hf_kdtl.evaluation.records import Results
from hf_kdtl.utils.redaction import relative_paths

SCHEMA = 2
SECTIONS = (
    "run",
    "defaults",
    "data",
    "objectives",
    "models",
    "pairing",
    "curves",
    "stages",
    "layer_rates",
    "gradient_rule",
    "auto_weights",
    "tune",
    "probe",
    "representation",
    "evaluation",
    "comparison",
    "student_evaluation",
    "export",
    "embedding",
)


def read_results(folder: str | Path) -> dict[str, Any]:
    """The results of a run folder as JSON, in the current schema; schema 1 is converted.

    Raises:
        FileNotFoundError: when there are none.
        ValueError: when the file is not JSON, or of another version of the schema.
    """
    path = Path(folder, FILE)
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {FILE}; expected the output_dir of a training or an evaluation.")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it, or run the command again.") from error
    return upgrade(results, str(path))


def load_results(folder: str | Path) -> Results:
    """The results of a run folder as typed records. Raises as `read_results`, and for malformed sections."""
    results = read_results(folder)
    try:
        return Results.of(results)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def upgrade(results: Any, source: str = "the results") -> dict[str, Any]:
    """Results in the current schema: what schema 1 calls `judged` is `student_evaluation`; `comparison` is filled in.

    Raises:
        ValueError: for another schema; `source` names the file.
    """
    found = results.get("schema") if isinstance(results, dict) else None
    if found == 1:
        renamed = {"judged": "student_evaluation"}
        results = {renamed.get(name, name): value for name, value in results.items()} | {"schema": SCHEMA}
        found = SCHEMA
    if found != SCHEMA:
        raise ValueError(
            f"{source} has schema {found!r} and this version reads 1 and {SCHEMA}. Use the version of hf_kdtl that "
            "wrote it, or run the command again in another output_dir."
        )
    return _with_comparison(results)


def _with_comparison(results: dict[str, Any]) -> dict[str, Any]:
    """The section `comparison` from the `paired_difference` of earlier versions, which knew two arms."""
    evaluation = results.get("evaluation")
    if not isinstance(evaluation, dict) or "paired_difference" not in evaluation or "comparison" in results:
        return results
    entries = []
    for split, found in evaluation["paired_difference"].items():
        low, high = found["interval"] or (None, None)
        seeds = [int(seed) for seed in evaluation["models"]["alone"]["runs"]]
        entry = {"a": "distilled", "b": "alone", "metric": "accuracy", "split": split, "mean": found["mean"]}
        entries.append(entry | {"low": low, "high": high, "seeds": seeds})
    kept = {name: value for name, value in evaluation.items() if name != "paired_difference"}
    return results | {"evaluation": kept, "comparison": entries}


def update_results(folder: str | Path, section: str, value: Any) -> dict[str, Any]:
    """Replace one section, and return all of them; sections of other programs stay as they are.

    The file is written to a temporary file and moved into place, so that it is never incomplete. Paths below the
    working directory and the home directory are shortened to what follows them: the file may be published.

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


def same_value(one: Any, other: Any) -> bool:
    """Whether two values are the same, of which either may have been read from results.json: paths by where they lead,
    since one may be shortened (`update_results`) and the other as it was typed.

    >>> same_value("~/photos", str(Path.home() / "photos")), same_value({"teacher": "./a/"}, {"teacher": "a"})
    (True, True)
    """
    return _resolved(to_json(one)) == _resolved(to_json(other))


def _resolved(value: Any) -> Any:
    """JSON with every text as if it were a path: which ones are is not known, and those that differ still do."""
    if isinstance(value, dict):
        return {key: _resolved(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item) for item in value]
    return os.path.realpath(os.path.expanduser(value)) if isinstance(value, str) else value
