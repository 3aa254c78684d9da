"""The table of objectives in the README, made from the registry: `python -m hf_kdtl.objectives.table`."""

from __future__ import annotations

import inspect

from hf_kdtl.objectives import OBJECTIVES, Objective


def objective_table() -> str:
    """Markdown: one row an objective, with the first sentence of its docstring and its options with defaults."""
    rows = ["| name | what it is | role | needs | options (default) |", "| --- | --- | --- | --- | --- |"]
    rows += [_row(name, kind) for name, kind in OBJECTIVES.items()]
    return "\n".join(rows)


def first_sentence(kind: type[Objective]) -> str:
    """What an objective is, from its docstring."""
    return inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".")


def _row(name: str, kind: type[Objective]) -> str:
    options = inspect.signature(kind).parameters.values()
    shown = ", ".join(f"`{option.name}` ({option.default!r})" for option in options) or "none"
    sides = {"teacher": kind.needs_teacher, "start": kind.source == "start", "labels": kind.needs_labels}
    needs = [what for what, needed in sides.items() if needed]
    cells = [f"`{name}`", first_sentence(kind), kind.role, ", ".join(needs) or "nothing", shown]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    print(objective_table())
