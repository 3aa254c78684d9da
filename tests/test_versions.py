"""Packages that are too old are refused by name; `make test-oldest` runs the suite on the oldest that are allowed."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hf_kdtl.utils.versions import check, outdated

ROOT = Path(__file__).parents[1]
OLD = {"pillow": "9.0", "transformers": "5.8.1"}


@pytest.fixture
def installed(monkeypatch):
    """Pretend that other versions are installed; None is a package that is missing."""

    def pretend(**versions):
        def version(name):
            found = versions.get(name, "absent")
            if found is None:
                raise metadata.PackageNotFoundError(name)
            return real(name) if found == "absent" else found

        monkeypatch.setattr(metadata, "version", version)

    real = metadata.version
    return pretend


def test_what_is_installed_is_new_enough():
    check()


def test_an_older_package_is_named_with_what_to_type(installed):
    bound = {name: next(one for one in metadata.requires("hf_kdtl") if one.startswith(name)) for name in OLD}
    installed(**OLD)
    with pytest.raises(ImportError) as refused:
        check()
    assert str(refused.value) == (
        "hf_kdtl does not work with pillow 9.0, transformers 5.8.1. "
        f"Type: pip install --upgrade '{bound['pillow']}' '{bound['transformers']}'"
    )


def test_only_what_is_required_here_counts(installed):
    installed(torch="1.13.1+cpu", missing=None, odd="unknown")
    assert outdated(["torch>=2", "missing>=1", "odd>=1"]) == {"torch>=2": "torch 1.13.1+cpu"}
    installed(torch="2.9.0+cu128")
    assert outdated(["torch>=2.9"]) == {}
    installed(torch="2.9.0.dev1")
    assert outdated(["torch>=2.9"]) != {}


def test_extras_are_not_required(installed):
    installed(onnx="0.1", optuna=None)
    check()


def test_nothing_is_required_without_an_installation():
    check("no-such-package")


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
