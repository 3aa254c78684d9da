"""What a card is made from: results.json of a run, with an evaluation of its student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hf_kdtl.evaluation.json_records import malformed
from hf_kdtl.evaluation.model_records import Models
from hf_kdtl.evaluation.records import Data, Evaluation, Results
from hf_kdtl.evaluation.results import FILE, read_results, same_value, upgrade
from hf_kdtl.hub.card_tables import evaluated_student, split_scores
from hf_kdtl.reports.evaluation_values import models_with_role
from hf_kdtl.utils.redaction import anonymous, local_paths
from hf_kdtl.utils.text import percent

JSON = dict[str, Any]


def with_evaluation(results: JSON, evaluation_results: JSON) -> JSON:
    """The results of a run with an evaluation of its student (hf-kdtl evaluate) as the section
    `student_evaluation`, or of a student without a head as `embedding`.

    Args:
        evaluation_results: of one student or several; the one with this student's weights is taken.

    Raises:
        ValueError: when it is of another schema, no evaluation, of other data, or of another student or teacher.
    """
    results, evaluation_results = upgrade(results), upgrade(evaluation_results, "the evaluation")
    run, its = Results.of(results), Results.of(evaluation_results)
    check_results(run)
    if its.run.recipe != "evaluate_student":
        raise ValueError(f"found results of {its.run.recipe!r}; expected those of hf-kdtl evaluate.")
    if its.extra.get("embedding"):
        return results | {"embedding": _of_one_embedding(its.extra["embedding"], run)}
    if its.evaluation.models and not its.evaluation.split:
        raise ValueError(
            "the evaluation is of several labels an image, whose mAP and F1 the run has measured itself; leave it out."
        )
    if its.evaluation.split != "test":
        raise ValueError(f"the evaluation is of the {its.evaluation.split} split; expected --split test.")
    _check_data(run.data, its.data)
    name = _with_weights(models_with_role(its.evaluation, "student"), run)
    _check_teachers([*models_with_role(its.evaluation, "teacher").values()], run)
    section = _of_one_student(evaluation_results["evaluation"], its.evaluation, name)
    added = {"evaluation": section, "device": its.run.device, "versions": its.run.versions}
    found = results | {"student_evaluation": added}
    check_results(Results.of(found))
    return found


def _of_one_embedding(section: JSON, run: Results) -> JSON:
    """The section `embedding` of an evaluation with the run's student, called "student", and the references."""
    models = {name: SimpleNamespace(**model) for name, model in section["models"].items()}
    student = _with_weights({name: one for name, one in models.items() if one.role == "student"}, run)
    _check_teachers([one for one in models.values() if one.role == "teacher"], run)
    kept = [student, *(name for name, one in models.items() if one.role != "student")]
    found = {"student" if name == student else name: section["models"][name] for name in kept}
    found = {name: {key: value for key, value in model.items() if key != "path"} for name, model in found.items()}
    chosen = {key: value for key, value in run.extra.get("embedding", {}).items() if key in ("seed", "metric")}
    return chosen | section | {"models": found}


def _of_one_student(section: JSON, evaluation: Evaluation, student: str) -> JSON:
    """The section `evaluation` with one student, called "student", and the references; without folders."""
    names = [student, *(name for name, model in evaluation.models.items() if model.role != "student")]
    models = {"student" if name == student else name: section["models"][name] for name in names}
    models = {name: {key: value for key, value in model.items() if key != "path"} for name, model in models.items()}
    models["student"] |= {"runs": {"student": models["student"]["runs"][student]}}
    found = {key: value for key, value in section.items() if key not in ("disagreement", "fidelity")}
    fidelity = {"student": section["fidelity"][student]} if student in evaluation.fidelity else {}
    return found | {"models": models} | ({"fidelity": fidelity} if fidelity else {})


def recipes_results(folder: str | Path) -> JSON | None:
    """What hf-kdtl distill has written in a folder; None where it has not.

    Raises:
        ValueError: as `read_results`.
    """
    found = read_results(folder) if Path(folder, FILE).is_file() else {}
    return found if found.get("run", {}).get("recipe") == "distill" else None


def published(results: JSON) -> JSON:
    """Results as they may be published: a local folder by its last part, wherever it is named.

    Local folders are settings that are paths, and teacher, student and data that did not come from the Hub. Applied
    twice, it changes nothing more.
    """
    local, hub = _sources(Results.of(results))
    return anonymous(results, local - hub)


