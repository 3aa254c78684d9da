"""report.md as one HTML file with its figures inside, to be opened or sent without anything beside it.

Only what the reports of this package use of Markdown is read: headings, paragraphs, lists, tables, figures, code
blocks, bold, code and links. Everything else, and all text from outside, is shown as it is.
"""

from __future__ import annotations

import html
import re
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif;
  color: #1f2328; background: #fff; max-width: 60rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.8rem; border-bottom: 1px solid #d1d9e0; padding-bottom: .4rem; }
h2 { font-size: 1.35rem; margin-top: 2.4rem; border-bottom: 1px solid #e6eaee; padding-bottom: .25rem; }
h3 { font-size: 1.1rem; margin-top: 1.8rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .94rem; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid #e6eaee; text-align: right; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #c5ccd3; font-weight: 600; }
img { display: block; max-width: 100%; height: auto; margin: 1.2rem auto; }
pre { background: #f6f8fa; padding: .9rem 1.1rem; overflow-x: auto; border-radius: 6px; font-size: .88rem; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; font-size: .92em; }
.verdict { padding: .8rem 1rem; border-left: 5px solid #57606a; background: #f6f8fa; }
.pass { border-color: #1a7f37; background: #eaf7ee; }
.fail { border-color: #c2410c; background: #fdf0e9; }
"""
_IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")


def write_html(report: Path) -> Path:
    """Write the HTML beside a report.md; return its path."""
    path = report.with_suffix(".html")
    path.write_text(to_html(report.read_text("utf-8"), report.parent), "utf-8")
    return path


def to_html(markdown: str, folder: Path) -> str:
    """A report as one HTML page; figures that exist in `folder` are put into it."""
    title = next((line[2:] for line in markdown.splitlines() if line.startswith("# ")), "Report")
    body = "\n".join(_blocks(markdown, folder))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{_plain(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _blocks(markdown: str, folder: Path) -> Iterator[str]:
    for fenced, part in _parts(markdown):
        if fenced:
            yield f"<pre><code>{html.escape(part)}</code></pre>"
            continue
        for block in re.split(r"\n\s*\n", part):
            if block.strip():
                yield from _block([line for line in block.splitlines() if line.strip()], folder)


def _parts(markdown: str) -> Iterator[tuple[bool, str]]:
    """(whether it is a code block, text)."""
    lines: list[str] = []
    fenced = False
    for line in markdown.splitlines():
        if line.startswith("```"):
            yield fenced, "\n".join(lines)
            lines, fenced = [], not fenced
        else:
            lines.append(line)
    yield fenced, "\n".join(lines)


def _block(lines: list[str], folder: Path) -> Iterator[str]:
    if heading := re.match(r"(#{1,4}) (.*)", lines[0]):
        level = len(heading[1])
        yield f"<h{level}>{_inline(heading[2])}</h{level}>"
        if lines[1:]:
            yield from _block(lines[1:], folder)
    elif lines[0].startswith("|"):
        yield _table(lines)
    elif lines[0].startswith("- "):
        yield "<ul>\n" + "\n".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "\n</ul>"
    elif found := _IMAGE.fullmatch(lines[0].strip()):
        yield _image(found[1], folder / found[2])
    else:
        text = " ".join(lines)
        kind = next((kind for kind in ("pass", "fail") if text.startswith(f"**Verdict: {kind}")), None)
        yield f'<p class="verdict {kind}">{_inline(text)}</p>' if kind else f"<p>{_inline(text)}</p>"


def _table(lines: list[str]) -> str:
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]] for line in lines]
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in rows[0])
    body = "\n".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in rows[2:])
    return f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _image(alternative: str, path: Path) -> str:
    if path.suffix != ".png" or not path.is_file():
        return f"<p>{html.escape(alternative)}</p>"
    data = b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{html.escape(alternative, quote=True)}" src="data:image/png;base64,{data}">'


def _inline(text: str) -> str:
    """Bold and code; a backslash makes the next character a plain one. No link or tag comes from a text."""
    kept = re.sub(r"\\([^a-zA-Z0-9\s])", lambda found: f"\0{ord(found[1])}\0", text.replace("\0", ""))
    made = re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(kept))
    made = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", made)
    return re.sub(r"\0(\d+)\0", lambda found: html.escape(chr(int(found[1]))), made)


def _plain(text: str) -> str:
    return re.sub(r"<[^>]*>", "", _inline(text))
