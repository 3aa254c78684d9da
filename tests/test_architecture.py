"""The house: a file imports only from lower floors, and siblings do not know each other."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "hf_kdtl"
FLOORS = {"functional": 0, "models": 1, "objectives": 2, "gradient_rules": 2, "optim": 2, "evaluation": 2}
TOP = 3  # trainer, distiller, config, ...


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "top"


def _imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def test_imports_go_down_only():
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        folder = path.relative_to(PACKAGE).parts[0]
        room = folder if folder in FLOORS else "top"
        for module in _imports(path):
            seen += 1
            if room == "functional":
                assert module.split(".")[0] not in ("transformers", "datasets", "accelerate", "peft"), path
            if module.split(".")[0] != "hf_kdtl" or (path.name == "__init__.py" and room == "top"):
                continue
            other = _room(module)
            allowed = other == room or FLOORS.get(other, TOP) < FLOORS.get(room, TOP)
            assert allowed, f"{path.relative_to(PACKAGE)} ({room}) imports {module} ({other})"
    assert seen > 50


def test_files_stay_rooms():
    long = {
        str(p.relative_to(PACKAGE)): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 350
    }
    assert not long, f"split these: {long}"
