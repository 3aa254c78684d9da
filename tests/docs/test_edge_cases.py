"""The tests that the page on edge cases names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tests_that_the_page_names_exist():
    page = (ROOT / "docs" / "edge_cases.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    text = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 20
    assert named <= set(re.findall(r"^def (test_\w+)\(", text, re.MULTILINE)), "a test was renamed"


def test_every_class_of_fault_has_a_table():
    page = (ROOT / "docs" / "edge_cases.md").read_text()
    sections = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    assert [section[:2] for section in sections] == [f"{letter}." for letter in "ABCDEFGHIJKL"]
    assert all("| input | what happens | test |" in section for section in sections)
