import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_kdtl.evaluation import read_results, update_results


def test_round_trip_section_by_section():
    update_results("run", "objectives", [{"name": "task", "weight": 0.1}])
    update_results(
        "run", "curves", {"a": ({"loss": np.float32(0.5)}, {"loss": torch.tensor(1.0), "step": np.int64(2)})}
    )
    update_results("run", "curves", {"a": [{"loss": float("nan")}, {"loss": 0.25}]})
    assert read_results("run") == {
        "schema": 1,
        "objectives": [{"name": "task", "weight": 0.1}],
        "curves": {"a": [{"loss": None}, {"loss": 0.25}]},
    }
    assert [path.name for path in Path("run").iterdir()] == ["results.json"]


def test_an_interrupted_write_leaves_the_old_file(monkeypatch):
    update_results("run", "data", {"source": "digits"})
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        update_results("run", "data", {"source": "other"})
    assert read_results("run")["data"] == {"source": "digits"}


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"unknown section 'evaluations'.*expected one of run, data"):
        update_results("run", "evaluations", {})
    with pytest.raises(FileNotFoundError, match=r"run has no results.json"):
        read_results("run")
    Path("run").mkdir()
    for text, said in (
        ('{"schema": 2}', "schema 2 and this version reads 1"),
        ("[]", "schema None"),
        ("{", "not valid"),
    ):
        Path("run/results.json").write_text(text)
        for call in (lambda: read_results("run"), lambda: update_results("run", "run", {})):
            with pytest.raises(ValueError, match=said):
                call()
        assert Path("run/results.json").read_text() == text


def test_no_path_of_the_machine():
    here, home = Path.cwd(), Path.home()
    update_results("run", "data", {"notes": [f"left out: {here}/images/a.png, {home}/b.png"], "path": here / "x"})
    text = Path("run/results.json").read_text()
    assert str(here) not in text and str(home) not in text
    assert json.loads(text)["data"]["path"] == "x"
    assert json.loads(text)["data"]["notes"] == ["left out: images/a.png, ~/b.png"]
