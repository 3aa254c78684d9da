"""hf-kdtl compare, from written results.json: tables, what is refused, how often it sees what is not there."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_kdtl.commands.common import arguments as cli
from hf_kdtl.evaluation import update_results
from hf_kdtl.evaluation.comparison import Arm, compare, compare_images
from hf_kdtl.evaluation.predictions import read_predictions, save_predictions

CLASSES = ["cat", "dog", "fox"]
DATA = {
    "source": "pets",
    "sizes": {"train": 90, "validation": 20, "test": 30},
    "classes": CLASSES,
    "splits": {"split_seed": 42, "validation_fraction": 0.15, "test_fraction": 0.15},
}
ALONE, DISTILLED = [0.80, 0.82, 0.81], [0.85, 0.89, 0.87]


def run(folder, arms, data=None, **metrics):
    """A run folder as hf-kdtl distill leaves it: {arm: one test accuracy for each of the seeds 8, 9, 10, ...}."""
    models = {"teacher": {"runs": {"teacher": {"validation": {"accuracy": 0.9}, "test": {"accuracy": 0.9}}}}}
    for arm, values in arms.items():
        found = {
            str(seed): {split: {"accuracy": value} | metrics for split in ("validation", "test")}
            for seed, value in enumerate(values, start=8)
        }
        models[arm] = {"runs": found}
    update_results(folder, "data", DATA | (data or {}))
    update_results(folder, "evaluation", {"models": models, "batch_size": 8})
    return folder


@pytest.fixture
def compare_runs(command, capsys):
    """compare_runs("--runs", ...) -> (exit code, what it printed)."""

    def call(*arguments):
        code = cli.run(lambda: command("compare").main([*arguments]))
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


def cells(text, name):
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_two_folders_side_by_side(compare_runs):
    run("a", {"alone": ALONE, "distilled": DISTILLED})
    run("b", {"alone": [0.84, 0.84, 0.84], "distilled": [0.5, 0.8, 0.6]}, data={"classes": CLASSES[::-1]})
    code, printed = compare_runs("--runs", "a", "b", "--output_dir", "out")
    assert code == 0 and "# 4 models on the test images of pets" in printed
    run("c", {"alone": ALONE}, data={"source": "./pets/"})
    assert compare_runs("--runs", "a/alone", "c", "--output_dir", "other")[0] == 0
    assert "Each is compared with a/alone, paired by seed (8, 9, 10)." in printed
    assert cells(printed, "a/alone") == ["81.00 ± 1.00", "-", "-", "-", "-"]
    # d = 5, 7, 6 points: mean 6, sd 1, half width 2.484; t = 6 sqrt(3), p = 1 - t / sqrt(2 + t^2) = 0.009, times 3
    assert cells(printed, "a/distilled") == ["87.00 ± 2.00", "+6.00", "+3.52 to +8.48", "0.009", "0.027"]
    assert cells(printed, "b/alone")[-2:] == ["0.035", "0.070"], "alone it would have been shown"
    assert "3 differences were tested" in printed and "Shown: a/distilled (accuracy)." in printed
    text = Path("out/comparison.md").read_text()
    assert printed.startswith(text.split("![")[0]) and "](comparison.png)" in text
    pixels = np.array(Image.open("out/comparison.png"))
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50


def test_one_model_of_a_folder_and_several_metrics(compare_runs):
    run("runs/a", {"alone": ALONE, "distilled": DISTILLED}, nll=0.5)
    run("runs/b", {"alone": [0.75, 0.7901, 0.7699], "distilled": DISTILLED}, nll=0.25)
    flags = ["--runs", "runs/a/distilled", "runs/b/alone", "--metrics", "accuracy", "nll", "--split", "validation"]
    code, printed = compare_runs(*flags)
    assert code == 0 and "2 models on the validation images" in printed and "runs/a/alone" not in printed
    assert "## accuracy (%)" in printed and "## nll (nats, lower is better)\n" in printed
    # The same in every seed: reported, and not tested.
    assert "-0.2500 | the same difference in all 3 seeds, no spread: no interval |" in " ".join(printed.split())
    assert cells(printed.split("## nll")[0], "runs/b/alone")[-2:] == ["< 0.001", "< 0.001"]
    assert "One difference was tested" in printed and Path("runs/comparison/comparison.png").is_file()


def test_one_seed_has_no_interval(compare_runs):
    run("a", {"alone": ALONE[:1], "distilled": DISTILLED[:1]})
    code, printed = compare_runs("--runs", "a")
    assert code == 0 and cells(printed, "a/distilled") == ["85.00", "+5.00", "one seed: no interval", "-", "-"]
    assert "No difference can be tested" in printed and Path("runs/comparison/comparison.png").is_file()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "zoo"}, "data set: a/alone has 'pets' and b/alone has 'zoo'; only runs on the same data"),
        (
            {"classes": ["cat", "dog", "wolf"]},
            "classes: a/alone has 3 classes (fox only there) and b/alone has 3 classes (wolf only there)",
        ),
        ({"splits": DATA["splits"] | {"split_seed": 7}}, "way of splitting: a/alone has {'split_seed': 42"),
        ({"digests": {"test": "b"}}, "hash of the test images: a/alone has 'a' and b/alone has 'b'"),
        ({"sizes": DATA["sizes"] | {"test": 31}}, "test images: a/alone has 30 and b/alone has 31"),
    ],
)
def test_runs_on_other_data_are_refused(compare_runs, data, message):
    run("a", {"alone": ALONE}, data={"digests": {"test": "a"}})
    run("b", {"alone": ALONE}, data=data)
    code, printed = compare_runs("--runs", "a", "b")
    assert code == 2 and message in printed and not Path("runs").exists()


def test_names_cannot_break_the_report(compare_runs):
    run("a|b", {"alone": ALONE, "distilled": DISTILLED}, data={"source": "<b>$pets"})
    code, printed = compare_runs("--runs", "a|b")
    assert code == 0 and r"images of \<b\>\$pets" in printed and "| a\\|b/distilled |" in printed


def test_other_numbers_of_training_images_are_no_obstacle(compare_runs):
    run("a", {"alone": ALONE})
    run("b", {"alone": DISTILLED}, data={"sizes": DATA["sizes"] | {"train": 9}})
    assert compare_runs("--runs", "a", "b")[0] == 0


def test_what_else_is_refused(compare_runs):
    run("a", {"alone": ALONE, "distilled": DISTILLED})
    run("b", {"alone": ALONE[:2]})
    update_results("begun", "data", DATA)
    Path("old").mkdir()
    Path("old/results.json").write_text(json.dumps({"schema": 0}))
    for runs, message in (
        (["a/alone", "b"], "seeds: a/alone has 8, 9, 10 and b/alone has 8, 9; add the missing --seeds"),
        (["a/alone"], "found a/alone; expected two different ones or more"),
        (["a", "a/alone"], "found a/alone, a/distilled, a/alone; expected two different ones"),
        (["a/student"], "a holds no model 'student'; expected one of alone, distilled"),
        (["a", "begun"], "begun holds no evaluated model with a seed; expected the output_dir of distill"),
        (["a", "old"], "schema 0 and this version reads 1"),
        (["a", "nowhere"], "nowhere has no results.json"),
        (["a", "--metrics", "ece"], "a/distilled, seed 8, has no 'ece' on test; it has accuracy"),
    ):
        code, printed = compare_runs("--runs", *runs)
        assert code == 2 and message in printed, printed
        assert not Path("runs").exists()


# ---- The images of each seed ----


def keep(folder, right, labels, classes=CLASSES):
    """Predictions of a run: the right class, or the next one."""
    names = np.array(CLASSES)[labels]
    own = np.where(labels == -100, -100, [classes.index(name) for name in names])
    logits = np.eye(3)[np.where(right, own, (own + 1) % 3)]
    Path(folder).mkdir(parents=True)
    save_predictions(folder, "test", logits, own)


def test_images_of_each_seed(compare_runs):
    run("a", {"alone": ALONE[:2], "distilled": DISTILLED[:2]})
    run("b", {"alone": ALONE[:2]}, data={"classes": CLASSES[::-1]})
    draw = np.random.default_rng(0)
    labels, right = draw.integers(0, 3, 200), draw.random(200) < 0.8
    for seed in (8, 9):
        keep(f"a/alone-seed{seed}", right, labels)
        keep(f"a/distilled-seed{seed}", right | (np.arange(200) % 6 == seed - 8), labels)
    code, printed = compare_runs("--runs", "a", "b")
    assert code == 0 and "Not every run kept its predictions (predictions_test.safetensors)" in printed
    for seed in (8, 9):  # of the same images, with the classes in another order
        keep(f"b/alone-seed{seed}", right, labels, CLASSES[::-1])
    code, printed = compare_runs("--runs", "a", "b")
    section = printed.split("## The images of each seed")[1]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    gained = [int((~right & (np.arange(200) % 6 == seed - 8)).sum()) for seed in (8, 9)]
    assert [row.split("|")[2].strip() for row in rows] == ["8", "9", "8", "9"]
    assert [row.split("|")[5].strip() for row in rows] == [*map(str, gained), "0", "0"]
    assert rows[2].count("no image differs") == 1 and "1.000" in rows[2]
    assert f"{100 * gained[0] / 200:+.2f}" in rows[0] and f"{2 / 2 ** gained[0]:.3f}" in rows[0]
    # Of four tests: the smallest p four times, the next one three times.
    (least, _), (next_one, at) = sorted((2 / 2**g, i) for i, g in enumerate(gained))
    assert rows[at].split("|")[-2].strip() == f"{max(4 * least, 3 * next_one):.3f}" != rows[at].split("|")[-3].strip()
    # Other images: the order of the test split is another one.
    for file in Path("b/alone-seed9").iterdir():
        file.unlink()
    Path("b/alone-seed9").rmdir()
    keep("b/alone-seed9", right, labels[::-1])
    code, printed = compare_runs("--runs", "a", "b")
    assert code == 2 and "the test images of a/alone and b/alone, seed 9, have other labels" in printed


def test_unlabelled_images_are_left_out():
    Path("a").mkdir()
    save_predictions("a", "test", np.eye(3), np.array([0, -100, 1]))
    predicted, labels = read_predictions("a", "test")
    assert predicted.tolist() == [0, 1, 2] and labels.tolist() == [0, -100, 1]
    assert read_predictions("a", "validation") is None
    arms = [Arm(name, DATA, {"0": {}}, {"0": Path("a")}) for name in "xy"]
    (found,) = compare_images(arms, "test")
    assert (found["number"], found["mean"]) == (2, 0.0)


# ---- Without an effect ----


def seen_where_nothing_is(simulations, draw, arms=4, seeds=3):
    """Shares of: one test at 5 %; any of the arms' tests at 5 %; any of them corrected."""
    found = np.zeros((simulations, 3), bool)
    for i in range(simulations):
        listed = [
            Arm(str(k), DATA, {str(s): {"test": {"accuracy": float(v)}} for s, v in enumerate(row)}, {})
            for k, row in enumerate(draw(arms, seeds))
        ]
        tests = compare(listed, "test", ["accuracy"])["accuracy"]
        p, corrected = ([one.get(key) or 1.0 for one in tests] for key in ("p_value", "p_holm"))
        found[i] = p[0] <= 0.05, min(p) <= 0.05, min(corrected) <= 0.05
    return found.mean(0)


def test_false_positives_at_the_nominal_level():
    draw = np.random.default_rng(0)
    one, any_of_three, corrected = seen_where_nothing_is(1500, lambda *shape: draw.normal(0.9, 0.01, shape))
    # 1500 draws of probability 0.05 have a standard deviation of 0.0056.
    assert 0.033 < one < 0.067
    assert any_of_three > 0.09, "three tests are more than one, else there is nothing to correct"
    assert 0.01 < corrected < 0.067
