import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_kdtl.evaluation import read_results, update_results
from hf_kdtl.evaluation.records import Results
from hf_kdtl.evaluation.results import SCHEMA, load_results, same_value


def test_round_trip_section_by_section():
    update_results("run", "objectives", [{"name": "task", "weight": 0.1}])
    update_results(
        "run", "curves", {"a": ({"loss": np.float32(0.5)}, {"loss": torch.tensor(1.0), "step": np.int64(2)})}
    )
    update_results("run", "curves", {"a": [{"loss": float("nan")}, {"loss": 0.25}]})
    assert read_results("run") == {
        "schema": SCHEMA,
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
    with pytest.raises(ValueError, match=r"unknown section 'evaluations'.*expected one of run, defaults, data"):
        update_results("run", "evaluations", {})
    with pytest.raises(FileNotFoundError, match=r"run has no results.json"):
        read_results("run")
    Path("run").mkdir()
    for text, message in (
        ('{"schema": 3}', "schema 3 and this version reads 1 and 2"),
        ("[]", "schema None"),
        ("{", "not valid"),
    ):
        Path("run/results.json").write_text(text)
        for call in (lambda: read_results("run"), lambda: update_results("run", "run", {})):
            with pytest.raises(ValueError, match=message):
                call()
        assert Path("run/results.json").read_text() == text


def test_no_path_of_the_machine():
    here, home = Path.cwd(), Path.home()
    update_results("run", "data", {"notes": [f"left out: {here}/images/a.png, {home}/b.png"], "path": here / "x"})
    text = Path("run/results.json").read_text()
    assert str(here) not in text and str(home) not in text
    assert json.loads(text)["data"]["path"] == "x"
    assert json.loads(text)["data"]["notes"] == ["left out: images/a.png, ~/b.png"]
    update_results("run", "data", {"path": f"/mnt{here}/x"})  # another folder, which ends in the name of this one
    assert read_results("run")["data"]["path"] == f"/mnt{here}/x"


def test_a_value_is_the_same_as_it_was_written_and_as_it_was_typed():
    here, home = Path.cwd(), Path.home()
    Path("imgs").mkdir()
    Path("link").symlink_to("imgs")
    for one, other in (
        ("imgs", here / "imgs"),
        ("imgs", "./imgs/"),
        ("imgs", "link"),
        ("~/imgs", home / "imgs"),
        ({"a": ["t/model", 1]}, {"a": (str(here / "t/model"), 1)}),
        ("owner/name", "owner/name"),
        (None, float("nan")),
    ):
        assert same_value(one, other) and same_value(other, one)
    for one, other in (("imgs", "image"), ("imgs", "~/imgs"), ("1", 1), (["a"], ["a", "b"]), ({"a": "b"}, {"b": "b"})):
        assert not same_value(one, other)


def test_schema_1_is_read_and_becomes_schema_2_when_a_section_is_written(tmp_path):
    """A real file of schema 1, which calls the section of the student's evaluation `judged`."""
    old = json.loads(gzip.decompress(Path(__file__).with_name("results-schema-1.json.gz").read_bytes()))
    assert old["schema"] == 1 and "judged" in old and "student_evaluation" not in old
    tmp_path.joinpath("results.json").write_text(json.dumps(old))
    found = read_results(tmp_path)
    assert found["schema"] == 2 and "judged" not in found
    renamed = ["student_evaluation" if name == "judged" else name for name in list(old)[1:]]
    assert found["student_evaluation"] == old["judged"] and list(found)[1:] == [*renamed, "comparison"]
    before = old["evaluation"]["paired_difference"]["test"]
    entry = next(one for one in found["comparison"] if one["split"] == "test")
    assert (entry["mean"], [entry["low"], entry["high"]]) == (before["mean"], before["interval"])
    assert "paired_difference" not in found["evaluation"]
    student = load_results(tmp_path).student_evaluation.evaluation.models["student"]
    assert student.runs["student"]["test"]["accuracy"] == 0.39 and student.differences["teacher"].number == 2000
    update_results(tmp_path, "data", old["data"])
    assert json.loads(tmp_path.joinpath("results.json").read_text()) == found


def test_sections_of_other_programs_stay():
    update_results("run", "data", {"source": "digits"})
    path = Path("run/results.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mine": {"kept": [1, None]}}))
    update_results("run", "run", {"recipe": "distill", "more": 1})
    assert json.loads(path.read_text())["mine"] == {"kept": [1, None]}
    found = load_results("run")
    assert found.extra == {"mine": {"kept": [1, None]}} and found.run.extra == {"more": 1}


@pytest.mark.parametrize(
    "section, value, message",
    [
        ("evaluation", [], r"section evaluation: found a list \(\[\]\), expected an object"),
        (
            "evaluation",
            {"models": {"a": {}}},
            r"section evaluation \(evaluation.models.a\): found no 'runs', expected an object",
        ),
        ("evaluation", {"images": "many"}, r"\(evaluation.images\): found a text \('many'\), expected a whole number"),
        (
            "evaluation",
            {"models": {"a": {"runs": {}, "accuracy_interval": [0.5]}}},
            r"interval\): found 1 values, expected 2",
        ),
        (
            "comparison",
            [{"a": "distilled", "b": "alone", "metric": "accuracy", "split": "test", "mean": "1", "seeds": [1]}],
            r"\(comparison.0.mean\): found a text \('1'\), expected a number",
        ),
        (
            "data",
            {"sizes": {"test": True}},
            r"section data \(data.sizes.test\): found true or false .*expected a whole number",
        ),
        ("curves", {"run": [3]}, r"section curves \(curves.run.0\): found a whole number \(3\), expected an object"),
    ],
)
def test_a_malformed_section_is_named(section, value, message):
    update_results("run", section, value)
    with pytest.raises(ValueError, match=rf"^run: results.json, .*{message}"):
        load_results("run")


def test_null_is_the_default_of_what_was_not_measured():
    value = {"models": {"a": {"runs": {"a": {"test": {"accuracy": None}}}, "flops": None, "degraded": None}}}
    model = Results.of({"schema": SCHEMA, "evaluation": value, "data": None}).evaluation.models["a"]
    assert model.flops is None and model.by_degradation == {} and model.runs["a"]["test"] == {"accuracy": None}
