"""A package imports only from lower floors, packages form no circle, and modules and functions stay readable."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_kdtl"
# From the ground up. Packages of one floor do not import each other.
FLOORS: list[tuple[str, ...]] = [
    ("utils", "functional"),
    ("models", "gradient_rules"),
    ("objectives", "optim", "evaluation", "data", "augment"),
    ("config", "checkpoints", "reports", "export"),
    ("hub",),
    ("trainer", "sharding"),
    ("preflight",),
    ("commands",),
    ("__main__",),
    ("recipes", "benchmarks"),
]
ALIASES = {"augment": "data", "sharding": "trainer"}
"""Modules that only re-export a name of before: they belong to the package that they name."""
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}

# What still breaks a rule, with the reason. These lists only shrink: what breaks no rule any more is taken out.
UPWARD: dict[str, str] = {}
LONG_MODULES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}
MODULE_LINES, FUNCTION_LINES = 300, 40


def _files() -> Iterator[Path]:
    yield from sorted(
        path for folder in ("hf_kdtl", "recipes", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    )


def _package(path: Path) -> str:
    """The package that a file belongs to: hf_kdtl/models/x.py -> models, recipes/x.py -> recipes."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ALIASES.get(parts[1], parts[1]) if parts[0] == "hf_kdtl" else parts[0]


@cache
def _nodes(path: Path) -> list[ast.AST]:
    return [*ast.walk(ast.parse(path.read_text()))]


def _imports(path: Path) -> Iterator[str]:
    for node in _nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path}: wildcard import"
            yield node.module or ""
            yield from (
                f"{node.module}.{alias.name}" for alias in node.names if (node.module or "").startswith("hf_kdtl")
            )


def _arrows() -> dict[tuple[str, str], set[str]]:
    """(package, package it imports) -> "file: module" """
    found: dict[tuple[str, str], set[str]] = {}
    for path in _files():
        here = _package(path)
        if here == "__init__":
            continue  # the public names; below, that it holds nothing else
        for module in _imports(path):
            parts = module.split(".")
            if parts[0] == "hf_kdtl" and len(parts) > 1 and (parts[1] in FLOOR):
                there = ALIASES.get(parts[1], parts[1])
            elif parts[0] in ("recipes", "benchmarks"):
                there = parts[0]
            else:
                continue
            if there != here:
                found.setdefault((here, there), set()).add(f"{path.relative_to(ROOT)}: {module}")
    return found


def test_every_module_has_a_floor():
    here = {_package(path) for path in _files()} - {"__init__"}
    assert here <= set(FLOOR), f"add to FLOORS: {sorted(here - set(FLOOR))}"
    assert {"utils", "models", "trainer", "commands"} <= here


def test_imports_go_down_only():
    arrows = _arrows()
    assert sum(map(len, arrows.values())) > 300
    upward = {
        where for (here, there), files in arrows.items() if FLOOR[there] >= FLOOR[here] for where in files
    }  # fmt: skip
    assert upward == set(UPWARD), f"imports of the same or a higher floor, or fixed: {sorted(upward ^ set(UPWARD))}"


def test_no_circle_within_a_package():
    """Modules of the package as a graph: an order exists in which each is imported after what it imports,
    also within functions."""
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
    needs = {
        name: {module for module in _imports(path) if module in modules and module != name}
        for name, path in modules.items()
        if not name.endswith("__init__")
    }
    while ready := [name for name, others in needs.items() if not others & needs.keys()]:
        for name in ready:
            del needs[name]
    assert not needs, f"these modules import each other: {sorted(needs)}"


def test_functional_needs_torch_alone():
    for path in (PACKAGE / "functional").rglob("*.py"):
        roots = {module.split(".")[0] for module in _imports(path)}
        assert not roots & {"transformers", "datasets", "accelerate", "peft", "evaluate", "scipy", "sklearn"}, path


def test_modules_stay_short():
    long = {
        str(path.relative_to(PACKAGE)): lines
        for path in PACKAGE.rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > MODULE_LINES
    }
    assert long.keys() == LONG_MODULES.keys(), f"split these, or take them out of the list: {long}"


def test_functions_stay_short():
    """Lines of code: without the docstring, blank lines and comments."""
    long = {
        name: lines for path in PACKAGE.rglob("*.py") for name, lines in _functions(path) if lines > FUNCTION_LINES
    }
    assert long.keys() == LONG_FUNCTIONS.keys(), f"split these, or take them out of the list: {long}"


def _functions(path: Path) -> Iterator[tuple[str, int]]:
    text = path.read_text().splitlines()
    for node in _nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body
            lines = text[node.lineno - 1 : body[0].lineno - 1] if body is node.body else []
            lines = lines + text[body[0].lineno - 1 : node.end_lineno]
            code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
            yield f"{path.relative_to(PACKAGE)}:{node.name}", len(code)


@pytest.mark.parametrize("name", ["reports", "evaluation"])
def test_figures_are_drawn_in_one_package(name):
    for path in (PACKAGE / name).glob("*.py"):
        assert not any(module.startswith("matplotlib") for module in _imports(path)), path
