"""evaluation/ holds numbers: it draws nothing and does not know the reports."""

import ast
from pathlib import Path

import hf_kdtl.evaluation

FOLDER = Path(hf_kdtl.evaluation.__file__).parent


def imported(path):
    """Every module that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_evaluation_draws_nothing_and_does_not_import_the_reports():
    files = sorted(FOLDER.rglob("*.py"))
    assert len(files) > 10
    for path in files:
        for module in imported(path):
            assert module.split(".")[0] != "matplotlib" and not module.startswith("hf_kdtl.reports"), (path, module)


def test_matplotlib_is_imported_in_the_figures_alone():
    for path in FOLDER.parent.rglob("*.py"):
        if "matplotlib" in {module.split(".")[0] for module in imported(path)}:
            assert path.parent.name == "figures", path
