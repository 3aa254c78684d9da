"""What a student without a head gives, as lines of a report or a card."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hf_kdtl.evaluation.records import Results
from hf_kdtl.utils.text import markdown_table

COLUMNS = {
    "knn": "kNN accuracy",
    "probe": "linear probe",
    "recall 1": "recall at 1",
    "recall 5": "recall at 5",
    "agreement": "agreement",
    "cka": "CKA",
}


def embedding_lines(results: Results) -> list[str]:
    """A table of the models, and what its columns mean; nothing where the results have no section `embedding`."""
    section: dict[str, Any] = results.extra.get("embedding", {})
    models: dict[str, dict[str, Any]] = section.get("models", {})
    if not models:
        return []
    found = {
        who: {**one, **{f"recall {k}": v for k, v in one.get("recall", {}).items()}} for who, one in models.items()
    }
    columns = [key for key in COLUMNS if any(key in one for one in found.values())]
    rows = [["", *(COLUMNS[key] for key in columns), "parameters"]]
    for who, one in found.items():
        rows.append([who, *(_shown(key, one.get(key)) for key in columns), f"{one['parameters']:,}"])
    about = []
    if "agreement" in columns:
        about.append(
            f"Agreement and CKA with the teacher on {section['images']} "
            f"{section.get('split', 'held-out')} images: the mean cosine after the best linear map, and linear "
            "centred kernel alignment."
        )
    if "knn" in columns:
        about.append("kNN (k 20, cosine), linear probe (C by validation) and recall on the labelled test images.")
    return [markdown_table(rows), "", " ".join(about), ""]


def embedding_sentence(results: Results, keys: Iterable[str] = tuple(COLUMNS)) -> str:
    """What was measured of the student, of these `COLUMNS`, in a sentence; empty where nothing was."""
    one: dict[str, Any] = results.extra.get("embedding", {}).get("models", {}).get("student", {})
    shown = [f"{COLUMNS[key]} {_shown(key, one[key])}" for key in keys if key in one]
    return f"{', '.join(shown)}." if shown else ""


def _shown(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if key in ("agreement", "cka") else f"{100 * value:.1f} %"
