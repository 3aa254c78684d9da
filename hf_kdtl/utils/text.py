"""Text of reports: tables that can be read as they are, and names from outside that cannot break them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any
from unicodedata import east_asian_width

_MARKUP = re.compile(r"[\\`*\[\]<>#|~&$@!]|(?<!\w)_|_(?!\w)|(?<=www)\.|:(?=//)")


def markdown_table(rows: list[list[str]]) -> str:
    """A markdown table that can be read as text too: the first column to the left, the others to the right."""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(_pad(i, cell, widths[i]) for i, cell in enumerate(row)) + " |" for row in rows]
    rule = (
        "|" + "|".join("-" * (width + 2) if not i else "-" * (width + 1) + ":" for i, width in enumerate(widths)) + "|"
    )
    return "\n".join([lines[0], rule, *lines[1:]])


def one_line(text: str) -> str:
    """A text from outside (a file's or a class's name) on one line, without control characters.

    >>> one_line("tabby\\n cat\\x1b[31m")
    'tabby cat[31m'
    """
    spaced = re.sub(r"\s+", " ", str(text)).strip()
    return "".join(c for c in spaced if c.isprintable())


def escape_markdown(text: str) -> str:
    """A text from outside as Markdown that shows it as it is: nothing in it is a link, a tag, a cell or a heading.

    >>> print(escape_markdown("a|b <script> my_file"))
    a\\|b \\<script\\> my_file
    """
    return _MARKUP.sub(lambda found: f"\\{found[0]}", one_line(text))


def figure_label(text: str, most: int = 14) -> str:
    """A text from outside for a picture: on one line, not wider than `most` letters, a dollar sign is one (and no
    formula). A Chinese, Japanese or Korean character is as wide as two.

    >>> figure_label("a name that is too long", 8)
    'a name …'
    """
    line = one_line(text)
    if sum(map(_width, line)) > most:
        ends = accumulate(map(_width, line))
        line = "".join(c for c, end in zip(line, ends, strict=True) if end < most) + "…"
    return line.replace("$", r"\$")


def _width(character: str) -> int:
    return 2 if east_asian_width(character) in "WF" else 1


def percent(value: float | None) -> str:
    """A share, to a tenth of a per cent.

    >>> percent(0.9337)
    '93.4 %'
    """
    return "-" if value is None else f"{100 * value:.1f} %"


def _pad(column: int, cell: str, width: int) -> str:
    return cell.rjust(width) if column else cell.ljust(width)


def some(items: Sequence[Any], most: int = 8) -> str:
    """The first few items of a list, for a sentence."""
    return ", ".join(map(str, items[:most])) + (f", ... ({len(items)} in all)" if len(items) > most else "")
