"""evaluation/ holds numbers: it draws nothing and does not know the reports."""

import ast
from pathlib import Path

import hf_kdtl.evaluation

FOLDER = Path(hf_kdtl.evaluation.__file__).parent


def imported(path):
    """Every module that a file imports, at its top or inside a function."""
    yield from imported_by(ast.walk(ast.parse(path.read_text())))


def imported_by(nodes):
    for node in nodes:
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


def at_the_top(path):
    """The modules that importing a file imports."""
    body = ast.parse(path.read_text()).body
    modules = set(imported_by(body))
    return modules | {module.split(".")[0] for module in modules}


def test_what_is_slow_to_import_is_imported_where_it_is_used():
    """`import hf_kdtl` reaches evaluation and reports: only `METRICS`, which are classes of `evaluate`, cost more."""
    slow = {"matplotlib", "sklearn", "scipy", "evaluate", "datasets"}
    own = {f"hf_kdtl.evaluation.{name}" for name in ("metrics", "multi_label", "streaming")}
    files = [path for name in ("evaluation", "reports", "hub") for path in (FOLDER.parent / name).rglob("*.py")]
    assert len(files) > 30
    for path in files:
        if path.name not in ("metrics.py", "multi_label.py", "streaming.py"):
            assert not at_the_top(path) & (slow | own), path