def _sources(results: Results) -> tuple[set[str], set[str]]:
    """The local paths that the results name, and the names on the Hub."""
    models, settings, data = results.models or Models(), results.run.settings, results.data
    sources = [(settings.get("dataset"), data.source, data.hub), (None, data.source, data.hub)]
    asked = settings.get("teacher")
    named = asked if isinstance(asked, dict) else {"teacher": asked}
    teachers = models.teachers or ({"teacher": models.teacher} if models.teacher is not None else {})
    for setting, model in ((settings.get("student"), models.student.start),
                           *((named.get(name), model) for name, model in teachers.items())):  # fmt: skip
        sources += [(setting, model.name, model.hub), (None, model.name, model.hub)]
    known = [(setting or name, hub) for setting, name, hub in sources if name]
    local = {name for name, hub in known if not hub and isinstance(name, str) and ("/" in name or "\\" in name)}
    return local | local_paths(settings), {name for name, hub in known if hub and isinstance(name, str)}


def hash_of(results: JSON) -> str | None:
    """By which its student is known."""
    models = Results.of(results).models
    return None if models is None else models.student.fingerprint


# ---- Checks ----


def check_results(results: Results) -> None:
    """Raises ValueError for results that are not of hf-kdtl distill, or that contradict themselves."""
    if results.run.recipe not in (None, "distill"):
        raise ValueError(
            f"the results are of {results.run.recipe!r}; expected those of hf-kdtl distill, which trains a student. "
            "An evaluation is added to them by hf_kdtl.hub.model_card.with_evaluation."
        )
    if (measured := results.student_evaluation) is not None:
        students = models_with_role(measured.evaluation, "student").values()
        if not any(any(model.confusion.values()) for model in students):
            raise malformed("student_evaluation.evaluation.models", "no student with a 'confusion'", "one")
    _check_same_accuracy(results)


def _check_same_accuracy(results: Results) -> None:
    """What the run measured of its student and what the evaluation did, on other hardware perhaps: a few images may
    turn out otherwise, not more."""
    split, scores = split_scores(results)
    mine, measured = scores.get("accuracy"), results.student_evaluation
    if mine is not None and not 0 <= mine <= 1:
        raise malformed("evaluation", f"an accuracy of {mine}", "0 to 1")
    if mine is None or measured is None or split != "test":
        return
    its = next(iter(evaluated_student(measured.evaluation).runs.values()))["test"].get("accuracy")
    images = measured.evaluation.images or 1
    if its is not None and abs(its - mine) > max(0.01, 2 / images):
        raise ValueError(
            f"the run reports a test accuracy of {percent(mine)} for its student, and the evaluation of the "
            f"same student {percent(its)}: one of them was changed. Restore {FILE}, or evaluate again."
        )


def _check_data(mine: Data, its: Data) -> None:
    # A student may list the classes in another order than the data; the evaluation refers to them by name.
    pairs = {
        "source": (mine.source, its.source),
        "classes": (sorted(mine.classes), sorted(its.classes)),
        "splits": (mine.splits, its.splits),
    }
    for what, (here, there) in pairs.items():
        if not same_value(here, there):
            raise ValueError(
                f"the run and the evaluation are of other data: {what} {here} and {there}. Evaluate again with the "
                "run's --dataset, --split_seed, --validation_fraction and --test_fraction."
            )
    mine_test, its_test = mine.sizes.get("test"), its.sizes.get("test")
    if mine_test != its_test:
        raise ValueError(f"the run has {mine_test} test images and the evaluation {its_test}: the data was changed.")
    known = {data.digests["test"] for data in (mine, its) if "test" in data.digests}
    if len(known) > 1:
        raise ValueError(
            "the run and the evaluation have other test images, of the same number: the data was changed."
        )


def _with_weights(students: Mapping[str, Any], results: Results) -> str:
    """The name of the evaluation's model that has the weights of the run's student."""
    wanted = None if results.models is None else results.models.student.fingerprint
    for name, model in students.items():
        if wanted is not None and model.fingerprint == wanted:
            return name
    found = ", ".join(f"{name}: {model.fingerprint}" for name, model in students.items())
    raise ValueError(
        f"the evaluation is of another student: the run's has weights {wanted}, found {found or 'no student'}. "
        "Evaluate the run's own: hf-kdtl evaluate --models <run>/student ..."
    )


def _check_teachers(evaluated: Sequence[Any], results: Results) -> None:
    teachers = [] if results.models is None else results.models.all_teachers
    known = {teacher.fingerprint for teacher in teachers if teacher.fingerprint is not None}
    for model in evaluated:
        if model.fingerprint not in known:
            raise ValueError(
                "the evaluation's teacher has other weights than the run's. Evaluate again with the run's --teacher."
            )
