"""docs/devices.md says what was measured, for all there is; the slow test measures it again."""

import json
import re

import pytest
import torch

from hf_kdtl.gradient_rules import GRADIENT_RULES
from hf_kdtl.objectives import OBJECTIVES
from tests.distributed import matrix

TABLE = json.loads((matrix.DOCS / "devices.json").read_text())


def test_the_document_shows_the_figures():
    text = (matrix.DOCS / "devices.md").read_text()
    (table,) = re.findall(f"{matrix.START}\n(.*)\n{matrix.END}", text, re.DOTALL)
    assert table == matrix.rendered(TABLE), "python -m tests.distributed.matrix"


def test_every_objective_and_rule_has_its_row_and_every_cell_an_answer():
    assert list(TABLE) == [*OBJECTIVES, *GRADIENT_RULES], "python -m tests.distributed.matrix --rows <name>"
    for row, cells in TABLE.items():
        assert list(cells) == list(matrix.TITLES), row
        for column, cell in cells.items():
            assert cell["kind"] in ("exact", "approximate", "refused", "none"), (row, column, cell)
            measured = cell["kind"] in ("exact", "approximate")
            assert measured == (cell["value"] is not None), (row, column)
            assert cell["kind"] != "refused" or cell["why"], (row, column)


def test_where_a_split_must_change_nothing_it_does_not():
    for row, cells in TABLE.items():
        of_batch = row in OBJECTIVES and OBJECTIVES[row].reduction == "batch" and not OBJECTIVES[row].of_weights
        for column in ("accumulation", "ddp"):
            assert cells[column]["kind"] == ("approximate" if of_batch else "exact"), (row, column)
            assert of_batch or cells[column]["value"] < 1e-5, (row, column)
        for column in ("float64", "checkpointing", "peft", "self"):
            assert cells[column]["kind"] != "approximate", (row, column)


def test_a_cell_tells_exact_from_approximate_refused_and_broken():
    right = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(1)}
    assert matrix.cell(right, [], dict(right), [], "") == {"kind": "exact", "value": 0.0, "why": ""}
    near = right | {"a": torch.tensor([1.0, 2.0001])}
    assert matrix.cell(right, [], near, [], "")["kind"] == "exact"
    off = matrix.cell(right, [], right | {"a": torch.tensor([1.0, 2.2])}, ["x: split"], "")
    assert off == {"kind": "approximate", "value": 0.09, "why": "split"}
    assert matrix.cell(right, [], right | {"a": torch.tensor([1.0, torch.nan])}, [], "")["kind"] == "approximate"
    # No gradient where there should be one is not 0 by another name.
    assert matrix.cell(right, [], {"b": right["b"]}, [], "") == {"kind": "approximate", "value": 1.0, "why": ""}
    with pytest.raises(AssertionError):
        matrix.cell(right, [], right | {"c": torch.ones(1)}, [], "")
    with pytest.raises(AssertionError, match="nothing to compare"):
        matrix.cell({"a": torch.zeros(2)}, [], {"a": torch.zeros(2)}, [], "")

    def fail(error):
        def run():
            raise error

        return matrix.cell(right, [], *matrix.attempt(run))

    assert fail(ValueError("objective 'x': no.")) == {"kind": "refused", "value": None, "why": "no."}
    assert fail(RuntimeError("boom"))["kind"] == "fails"


@pytest.mark.slow
def test_all_cells_again():
    again = matrix.measure(matrix.ROWS)
    for row, cells in again.items():
        for column, cell in cells.items():
            before = TABLE[row][column]
            assert (cell["kind"], cell["why"]) == (before["kind"], before["why"]), (row, column, cell, before)
            if cell["kind"] == "approximate":
                assert cell["value"] == pytest.approx(before["value"], rel=0.5), (row, column)
        assert cells["ddp"]["kind"] == "approximate" or cells["ddp"]["value"] < 1e-5, row
        print(row, "two processes against one:", cells["ddp"])
