"""Pass or fail, and the table of speeds."""

import pytest

from hf_kdtl.evaluation.records import Difference, EvaluatedModel, Evaluation, Speed
from hf_kdtl.reports.evaluation_summary import passed, speed_table, verdicts
from hf_kdtl.reports.evaluation_values import interval_verdict


def evaluation(interval, mean=-0.01, allowed=2.0, number=100):
    found = Difference(mean=mean, number=number, interval=interval)
    models = {
        "student": EvaluatedModel(runs={}, role="student", differences={"teacher": found}),
        "teacher": EvaluatedModel(runs={}, role="teacher"),
    }
    return Evaluation(models=models, max_drop=allowed, split="test")


@pytest.mark.parametrize(
    ("interval", "mean", "message", "passes"),
    [
        ((-0.02, 0.01), -0.005, "Verdict: pass", True),  # the interval may end on the limit
        ((-0.05, -0.03), -0.04, "95% interval -5.0 to -3.0; a drop of 2 is allowed.", False),
        ((-0.03, 0.01), -0.01, "not shown either way", False),
        (None, -0.5, "Verdict: fail", False),
    ],
)
def test_all_of_the_interval_must_be_within_the_drop(interval, mean, message, passes):
    (answer,) = verdicts(evaluation(interval, mean)).values()
    assert message in answer and passed(answer) == passes


@pytest.mark.parametrize(
    ("number", "allowed", "message", "passes"),
    [
        (9, 0.0, "by the rule of three -33.3 to +33.3; a drop of 0 is allowed (not shown either way", False),
        (149, 2.0, "by the rule of three -2.0 to +2.0; a drop of 2 is allowed (not shown either way", False),
        (1500, 2.0, "+0.0 points against the teacher, no spread over 1,500 images: by the rule of three", True),
    ],
)
def test_answers_that_never_differ_pass_by_the_number_of_images(number, allowed, message, passes):
    (answer,) = verdicts(evaluation(None, 0.0, allowed, number)).values()
    assert message in answer and passed(answer) == passes


def test_few_images_that_all_differ_show_no_difference():
    assert [interval_verdict(Difference(mean=-1.0, number=n)) for n in (3, 300)] == ["no difference shown", "worse"]


def test_without_a_limit_or_a_reference_there_is_no_verdict():
    assert verdicts(evaluation((-0.1, 0.1), allowed=None)) == {}
    assert verdicts(Evaluation(models={}, max_drop=1.0)) == {}


def test_the_table_of_speeds():
    speed = Speed(8, {"student": {"eager": {"1": 2.0, "8": 4.0}, "onnx": {"1": 1.0, "8": 2.0}}}, {})
    lines = speed_table(speed).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["student, eager (float32)", "2.0", "4.0", "2,000"]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["student, ONNX", "1.0", "2.0", "4,000"]
