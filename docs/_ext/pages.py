"""Files that stand elsewhere in the repository, shown as pages; links to files become links to their pages."""

from __future__ import annotations

import os
import re
from pathlib import Path

import jupytext

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
# page -> the file that it shows
PAGES = {
    "results": ROOT / "benchmarks" / "RESULTS.md",
    **{f"results/{file.stem}": file for file in sorted((ROOT / "benchmarks" / "results").glob("*.md"))},
    "papers": ROOT / "PAPERS.md",
    "changelog": ROOT / "CHANGELOG.md",
    "contributing": ROOT / "CONTRIBUTING.md",
    "security": ROOT / "SECURITY.md",
    "notebooks/quickstart": DOCS / "notebooks" / "quickstart.py",
    "notebooks/few_labels": DOCS / "notebooks" / "few_labels.py",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]+)(#[^)]*)?\)")


def rewrite(text: str, source: Path, page: Path) -> str:
    """`text` of the file `source` with its links as seen from `page`; a file that has no page becomes its text."""
    shown = {file: DOCS / f"{name}.md" for name, file in PAGES.items()}

    def replaced(match: re.Match) -> str:
        picture, label, target, anchor = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        file = (source.parent / target).resolve()
        if not file.exists():
            raise FileNotFoundError(f"{source.relative_to(ROOT)} links to {target}, which does not exist")
        title = file
        file = shown.get(file, file)
        if DOCS not in file.parents:
            return label
        if label.removesuffix(".md") != label and not picture:  # a path is no title
            label = re.search(r"^# (.*)$", title.read_text(encoding="utf-8"), re.MULTILINE)[1].replace("`", "")
        return f"{picture}[{label}]({os.path.relpath(file, page.parent)}{anchor or ''})"

    return LINK.sub(replaced, text)


def read(app, docname: str, content: list[str]) -> None:
    page = DOCS / f"{docname}.md"
    source = PAGES.get(docname, page)
    if page.exists():
        text = source.read_text(encoding="utf-8") if docname in PAGES else content[0]
        if source.suffix == ".py":
            text = jupytext.writes(jupytext.reads(text, "py:percent"), "md").split("---", 2)[2]
        if docname == "results":  # its pages stand below it
            text += "\n```{toctree}\n:hidden:\n:glob:\n\nresults/*\n```\n"
        content[0] = rewrite(text, source, page)


def depend(app, env, added, changed, removed) -> list[str]:
    return [name for name in PAGES if name in env.found_docs]


def setup(app) -> dict[str, bool]:
    app.connect("source-read", read)
    app.connect("env-get-outdated", depend)
    return {"parallel_read_safe": True}
