"""What the documents say is what the code is."""

import re
from pathlib import Path

from hf_kdtl.config import ENTRY_KEYS
from hf_kdtl.objectives import OBJECTIVES
from hf_kdtl.objectives.table import objective_table

ROOT = Path(__file__).parents[1]


def test_the_readme_has_the_table_of_the_registry():
    text = (ROOT / "README.md").read_text()
    (table,) = re.findall(r"<!-- objectives -->\n(.*)\n<!-- /objectives -->", text, re.DOTALL)
    assert table == objective_table(), "python -m hf_kdtl.objectives.table"


def test_every_method_has_an_entry_in_papers():
    text = (ROOT / "PAPERS.md").read_text()
    for name in OBJECTIVES:
        assert f"### `{name}`" in text, name


def test_the_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), path


def test_options_do_not_collide_with_the_keys_of_an_entry():
    import inspect

    for name, kind in OBJECTIVES.items():
        assert not set(inspect.signature(kind).parameters) & set(ENTRY_KEYS), name
