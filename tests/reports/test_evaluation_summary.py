"""The report of an evaluation, from hand-made numbers: what its first screen says, and that no name can break it."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from hf_kdtl.data.degradations import DEGRADATIONS
from hf_kdtl.evaluation import update_results
from hf_kdtl.evaluation.metrics import paired_scores
from hf_kdtl.evaluation.records import Difference, EvaluatedModel, Evaluation
from hf_kdtl.evaluation.results import FILE, to_json
from hf_kdtl.evaluation.scoring import correct, diagnostics
from hf_kdtl.evaluation.statistics import images_difference
from hf_kdtl.reports.evaluation_findings import sentences
from hf_kdtl.reports.evaluation_summary import verdict_table
from hf_kdtl.reports.evaluation_values import (
    calibration_bias,
    calibration_text,
    class_accuracies,
    interval_verdict,
    overconfidence,
)
from hf_kdtl.reports.figures.calibration import reliability_figure
from hf_kdtl.reports.figures.classes import classes_figure
from hf_kdtl.reports.figures.confusion import confusion_figure
from hf_kdtl.reports.figures.degraded import degradations_figure
from hf_kdtl.reports.run_report import write_report
from hf_kdtl.utils.text import escape_markdown, figure_label
from tests.support.figures import coarse_figures  # noqa: F401

text_alone = pytest.mark.usefixtures("coarse_figures")  # what figures look like is tested below

NAMES = ["cat", "dog", "emu"]
LABELS = np.repeat([0, 1, 2], 20)
COST = {
    "parameters": 2_000_000,
    "flops": 3e9,
    "file_bytes": 8e6,
    "peak_memory_bytes": 5e7,
    "images_per_second": 100.0,
    "latency_ms": {"1": {"median": 20.0, "p95": 30.0}, "8": {"median": 80.0, "p95": 90.0}},
}
HALF = COST | {"parameters": 1_000_000, "flops": 1.5e9, "images_per_second": 250.0}
HALF["latency_ms"] = {"1": {"median": 30.0, "p95": 30.0}, "8": {"median": 32.0, "p95": 90.0}}


def logits(wrong, sure=2.0):
    """Right but for the images in `wrong`, which are taken for the class after theirs."""
    answers = np.where(np.isin(np.arange(60), list(wrong)), (LABELS + 1) % 3, LABELS)
    return sure * np.eye(3)[answers]


ALL = {
    "student": ("student", HALF, logits(range(10, 34))),  # 10 cats, 14 dogs
    "teacher": ("teacher", COST, logits(range(10, 22))),  # 10 cats, 2 dogs
    "baseline": ("baseline", COST, logits(range(20, 50))),  # 20 dogs, 10 emus
}
DEGRADED = {"student": (0.6, [0.5, 0.1]), "teacher": (0.8, [0.6, 0.4]), "baseline": (0.5, [0.4, 0.2])}


def evaluation(models=ALL, names=NAMES, degraded=True):
    references = {role: its for role, _, its in models.values() if role != "student"}
    found = {}
    for name, (role, cost, mine) in models.items():
        others = {other: its for other, its in references.items() if other != role}
        scores = paired_scores(mine, LABELS, **others)
        found[name] = {"role": role, "runs": {name: {"test": scores}}, **cost, **diagnostics(mine, LABELS, names)}
        found[name]["differences"] = {
            other: images_difference(correct(mine, LABELS), correct(its, LABELS)) for other, its in others.items()
        }
        if degraded:
            clean, jpeg = DEGRADED[role]
            found[name]["degraded"] = {"clean": clean, "jpeg": jpeg, "contrast": [clean, clean]}
    value = {"split": "test", "images": 60, "batch_size": 8, "models": found}
    value["degradations_left_out"] = [name for name in DEGRADATIONS if name not in ("jpeg", "contrast")]
    if degraded:
        value["degraded"] = {"images": 30, "severities": [1, 5], "side": 32}
    if "teacher" in references:
        reasons = {"attention_agreement": "the teacher has none."}
        value["fidelity"] = {
            name: {"images": 30, "jacobian_cosine": 0.25, "attention_agreement": None, "reasons": reasons}
            | {"cka": {"matrix": [[0.5, None], [0.1, 0.9]], "images": 30}}
            for name, (role, _, _) in models.items()
            if role == "student"
        }
    return value


def report(value, **data):
    update_results("run", "run", {"recipe": "evaluate_student", "device": "a CPU", "settings": {}})
    update_results("run", "data", {"source": "pets", "sizes": {"test": 60}} | data)
    update_results("run", "evaluation", value)
    return write_report("run").read_text()


def cells(text, name):
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


@text_alone
def test_the_first_screen_answers():
    text = report(evaluation())
    assert text.startswith(
        "# Evaluation on pets\n\n**Summary:** student has accuracy 60.0 %, -20.0 points against the teacher (worse), "
        "+10.0 points against the baseline (no difference shown), 45.0 % on degraded images, at 0.50 x the FLOPs and "
        "1.50 x the latency of one image of the teacher, at 0.50 x the FLOPs and 1.50 x the latency of one image of "
        "the baseline.\n\n| "
    )
    assert cells(text, "accuracy [95% interval]") == [
        "60.0 % [46.7, 71.7]",
        "80.0 % [70.0, 90.0]",
        "50.0 % [36.7, 63.3]",
    ]
    assert cells(text, "worst class") == ["dog 30.0 %", "cat 50.0 %", "dog 0.0 %"]
    # Every answer has the probability e^2 / (e^2 + 2) = 0.787; the teacher's accuracy on 60 images, 0.8, is not far
    # enough from it to claim a bias.
    assert cells(text, "calibration error (ECE)") == [
        "18.7 %, over-confident",
        "1.3 %",
        "28.7 %, over-confident",
    ]
    assert cells(text, "worst degradation") == ["jpeg 5: 10.0 %", "jpeg 5: 40.0 %", "jpeg 5: 20.0 %"]
    # Left: (5/6 + 1/6 + 1 + 1) / 4, (3/4 + 1/2 + 2) / 4, (4/5 + 2/5 + 2) / 4
    means = ["45.0 % (75.0 % of clean)", "65.0 % (81.2 % of clean)", "40.0 % (80.0 % of clean)"]
    assert cells(text, "degraded images, mean accuracy") == means
    # Of what the baseline gets right (all cats, the last 10 emus) the student gets 10 cats wrong; so does the teacher.
    assert cells(text, "correct in the baseline, wrong here") == ["16.7 %", "16.7 %", "-"]
    assert cells(text, "same prediction as the teacher")[:2] == ["80.0 %", "-"]
    assert cells(text, "parameters (million)") == ["1.00 (0.50 x)", "2.00", "2.00 (1.00 x)"]
    assert cells(text, "images/s") == ["250 (2.50 x)", "100", "100 (1.00 x)"]
    assert cells(text, "latency of one image (ms)") == ["30.0 (1.50 x)", "20.0", "20.0 (1.00 x)"]
    first = text.split("## All scores")[0]
    assert len(first.splitlines()) < 50 and "![" not in first
    for message in (
        "**Accuracy against the teacher**: -20.0 points, 95% interval -30.0 to -10.0: worse (0 images only this model "
        "classifies correctly, 12 only the teacher).",
        "break 16.7 % of all images (10 that are correct today) and fix 26.7 % (16)",
        "**Classes against the teacher**: 1 of 3 lose accuracy. From dog, -60.0 points (90.0 % to 30.0 %), "
        "to emu, +0.0",
        "A class has 20 images; an accuracy on 20 images has an error of up to ±22 points",
        "mean confidence 78.7 %, accuracy 60.0 %: over-confident; the teacher: mean confidence 78.7 %, accuracy "
        "80.0 %; the baseline",
        "mean accuracy 45.0 % (75.0 % of clean). Lowest under jpeg at severity 5: 10.0 %, from 60.0 %",
        "(mean accuracy 65.0 % (81.2 % of clean)): relative to it, the student keeps least under jpeg: 50.0 % of its "
        "own clean accuracy, the teacher 62.5 %",
        "Degradations left out: gaussian_noise,",
        "Severities left out: 2, 3, 4.",
        "student, attention agreement: the teacher has none.",
        "with --max_drop the report says pass or fail.",
    ):
        assert message in first, message


def test_what_there_is_below():
    text = report(evaluation())
    for picture in ("reliability", "degradations", "classes", "confusion", "cka"):
        assert f"]({picture}.png)" in text
        pixels = np.array(Image.open(f"run/{picture}.png"))
        assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50, picture
    assert cells(text, "`agreement_teacher_wrong`")[0] == "100.0 %"
    right, total = math.exp(2), math.exp(2) + 2  # the student: 36 images right and 24 wrong, all as sure
    assert cells(text, "`nll`")[0] == f"{0.6 * math.log(total / right) + 0.4 * math.log(total):.4f}"
    assert cells(text, "`teacher_kl`")[0] == f"{0.2 * 2 * (right - 1) / total:.4f}"  # 12 answers apart
    assert cells(text, "`jpeg`")[0] == "30.0 % (50.0 % of clean)" and cells(text, "`clean`")[1] == "80.0 %"
    assert "30 of the 60 test images (drawn with seed 0), the same pixels" in text
    assert text.count("Which accuracy is sufficient") == 1
    assert "for the teacher's predicted class: mean 0.25" in text
    assert "All classes that have images." in text


@text_alone
def test_an_improvement_and_no_difference():
    models = ALL | {"student": ("student", HALF, logits(range(9, 21)))}
    value = Evaluation.of(evaluation(models))
    text = " ".join(sentences(value, value.models["student"]))
    assert "teacher**: +0.0 points, 95% interval -5.0 to +5.0: no difference shown (1 images only" in text
    assert "baseline**: +30.0 points" in text and ": better (" in text
    assert interval_verdict(Difference.of(images_difference([True] * 5, [False] * 5))) == "better"
    same = Evaluation.of(evaluation(ALL | {"student": ("student", HALF, ALL["teacher"][2])}))
    assert "teacher**: +0.0 points (0 images" in " ".join(sentences(same, same.models["student"]))


@text_alone
def test_several_students_have_their_own_pictures():
    models = {"student a": ALL["student"], "student b": ("student", HALF, logits(range(5)))} | dict(
        list(ALL.items())[1:]
    )
    text = report(evaluation(models))
    for i in (1, 2):
        for picture in ("classes", "confusion", "cka"):
            assert f"]({picture}-{i}.png)" in text and Path(f"run/{picture}-{i}.png").is_file()
    assert "### student a: what is lost and gained" in text and "### student b: what" in text
    assert not Path("run/classes.png").exists()


@text_alone
def test_a_student_alone():
    text = report(evaluation({"student": ALL["student"]}, degraded=False))
    first = text.split("## All scores")[0]
    for message in ("No --teacher was given", "No --baseline was given", "No degraded images (--degradations quick)"):
        assert message in first
    for absent in ("against the", "worst degradation", "same prediction", " x)", "Replacing"):
        assert absent not in first, absent
    assert {path.name for path in Path("run").iterdir()} == {FILE, "report.md", "report.html", "reliability.png"}


@text_alone
def test_a_class_without_images():
    value = evaluation(names=NAMES)
    for model in value["models"].values():
        model["confusion"]["yak"] = {}
    assert "yak" not in class_accuracies(EvaluatedModel.of(value["models"]["student"]))
    text = report(value)
    assert "1 of 4 classes have no image here." in text and "yak" not in text


@text_alone
def test_nothing_right_on_the_clean_images():
    value = evaluation()
    value["models"]["teacher"]["degraded"] = {"clean": 0.0, "jpeg": [0.0, 0.0], "contrast": [0.0, 0.0]}
    value["models"]["student"]["degraded"] = {"clean": 0.0, "jpeg": [0.0, 0.0], "contrast": [0.0, 0.0]}
    text = report(value)
    assert cells(text, "degraded images, mean accuracy") == ["0.0 %", "0.0 %", "40.0 % (80.0 % of clean)"]


def test_overconfidence_is_mean_confidence_minus_accuracy():
    draw = np.random.default_rng(0)
    mine = draw.normal(size=(60, 3))
    confidence = (np.exp(mine).max(1) / np.exp(mine).sum(1)).mean()
    model = EvaluatedModel.of({"runs": {}} | to_json(diagnostics(mine, LABELS, NAMES)))
    assert overconfidence(model) == pytest.approx(confidence - (mine.argmax(1) == LABELS).mean())


@pytest.mark.parametrize("right, bias", [(94, None), (60, "over-confident"), (128, "under-confident")])
def test_a_bias_of_the_confidence_is_claimed_only_where_the_interval_excludes_zero(right, bias):
    """94 of 309 images correct at a mean confidence of 30.8 %: 0.4 points are noise."""
    bins = [{"from": 0.2, "to": 0.4, "images": 309, "confidence": 0.308, "accuracy": right / 309}]
    model = EvaluatedModel.of({"runs": {}, "reliability": bins})
    assert calibration_bias(model) == bias
    assert calibration_text(model) == (bias or "no over- or under-confidence shown")


def test_plain_and_drawn():
    assert escape_markdown("a\tb\n c\x1b[0m") == "a b c\\[0m"
    assert escape_markdown("_x_ my_file *y* #1 a&lt;") == "\\_x\\_ my_file \\*y\\* \\#1 a\\&lt;"
    assert figure_label("猫のしっぽがとても長い", 14) == "猫のしっぽが…"
    assert figure_label("猫のしっぽがとて", 16) == "猫のしっぽがとて"
    assert figure_label("two\nlines of $a$", 30) == r"two lines of \$a\$"


HOSTILE = ["a|b\n\n# not a heading", "<script>alert(1)</script>", "$\\frac{$ [x](http://evil.example) ![y](z.png) `"]


def test_names_cannot_break_the_report():
    models = {"student <b>x</b> | y\n": ALL["student"]} | dict(list(ALL.items())[1:])
    notes = ["left out: evil|name\n# heading\n```\n<img src=x>.png", "www.evil.example"]
    text = report(evaluation(models, HOSTILE), source="my|data\n# x <b>", notes=notes)
    lines = text.splitlines()
    assert not [line for line in lines if line.startswith("# ")][1:]
    assert not any(line.startswith(("# not", "# x", "# heading", "```\n")) for line in lines)
    unescaped = text.replace("\\<", "").replace("\\`", "")
    assert "<" not in unescaped.split("## Run")[0]
    links = re.findall(r"(?<!\\)\]\((.*?)\)", text)
    assert set(links) == {f"{p}.png" for p in ("reliability", "degradations", "classes", "confusion", "cka")}
    assert "http\\://" in text and "www\\.evil" in text
    # Every row of a table has as many cells as its header.
    widths = set()
    for line in lines:
        if line.startswith("|"):
            widths.add(line.replace("\\|", "").count("|"))
        elif widths:
            assert len(widths) == 1, line
            widths = set()
    for picture in ("classes", "confusion", "reliability"):
        assert Path(f"run/{picture}.png").stat().st_size > 5000


@pytest.mark.parametrize("classes", [2, 60])
def test_pictures_of_few_and_of_many_classes(classes):
    draw = np.random.default_rng(0)
    labels = np.arange(4 * classes) % classes
    mine, its = (draw.normal(size=(len(labels), classes)) + 2 * np.eye(classes)[labels] for _ in range(2))
    names = [f"class {i}" for i in range(classes)]
    value = evaluation(degraded=False)
    for name, its_logits in (("student", mine), ("teacher", its), ("baseline", its)):
        value["models"][name] |= diagnostics(its_logits, labels, names)
    text = report(value)
    if classes == 60:
        assert "The 12 classes that lose most and the 12 that gain most, of 60." in text
        assert "The 24 classes that changed most, of 60." in text
    assert all(max(Image.open(f"run/{p}.png").size) < 2000 for p in ("classes", "confusion"))


def test_what_is_drawn(monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    value = evaluation()
    models = Evaluation.of(value).models
    assert classes_figure(models["student"], {"teacher": models["teacher"]}, "x") == "All classes that have images."
    confusion_figure(models["student"], models["teacher"], "teacher", "x")
    degradations_figure(models, [1, 5], "x")
    reliability_figure(models, "x")
    classes, confusion, degradations, reliability_ = ([axes for axes in figure.axes] for figure in figures)
    assert [tick.get_text() for tick in classes[0].get_yticklabels()] == ["dog", "cat", "emu"]
    assert [bar.get_width() for bar in classes[0].patches] == pytest.approx([-60, 0, 0])
    # 12 dogs more are taken for emus: red (above 0) on the diagonal, less often correct, and beside it.
    worse = np.zeros((3, 3))
    worse[1] = 0, 60, 60
    assert np.asarray(confusion[0].images[0].get_array()) == pytest.approx(worse)
    assert {text.get_text() for text in confusion[0].texts} == {"-60", "+60"}
    student = degradations[0].lines[0]
    assert (list(student.get_xdata()), student.get_ydata().tolist()) == ([0, 1, 5], [60, 50, 10])
    assert degradations[2].lines[0].get_ydata().tolist() == pytest.approx([60, 55, 35])
    assert [bar.get_height() for bar in reliability_[0].patches] == pytest.approx([0.6])
    assert "+18.7 points (+5.4 to +32.0)" in reliability_[0].texts[0].get_text()


def test_a_student_that_answers_as_its_teacher(monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    models = {"student": ("student", COST, ALL["teacher"][2]), "teacher": ALL["teacher"]}
    found = Evaluation.of(evaluation(models, degraded=False))
    (classes,) = (text for text in sentences(found, found.models["student"]) if "Classes against" in text)
    assert classes == "**Classes against the teacher**: the accuracy of none of 3 differs."
    classes_figure(found.models["student"], {"teacher": found.models["teacher"]}, "x")
    assert figures[0].axes[0].get_xlim() == (-1, 1)


def test_table_as_text():
    rows = verdict_table(Evaluation.of(evaluation())).splitlines()
    assert len({len(row) for row in rows}) == 1 and len(rows) == 2 + 13
