"""What the documents say is what the code is."""

import re
from pathlib import Path

import pytest

from hf_kdtl.gradient_rules import GRADIENT_RULES
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.objectives.entries import ENTRY_KEYS

ROOT = Path(__file__).parents[2]
PAGES = [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))]


def test_every_method_has_a_page_and_is_listed():
    index = (ROOT / "docs" / "methods" / "index.md").read_text()
    for name in OBJECTIVES | GRADIENT_RULES:
        page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
        assert f"```{{kdtl-method}} {name}\n" in page and "$$" in page, name
        assert re.search(rf"^{name}$", index, re.MULTILINE), name


def test_every_option_of_a_method_is_described():
    import inspect

    for name, kind in (OBJECTIVES | GRADIENT_RULES).items():
        text = inspect.cleandoc(kind.__doc__)
        for option in inspect.signature(kind).parameters:
            assert re.search(rf"^    (\w+, )*{option}(, \w+)*: ", text, re.MULTILINE), f"{name}: {option}"


def test_every_method_has_an_entry_in_papers():
    text = (ROOT / "PAPERS.md").read_text()
    for name in OBJECTIVES:
        assert f"### `{name}`" in text, name


@pytest.mark.parametrize("page", PAGES)
def test_a_page_links_to_files_that_exist(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for path in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert (ROOT / page).parent.joinpath(path).exists(), path


def test_options_do_not_collide_with_the_keys_of_an_entry():
    import inspect

    for name, kind in OBJECTIVES.items():
        assert not set(inspect.signature(kind).parameters) & set(ENTRY_KEYS), name
