"""Markdown that nothing from outside can break: a template's values are escaped, unless their type is Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_kdtl.utils.text import escape_markdown, markdown_table

# What would open a list, a heading or a rule at the beginning of a line.
_OPENS = re.compile(r"^(\d+(?=[.)](\s|$))|(?=[-+=]+(\s|$)))")


class Markdown(str):
    """Text that is Markdown already, and is printed as it is."""


def inline(text: Any, most: int = 1000) -> Markdown:
    """A text from outside (a class's name, a note) as Markdown on one line that shows it as it is.

    It can stand in a sentence, a list, a table's cell or a heading: no tag, link, cell, list or front matter begins in
    it. Longer than `most` characters it is cut.

    >>> print(inline("a|b <script>\\n---"))
    a\\|b \\<script\\> ---
    """
    if isinstance(text, Markdown):
        return text
    line = " ".join(str(text).split())
    shown = escape_markdown(line if len(line) <= most else f"{line[: most - 1]}…")
    return Markdown(_OPENS.sub(lambda found: f"{found[1]}\\", shown))


def table(rows: Sequence[Sequence[Any]]) -> Markdown:
    """A table of cells, the first row its header; what is not Markdown is escaped."""
    return Markdown(markdown_table([[inline(cell) for cell in row] for row in rows]))


def fenced(text: str, language: str = "") -> Markdown:
    """A block of code. Its fence is longer than any that the text holds."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}{language}\n{text.strip()}\n{fence}")


def render(template: str, **values: Any) -> str:
    """A file of hf_kdtl/hub/templates with its values.

    Not jinja's autoescape, which is for HTML: in Markdown the pipe, the backtick and the bracket matter as well.
    """
    environment = Environment(
        loader=PackageLoader("hf_kdtl.hub", "templates"), finalize=inline, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    text = environment.get_template(template).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text)
