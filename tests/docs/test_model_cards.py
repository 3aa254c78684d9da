"""model_cards/: every card is what its results.json makes of it, tells the same figures, and names no machine."""

import getpass
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_kdtl.evaluation.results import FILE, SECTIONS, read_results
from hf_kdtl.hub.model_card import student_card, write_card

ROOT = Path(__file__).parents[2] / "model_cards"
FOLDERS = sorted(path.parent for path in ROOT.glob(f"*/{FILE}"))
NAMES = [folder.name for folder in FOLDERS]


def texts(folder):
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


def test_there_are_three_and_no_weights():
    assert len(FOLDERS) >= 3
    for folder in FOLDERS:
        assert {path.name for path in folder.iterdir()} == {"README.md", FILE}
        assert f"[{folder.name}]({folder.name}/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_the_card_is_rendered_again_from_results(folder, tmp_path):
    copy = tmp_path / folder.name
    copy.mkdir()
    (copy / FILE).write_text((folder / FILE).read_text(encoding="utf-8"), encoding="utf-8")
    assert write_card(copy).read_text(encoding="utf-8") == (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_its_figures_are_those_of_results(folder):
    results, card = read_results(folder), ModelCard.load(folder / "README.md")
    runs = results["evaluation"]["models"]["distilled"]["runs"]
    test = next(iter(runs.values()))["test"]
    assert {one.metric_type: one.metric_value for one in card.data.eval_results} == test
    assert {one.dataset_split for one in card.data.eval_results} == {"test"}
    assert (
        f"**Accuracy:** **{100 * test['accuracy']:.1f} %** on {results['data']['sizes']['test']:,} test images"
        in card.text
    )
    teacher = results["evaluation"]["models"]["teacher"]["runs"]["teacher"]["test"]["accuracy"]
    assert (
        f"{100 * (test['accuracy'] - teacher):+.1f} points (the teacher's accuracy is {100 * teacher:.1f} %"
        in card.text
    )
    measured = [one for one in results.get("comparison", []) if one["split"] == "test"]
    points = [
        f"{100 * one['mean']:+.1f} points of accuracy against the same student trained without it" for one in measured
    ]
    assert not points or points[0] in card.text
    assert bool(points) == ("alone" in results["evaluation"]["models"])
    shown = [entry["name"] for entry in results["objectives"]]
    assert set(shown) - {"task"} <= set(card.data.tags) and all(f"| {name} " in card.text for name in shown)


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_the_evaluation_is_of_this_student(folder):
    results = read_results(folder)
    models = results["student_evaluation"]["evaluation"]["models"]
    assert models["student"]["fingerprint"] == results["models"]["student"]["fingerprint"]
    assert models["teacher"]["fingerprint"] == results["models"]["teacher"]["fingerprint"]
    mine = next(iter(results["evaluation"]["models"]["distilled"]["runs"].values()))["test"]["accuracy"]
    assert models["student"]["runs"]["student"]["test"]["accuracy"] == mine
    assert {"fidelity", "degraded"} <= set(results["student_evaluation"]["evaluation"])
    named = "baseline is the same student trained without the teacher" in ModelCard.load(folder / "README.md").text
    assert named == ("alone" in results["evaluation"]["models"])


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_the_first_screen_and_the_limits_are_there(folder):
    text = ModelCard.load(folder / "README.md").text
    first = text.split("## How to use")[0]
    for question in (
        "What it is",
        "Accuracy",
        "Difference from its teacher",
        "Effect of the teacher",
        "Limitations",
        "License",
    ):
        assert f"**{question}" in first
    for title in ("How it was made", "Objectives", "Limits", "Reproduce it", "Citations"):
        assert re.search(f"^##+ {title}$", text, re.MULTILINE)
    again = yaml.safe_load(text.split("```yaml\n")[1].split("\n```")[0])
    assert again["objectives"] == read_results(folder)["objectives"]
    assert again.get("max_steps", 0) > 0 or again["num_train_epochs"] > 0


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_no_machine_and_no_user_is_named(folder):
    for name, text in texts(folder).items():
        lines = "\n".join(line for line in text.splitlines() if "arXiv" not in line)
        assert not re.search(r"(^|[\s\"'(=])(/[\w.-]+){2,}|~/|[A-Za-z]:\\\\", lines), name
        assert str(Path.home()) not in text and f"/{getpass.getuser()}/" not in text, name
    assert not [key for key in read_results(folder)["run"]["settings"] if "token" in key]
    assert set(read_results(folder)) <= {"schema", *SECTIONS}


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES)
def test_a_changed_figure_changes_the_card(folder):
    results = read_results(folder)
    before = str(student_card(results))
    next(iter(results["evaluation"]["models"]["distilled"]["runs"].values()))["test"]["accuracy"] = 0.123
    with pytest.raises(
        ValueError, match=r"test accuracy of 12\.3 % for its student, and the evaluation of the same student"
    ):
        student_card(results)
    results["student_evaluation"]["evaluation"]["models"]["student"]["runs"]["student"]["test"]["accuracy"] = 0.123
    assert "**12.3 %**" in str(student_card(results)) != before
