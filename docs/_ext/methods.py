"""What the registries know, put into the pages in place of `{kdtl-method} logit_kd` and `{kdtl-objectives}`."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

from pages import ROOT, rewrite

BLOCK = re.compile(r"^```\{kdtl-(method|objectives)\} ?(\w*)\n```$", re.MULTILINE)
PARTS = re.compile(r"^(Args|Cost|Raises|Label|Source):[ \n]", re.MULTILINE)


def registered(name: str) -> type:
    """The class of an objective or a gradient rule."""
    from hf_kdtl.gradient_rules import GRADIENT_RULES
    from hf_kdtl.objectives import OBJECTIVES

    return (OBJECTIVES | GRADIENT_RULES)[name]


def parts(kind: type) -> dict[str, str]:
    """A docstring by its sections; what comes before them is "about"."""
    texts = PARTS.split(inspect.cleandoc(kind.__doc__ or ""))
    return {"about": texts[0]} | dict(zip(texts[1::2], texts[2::2], strict=True))


def markdown(text: str) -> str:
    """Plain text of a docstring as Markdown: formulas literal, arXiv numbers as links, [ours] and the like as text."""
    lines = []
    for line in text.strip("\n").splitlines():
        if line.startswith("    "):  # an indented formula stays as it is
            lines.append(line)
            continue
        pieces = re.split(r"(`[^`]+`)", line)
        lines.append("".join(one if one.startswith("`") else _escaped(one) for one in pieces))
    return re.sub(r"arXiv\s(\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", "\n".join(lines))


def _escaped(text: str) -> str:
    return re.sub(r"([\\*_<>\[\]$~^|#])", r"\\\1", text)


def options(kind: type, args: str) -> str:
    """A definition list: each option with its default and its sentence."""
    sentences = {}
    for names, sentence in re.findall(r"^([\w, ]+): (.*(?:\n    .*)*)", textwrap.dedent(args), re.MULTILINE):
        for name in names.split(", "):
            sentences[name] = " ".join(sentence.split())
    signature = inspect.signature(kind).parameters.values()
    rows = [f"`{one.name}` (default `{one.default!r}`)\n: {markdown(sentences[one.name])}\n" for one in signature]
    return "\n".join(rows) or "None of its own."


def paper(name: str) -> str:
    """The entry of a method in PAPERS.md."""
    text = (ROOT / "PAPERS.md").read_text(encoding="utf-8")
    found = re.search(rf"^### `{name}`.*\n((?:(?!##).*\n?)*)", text, re.MULTILINE)
    return "" if found is None else found[1]


def method(name: str, page: Path) -> str:
    """What a class of a registry says of itself, and its entry in PAPERS.md."""
    kind = registered(name)
    shown = parts(kind)
    entry = name if hasattr(kind, "needs") else "gradient_rule"
    text = ["## What it computes", markdown(shown["about"]), "## Options", options(kind, shown.get("Args", ""))]
    if "Cost" in shown:
        text += ["## Cost", markdown(" ".join(shown["Cost"].split()))]
    if "Raises" in shown:
        errors = re.findall(r"^(\w+): (.*(?:\n    .*)*)", textwrap.dedent(shown["Raises"]), re.MULTILINE)
        listed = [f"`{error}`\n: {markdown(' '.join(why.split()))}\n" for error, why in errors]
        text += ["## What is refused", *(listed or [markdown(" ".join(shown["Raises"].split()))])]
    text += ["## Paper, and what differs", rewrite(paper(entry), ROOT / "PAPERS.md", page)]
    return "\n\n".join(text)


def objectives() -> str:
    """The table of objectives, each with a link to its page."""
    from hf_kdtl.objectives import OBJECTIVES

    rows = ["| name | what it is | role | needs |", "| --- | --- | --- | --- |"]
    for name, kind in OBJECTIVES.items():
        what = re.split(r"[:;.]\s", " ".join(parts(kind)["about"].split()))[0]
        sides = {"teacher": kind.needs_teacher, "start": kind.source == "start", "labels": kind.needs_labels}
        needs = ", ".join(side for side, needed in sides.items() if needed) or "nothing"
        rows.append(f"| [`{name}`]({name}.md) | {markdown(what)} | {kind.role} | {needs} |")
    return "\n".join(rows)


def read(app, docname: str, content: list[str]) -> None:
    page = Path(app.env.doc2path(docname))

    def replaced(match: re.Match) -> str:
        return objectives() if match[1] == "objectives" else method(match[2], page)

    content[0] = BLOCK.sub(replaced, content[0])


def setup(app) -> dict[str, bool]:
    app.connect("source-read", read)
    return {"parallel_read_safe": True}
