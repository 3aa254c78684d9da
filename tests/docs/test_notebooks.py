"""The notebooks of the documentation run from top to bottom."""

from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="pip install -e '.[docs]'")
nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[docs]'")

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = jupytext.read(path)
    nbclient.NotebookClient(notebook, timeout=300).execute()
    printed = [
        output["text"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.get("name") == "stdout"
    ]
    assert sum("accuracy" in text or "alone" in text for text in printed) >= 1
