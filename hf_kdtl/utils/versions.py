"""Whether the packages that are installed are new enough: an older one fails later, in words that say nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version


def check(package: str = "hf_kdtl", installed: Callable[[str], str] = metadata.version) -> None:
    """Compare what is installed with what `package` requires.

    Raises:
        ImportError: naming what is too old, and what to type.
    """
    try:
        required = metadata.requires(package) or []
    except metadata.PackageNotFoundError:  # run from its sources, without an installation
        return
    if old := too_old(required, installed):
        found = ", ".join(f"{one.name} {installed(one.name)}" for one in old)
        wanted = " ".join(f"'{one.name}{one.specifier}'" for one in old)
        raise ImportError(f"{package} does not work with {found}. Type: pip install --upgrade {wanted}")


def too_old(required: Iterable[str], installed: Callable[[str], str]) -> list[Requirement]:
    """The requirements that what is installed does not meet. A package that is missing says so itself, and better."""
    unmet = []
    for text in required:
        one = Requirement(text)
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            if not one.specifier.contains(Version(installed(one.name)), prereleases=True):
                unmet.append(one)
        except (metadata.PackageNotFoundError, InvalidVersion):
            continue
    return unmet
