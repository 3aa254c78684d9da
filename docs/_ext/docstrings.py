"""Docstrings of the package as reStructuredText: formulas in plain text are kept from being read as markup."""

from __future__ import annotations

import re

NOTES = re.compile(r"^(Cost|Label|Source|Reference|References): ")
SECTIONS = re.compile(r"^(Args|Returns|Raises|Yields|Example|Examples|Attributes|Note|Inputs|Relations):\s*$")
CODE = re.compile(r"(``?[^`]+``?)")


def escape(line: str) -> str:
    """`line` with *, | and a trailing _ taken literally, except inside backticks.

    >>> escape("tau^2 KL(p || q), of `a|b` and x_")
    'tau^2 KL(p \\\\|\\\\| q), of `a|b` and x\\\\_'
    """
    if line.lstrip().startswith((">>>", "...")):
        return line
    return "".join(
        part if part.startswith("`") else re.sub(r"(?<=\w)_(?!\w)", r"\_", re.sub(r"([*|])", r"\\\1", part))
        for part in CODE.split(line)
    )


def prepared(lines: list[str]) -> list[str]:
    """One-line sections become paragraphs with a bold title, and indented formulas literal blocks."""
    out: list[str] = []
    note = literal = section = False
    for line in lines:
        blank, indented = not line.strip(), line.startswith("    ")
        if not blank and not indented:
            section = bool(SECTIONS.match(line))
            literal = False
        note = bool(NOTES.match(line)) or (note and not blank)
        if note:
            line = NOTES.sub(r"**\1:** ", escape(line.strip()))
        elif literal:
            pass
        elif indented and not section and (not out or not out[-1].strip()):
            out += ["::", ""]
            literal = True
        else:
            line = escape(line)
        out.append(line)
    return out


def process(app, what, name, obj, options, lines) -> None:
    if what in ("attribute", "data", "property") and lines:
        lines[0] = lines[0].replace(": ", "; ")  # napoleon takes what precedes a colon for a type
    lines[:] = prepared(lines)


def setup(app) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon, which has 500
    return {"parallel_read_safe": True}
