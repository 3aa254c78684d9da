"""What a card is made from: results.json of a run, with an evaluation of its student, or what a trainer knows."""

from __future__ import annotations

import math
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hf_kdtl.evaluation.results import FILE, SCHEMA, read_results, to_json, upgrade
from hf_kdtl.hub.card_tables import ARM, evaluated_student, split_scores, student_evaluation
from hf_kdtl.hub.provenance import models_section
from hf_kdtl.models.labels import class_names
from hf_kdtl.utils.redaction import anonymous, local_name
from hf_kdtl.utils.text import percent

Results = dict[str, Any]
# Settings that a card should tell and that cannot name a machine or a user.
_SETTINGS = ("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "optim",
             "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "bf16", "fp16",
             "label_smoothing_factor", "seed", "layer_rates", "gradient_rule")  # fmt: skip


def with_evaluation(results: Results, evaluation_results: Results) -> Results:
    """The results of a run with an evaluation of its student (hf-kdtl evaluate) as the section
    `student_evaluation`.

    Args:
        evaluation_results: of one student or several; the one with this student's weights is taken.

    Raises:
        ValueError: when it is of another schema, no evaluation, of other data, or of another student or teacher.
    """
    results, evaluation_results = upgrade(results), upgrade(evaluation_results, "the evaluation")
    check_results(results)
    run, evaluation = evaluation_results.get("run", {}), evaluation_results.get("evaluation", {})
    if run.get("recipe") != "evaluate_student":
        raise ValueError(f"found results of {run.get('recipe')!r}; expected those of hf-kdtl evaluate.")
    if evaluation.get("split") != "test":
        raise ValueError(f"the evaluation is of the {evaluation.get('split')} split; expected --split test.")
    _check_data(results.get("data", {}), evaluation_results.get("data", {}))
    kept: dict[str, Any] = {"student": _same(results, evaluation)}
    if teacher := _with_role(evaluation, "teacher"):
        its, model = results.get("models", {}).get("teacher", {}).get("fingerprint"), teacher["teacher"]
        if its is None or model.get("fingerprint") != its:
            raise ValueError(
                "the evaluation's teacher has other weights than the run's. Evaluate again with the run's --teacher."
            )
    kept |= {name: model for name, model in evaluation["models"].items() if model["role"] != "student"}
    # Folders of a machine: the card has no use for them.
    models = {name: {key: value for key, value in model.items() if key != "path"} for name, model in kept.items()}
    name = next(name for name, model in evaluation["models"].items() if model is kept["student"])
    models["student"] |= {"runs": {"student": kept["student"]["runs"][name]}}
    fidelity = {"student": evaluation["fidelity"][name]} if name in evaluation.get("fidelity", {}) else {}
    value = {key: item for key, item in evaluation.items() if key != "disagreement"}
    value |= {"models": models} | ({"fidelity": fidelity} if fidelity else {})
    added = {"evaluation": value, "device": run.get("device"), "versions": run.get("versions")}
    check_results(found := results | {"student_evaluation": added})
    return found


def results_of(trainer: Any) -> Results:
    """results.json of a trainer's output_dir where it is of this very student, else the same from the trainer.

    What a trainer knows is its last evaluation; it is called validation, for it may have chosen by it.

    Raises:
        ValueError: as `read_results`, when output_dir holds a file that cannot be read.
    """
    mine = _from_trainer(trainer)
    found = recipes_results(trainer.args.output_dir)
    return found if found and hash_of(found) == hash_of(mine) else mine


def recipes_results(folder: str | Path) -> Results | None:
    """What hf-kdtl distill has written in a folder; None where it has not.

    Raises:
        ValueError: as `read_results`.
    """
    found = read_results(folder) if Path(folder, FILE).is_file() else {}
    return found if found.get("run", {}).get("recipe") == "distill" else None


def published(results: Results) -> Results:
    """Results as they may be published: no path of this machine, and no local folder that reads like a Hub name.

    Applied twice, it changes nothing more.
    """
    results = anonymous(results)
    models, data, run = (results.get(name) or {} for name in ("models", "data", "run"))
    settings = run.get("settings") or {}
    sources = {
        "teacher": models.get("teacher"),
        "student": (models.get("student") or {}).get("start"),
        "dataset": data or None,
    }
    local = {name: local_name(settings[name]) for name, source in sources.items()
             if source and not source.get("hub") and isinstance(settings.get(name), str)}  # fmt: skip
    if local:
        results["run"] = run | {"settings": settings | local}
    if isinstance(data.get("source"), str) and not data.get("hub"):
        results["data"] = data | {"source": local_name(data["source"])}
    return results


def hash_of(results: Results) -> str | None:
    """By which its student is known."""
    return results.get("models", {}).get("student", {}).get("fingerprint")


