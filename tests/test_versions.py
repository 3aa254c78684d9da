"""Packages that are too old are refused by name; `make test-oldest` runs the suite on the oldest that are allowed."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hf_kdtl.utils.versions import check, too_old

ROOT = Path(__file__).parents[1]


def installed(**changed):
    return lambda name: changed.get(name) or metadata.version(name)


def test_what_is_installed_is_new_enough():
    check()


def test_an_older_package_is_named_with_what_to_type():
    with pytest.raises(ImportError, match=r"transformers 5\.20\.0.*pip install --upgrade 'transformers>=5\.23"):
        check(installed=installed(transformers="5.20.0"))


def test_only_what_is_required_here_counts():
    required = ["torch>=2", "old>=3; extra == 'test'", "future>=1; python_version < '3'", "missing>=1", "odd>=1"]
    versions = {"torch": "1.13.1+cpu", "old": "1", "future": "0", "odd": "unknown"}

    def version(name):
        if name == "missing":
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    assert [one.name for one in too_old(required, version)] == ["torch"]
    assert too_old(["torch>=2.9"], installed(torch="2.9.0+cu128")) == []
    assert too_old(["torch>=2.9"], installed(torch="2.9.0.dev1")) != []


def test_the_error_comes_at_the_import():
    code = (
        "from importlib import metadata; real = metadata.version\n"
        "metadata.version = lambda name: '5.1.0' if name == 'transformers' else real(name)\n"
        "import hf_kdtl"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "does not work with transformers 5.1.0" in done.stderr.splitlines()[-1]


def test_the_oldest_versions_are_the_bounds():
    """constraints-oldest.txt is what `make test-oldest` installs: each bound of pyproject.toml, exactly."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {one.name: str(one.specifier).removeprefix(">=") for one in map(Requirement, project["dependencies"])}
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    oldest = dict(re.fullmatch(r"([\w-]+)==(.+)", line).groups() for line in lines if line and line[0] != "#")
    assert bounds.keys() <= oldest.keys()
    for name, bound in bounds.items():
        assert Requirement(f"x=={bound}").specifier.contains(oldest[name]), name
