from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_kdtl.evaluation import update_results
from hf_kdtl.evaluation.results import load_results
from hf_kdtl.evaluation.statistics import paired_difference
from hf_kdtl.reports.figures.samples import choose_samples, sample_figure
from hf_kdtl.reports.run_report import difference, write_report
from hf_kdtl.utils.text import markdown_table


def score(validation, test):
    return {"validation": {"accuracy": validation}, "test": {"accuracy": test}}


def evaluation(seeds):
    cost = {"parameters": 1234, "images_per_second": 5678.9}
    alone = {str(k): score(0.8, 0.8) for k in range(seeds)}
    distilled = {str(k): score(0.9, 0.9 + 0.01 * k) for k in range(seeds)}
    tests = [[run["test"]["accuracy"] for run in arm.values()] for arm in (distilled, alone)]
    return {
        "models": {
            "teacher": cost | {"runs": {"teacher": score(0.95, 0.97)}},
            "alone": cost | {"runs": alone},
            "distilled": cost | {"runs": distilled},
        },
        "batch_size": 64,
        "paired_difference": {"test": paired_difference(*tests)},
    }


def results(seeds=3):
    update_results("run", "run", {"recipe": "distill", "device": "a CPU", "settings": {"seeds": [0, 1, 2]}})
    update_results("run", "data", {"source": "digits", "sizes": {"train": 10, "test": 5}, "notes": ["A note."]})
    update_results("run", "objectives", [{"name": "task"}, {"name": "logit_kd", "weight": 0.9, "temperature": 4.0}])
    update_results("run", "pairing", {"teacher": "a ViT", "notes": ["labels match."]})
    logs = [{"step": 10, "loss": 1.0}, {"step": 10, "eval_accuracy": 0.5}, {"step": 20, "loss": 0.5}]
    update_results("run", "curves", {f"{arm}-seed{k}": logs for arm in ("alone", "distilled") for k in range(seeds)})
    return update_results("run", "evaluation", evaluation(seeds))


def test_report_from_results_alone():
    results()
    text = write_report("run").read_text()
    assert Path("run/curves.png").stat().st_size > 10_000
    for expected in (
        "# distill on digits",
        "| student distilled |             90.0 ± 0.0 % |  91.0 ± 1.0 % |",
        "| teacher           |                   95.0 % |        97.0 % |",
        "5,679",
        "batch size 64 on a CPU",
        "+11.00 points, 95% t interval over 3 seeds [+8.52, +13.48] (above 0).",
        "![learning curves](curves.png)",
        "temperature 4.0",
        "- labels match.",
        "- A note.",
        "recipe: distill",
    ):
        assert " ".join(expected.split()) in " ".join(text.split()), expected
    assert "sheet" not in text


def test_one_seed_is_reported():
    results(seeds=1)
    text = difference(load_results("run"))
    assert text.endswith("+10.00 points (one seed: no interval).")


def test_half_a_run_has_a_report():
    update_results("run", "data", {"source": "digits"})
    assert write_report("run").read_text().startswith("# run on digits")
    with pytest.raises(FileNotFoundError):
        write_report("elsewhere")


def test_aligned():
    assert markdown_table([["", "b"], ["aaaa", "1"]]).splitlines() == [
        "|      |   b |",
        "|------|----:|",
        "| aaaa |   1 |",
    ]


def test_samples_are_the_largest_disagreements_spread_over_the_classes():
    teacher = 4.0 * np.eye(3)[[0, 0, 0, 1, 2, 2]]
    student = np.array([[3, 0, 0], [0, 1, 0], [0, 5, 0], [1.1, 1, 0], [0, 0, 3.9], [0, 0, 1]])
    # 1, 2 and 3 differ; 2 is furthest apart and of the same class as 1, so 3 comes before 1.
    assert choose_samples(teacher, student, 4) == [2, 3, 5, 0]
    assert choose_samples(teacher, student, 100) == [2, 3, 1, 5, 0, 4]
    assert len(set(choose_samples(teacher, teacher, 3))) == 3
    assert {int(teacher[row].argmax()) for row in choose_samples(teacher, teacher, 3)} == {0, 1, 2}


@pytest.mark.parametrize("number", [1, 5])
def test_sheet_with_two_classes(number):
    chances = np.tile([[0.25, 0.75]], (number, 1))
    images = [Image.new("RGB", (12, 8), "red")] * number
    names = ["a class of a very long name", "dog"]
    caption = sample_figure("sheet.png", images, [0] * number, names, chances, chances)
    assert Path("sheet.png").stat().st_size > 5_000 and "images that the two classify differently" in caption
