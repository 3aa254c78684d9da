"""Under which license a student may go out: what its teacher's license allows, as we read it.

A student is treated as a derivative of its teacher and of what it started from. Whether the law does so is not
settled anywhere; the stricter reading is taken here. This is our reading of the licenses and no legal advice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hf_kdtl.evaluation.model_records import Models, Origin

TEACHERS = "the teacher's license"
STARTS = "the license of the model that the student starts from"
EITHERS = f"{TEACHERS}, or that of the model that the student starts from,"
UNKNOWN = ("", "unknown", "other", "none")
"""Values of a card's metadata without information: `other` is a text that somebody has to read."""

PERMISSIVE = ("apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "zlib", "ncsa",
              "cc0-1.0", "unlicense", "wtfpl", "pddl", "bsl-1.0", "afl-3.0", "artistic-2.0", "cdla-permissive-1.0",
              "cdla-permissive-2.0", "postgresql", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "odc-by",
              "ms-pl")  # fmt: skip
"""Ask for a notice at most: the student may be published under any license."""


def license_of(name_or_path: str | Path, token: str | bool | None = None) -> str | None:
    """The license that a model's card states, as the Hub's identifier in lower case; None where it is not known.

    Args:
        name_or_path: a folder with a README.md, or a name on the Hub.
        token: for a gated or private model; by default the one that is logged in.
    """
    folder = Path(name_or_path).expanduser()
    try:
        if folder.is_dir():
            card = ModelCard.load(folder / "README.md", ignore_metadata_errors=True)
        else:
            card = ModelCard.load(str(name_or_path), token=token, ignore_metadata_errors=True)  # type: ignore[arg-type]
    except Exception:  # no card, no network, no such model, metadata that is no YAML: each means that it is not known
        return None
    return _word(card.data.license)


def of_parents(models: Models) -> str | None:
    """The license that binds a student by the models that it was made from: see `most_restrictive`.

    None where one of them is not known, and where there are none.

    Raises:
        ValueError: as `most_restrictive`.
    """
    return most_restrictive([model.license for model in parents(models)])


def parents(models: Models) -> list[Origin]:
    """What a student was made from: its teachers, and what it started from. A teacher without a name is one too."""
    start = models.student.start
    return [*models.all_teachers, *([start] if start.how == "pretrained" else [])]


def student_license(models: Models, asked: str | None) -> str:
    """The license of a student made from `models` (the section of results.json): see `resolve_license`.

    Raises:
        ValueError: as `resolve_license`, naming the models that bind it.
    """
    key = bool(models.all_teachers), models.student.start.how == "pretrained"
    whose = {(True, False): TEACHERS, (False, True): STARTS, (False, False): ""}.get(key, EITHERS)
    if len(models.all_teachers) > 1:
        whose = whose.replace(TEACHERS, "the strictest license of the teachers")
    return resolve_license(of_parents(models), asked, whose)


def resolve_license(
    inherited: str | None, asked: str | None, whose: str = EITHERS, what: str = "a distilled student"
) -> str:
    """The license of a student.

    Args:
        inherited: what its teacher's license is, as `license_of` returns it.
        asked: what the user typed, None where nothing.
        whose: how errors call the inherited license; "" for a student without a teacher that starts at random.
        what: how they call what is published.

    Raises:
        ValueError: when neither is known; when the teacher's forbids derivatives; when the requested one
            would loosen the teacher's.

    >>> resolve_license("mit", "apache-2.0"), resolve_license("cc-by-nc-4.0", None)
    ('apache-2.0', 'cc-by-nc-4.0')
    """
    its, wanted = _word(inherited), _word(asked)
    if asked is not None and wanted is None:
        raise ValueError(
            f"license is {asked!r}; expected an identifier of the Hub, such as --license apache-2.0, or in Python "
            'DistillationConfig(license="apache-2.0").'
        )
    if its is not None and "nd" in its.split("-"):
        raise ValueError(
            f"{whose} is {its}, which allows no derivatives, and {what} is one as we read "
            "it. Do not publish it, or ask the teacher's owner and distil from a copy whose card states what they "
            "allow."
        )
    if its is None and wanted is None:
        known = (
            f"{whose} is not known (the model card states none, or could not be read). Find out what it allows"
            if whose
            else "no license was chosen. The student has no teacher and starts from random weights, so choose any"
        )
        raise ValueError(
            f"{known} and type --license <identifier>, such as --license apache-2.0; in Python "
            'DistillationConfig(license="apache-2.0").'
        )
    if its is None or wanted is None or wanted == its or its in PERMISSIVE:
        return wanted or its  # type: ignore[return-value]
    if _keeps(its, wanted):
        return wanted
    raise ValueError(
        f"{whose} is {its} and {wanted} is requested, which would loosen it ({_why(its)}). Type "
        f"--license {its} (in Python DistillationConfig(license={its!r})), or leave it out."
    )


def most_restrictive(licenses: list[str | None]) -> str | None:
    """The license that binds a student with several parents (its teachers and what it started from): the strictest.

    None where one is not known. Of permissive ones the first.

    >>> most_restrictive(["mit", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"])
    'cc-by-nc-sa-4.0'

    Raises:
        ValueError: when two of them cannot both be kept.
    """
    if not licenses or None in [_word(one) for one in licenses]:
        return None
    found = [word for one in licenses if (word := _word(one)) is not None]
    binding = [one for one in dict.fromkeys(found) if one not in PERMISSIVE]
    keeping = [one for one in binding if all(one == other or _keeps(other, one) for other in binding)]
    if binding and not keeping:
        raise ValueError(f"teachers and start have the licenses {' and '.join(binding)}, which cannot all be kept.")
    return (keeping or found)[0]


def _keeps(its: str, wanted: str) -> bool:
    """Whether a license that is not permissive may become `wanted`: non-commercial by attribution may add share-alike,
    and a license's later version of the same terms is taken."""
    mine, other = _terms(its), _terms(wanted)
    if mine is None or other is None:
        return False
    return "sa" not in mine and "nd" not in other and mine <= other


def _terms(license: str) -> set[str] | None:
    """The terms of a Creative Commons license: {"by", "nc", "sa", "nd"}; None of another."""
    words = license.split("-")
    return set(words[1:]) & {"by", "nc", "sa", "nd"} if words[0] == "cc" else None


def _why(license: str) -> str:
    terms = _terms(license)
    if terms is None:
        return "it is not on our list of permissive ones, so it is kept as it is"
    words = {"nc": "non-commercial", "sa": "share-alike"}
    return " and ".join(words[term] for term in ("nc", "sa") if term in terms) or "its terms go on"


def _word(license: Any) -> str | None:
    """An identifier in lower case; None for what says nothing. Of a list (a card may hold one) its only entry."""
    if isinstance(license, list) and len(license) == 1:
        license = license[0]
    word = license.strip().lower() if isinstance(license, str) else ""
    return None if word in UNKNOWN or not word.isprintable() or len(word) > 60 or " " in word else word