def _from_trainer(trainer: Any) -> Results:
    args, state = trainer.args, trainer.state
    scores = _last_scores(state.log_history)
    results: Results = {
        "schema": SCHEMA,
        "run": {
            "recipe": None,
            "settings": {key: value for key in _SETTINGS if (value := getattr(args, key)) is not None},
            "processes": args.world_size,
            "device": torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type.upper(),
            "versions": {name: metadata.version(name) for name in ("hf_kdtl", "torch", "transformers", "accelerate")},
        },
        "data": {
            "source": None,
            "hub": False,
            "sizes": _sizes(train=trainer.train_dataset, validation=trainer.eval_dataset),
            "classes": class_names(trainer.model.config) or [],
            "notes": [],
        },
        "objectives": args.entries,
        "models": models_section(trainer),
        "pairing": {"notes": [*(trainer.teacher.notes if trainer.teacher else []), *trainer.distiller.notes]},
        "curves": {"run": state.log_history},
        "evaluation": {"models": {ARM: {"runs": {str(args.seed): {"validation": scores}}}}} if scores else {},
    }
    if (rates := trainer.layer_rates) is not None:
        results["layer_rates"] = {"run": {"options": asdict(rates.options), "history": rates.history}}
    if (rule := trainer.gradient_rule) is not None:
        results["gradient_rule"] = {"run": rule.state_dict()}
    return to_json(results)


def _last_scores(history: list[dict[str, Any]]) -> dict[str, float]:
    from hf_kdtl.evaluation.metrics import METRICS

    last: dict[str, Any] = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    found = {key.removeprefix("eval_"): value for key, value in last.items()}
    return {key: value for key, value in found.items() if key in METRICS and math.isfinite(value)}


def _sizes(**datasets: Any) -> dict[str, int]:
    return {
        name: len(data) for name, data in datasets.items() if hasattr(data, "__len__") and not isinstance(data, dict)
    }


# ---- Checks ----


def without_nulls(results: Results) -> Results:
    """Results in which null, which stands for what is not known, is left out where a card asks for what there is."""
    if not isinstance(results, dict):
        return results
    found = {name: value for name, value in results.items() if value is not None}
    for name, value in found.items():
        if name in ("data", "models", "pairing"):
            found[name] = _present(value)
        elif name in ("run", "evaluation") and isinstance(value, dict):
            found[name] = {key: item for key, item in value.items() if item is not None}
    return found


def _present(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _present(item) for key, item in value.items() if item is not None}


def check_results(results: Results) -> None:
    upgrade(results)
    if (recipe := results.get("run", {}).get("recipe")) not in (None, "distill"):
        raise ValueError(
            f"the results are of {recipe!r}; expected those of hf-kdtl distill, which trains a student. An "
            "evaluation is added to them by hf_kdtl.hub.model_card.with_evaluation."
        )
    _check_same_accuracy(results)


def _check_same_accuracy(results: Results) -> None:
    """What the run measured of its student and what the evaluation did, on other hardware perhaps: a few images may
    turn out otherwise, not more."""
    split, scores = split_scores(results)
    mine, measured = scores.get("accuracy"), student_evaluation(results)
    if mine is not None and not 0 <= mine <= 1:
        raise ValueError(f"{FILE}, section evaluation: an accuracy of {mine}; expected 0 to 1. Restore the file.")
    if mine is None or measured is None or split != "test":
        return
    its = next(iter(evaluated_student(measured).runs.values()))["test"].get("accuracy")
    images = measured.evaluation.images or 1
    if its is not None and abs(its - mine) > max(0.01, 2 / images):
        raise ValueError(
            f"the run reports a test accuracy of {percent(mine)} for its student, and the evaluation of the "
            f"same student {percent(its)}: one of them was changed. Restore {FILE}, or evaluate again."
        )


def _check_data(mine: dict[str, Any], its: dict[str, Any]) -> None:
    # A student may list the classes in another order than the data; the evaluation refers to them by name.
    mine, its = ({**data, "classes": sorted(data.get("classes", []))} for data in (mine, its))
    for what in ("source", "classes", "splits"):
        if mine.get(what) != its.get(what):
            raise ValueError(
                f"the run and the evaluation are of other data: {what} {mine.get(what)} and {its.get(what)}. Evaluate "
                "again with the run's --dataset, --split_seed, --validation_fraction and --test_fraction."
            )
    sizes = [data.get("sizes", {}).get("test") for data in (mine, its)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the run has {sizes[0]} test images and the evaluation {sizes[1]}: the data was changed.")


def _same(results: Results, evaluation: dict[str, Any]) -> dict[str, Any]:
    """The evaluation's model that has the weights of the run's student."""
    wanted, students = (
        results.get("models", {}).get("student", {}).get("fingerprint"),
        _with_role(evaluation, "student"),
    )
    for model in students.values():
        if wanted is not None and model.get("fingerprint") == wanted:
            return model
    found = ", ".join(f"{name}: {model.get('fingerprint')}" for name, model in students.items())
    raise ValueError(
        f"the evaluation is of another student: the run's has weights {wanted}, found {found or 'no student'}. "
        "Evaluate the run's own: hf-kdtl evaluate --models <run>/student ..."
    )


def _with_role(evaluation: dict[str, Any], role: str) -> dict[str, dict[str, Any]]:
    return {name: model for name, model in evaluation["models"].items() if model["role"] == role}
