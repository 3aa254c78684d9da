"""What a card is made from: results.json of a run, with an evaluation of its student, or what a trainer knows."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from hf_kdtl.cards.figures import ARM
from hf_kdtl.cards.provenance import models_section
from hf_kdtl.evaluation.metrics import METRICS
from hf_kdtl.evaluation.readings import of_role
from hf_kdtl.evaluation.results import FILE, SCHEMA, read_results
from hf_kdtl.models.labels import class_names

Results = dict[str, Any]
# Settings that a card should tell and that cannot name a machine or a user.
_SETTINGS = ("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "optim",
             "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "bf16", "fp16",
             "label_smoothing_factor", "seed", "layer_rates", "gradient_rule")  # fmt: skip


def with_evaluation(results: Results, evaluation_results: Results) -> Results:
    """The results of a run with an evaluation of its student (recipes/evaluate_student.py) as the section `judged`.

    Args:
        evaluation_results: of one student or several; the one with this student's weights is taken.

    Raises:
        ValueError: when it is of another schema, no evaluation, of other data, or of another student or teacher.
    """
    check_results(results)
    run, evaluation = evaluation_results.get("run", {}), evaluation_results.get("evaluation", {})
    if evaluation_results.get("schema") != SCHEMA or run.get("recipe") != "evaluate_student":
        raise ValueError(
            f"found results of {run.get('recipe')!r} with schema {evaluation_results.get('schema')!r}; expected those "
            f"of recipes/evaluate_student.py with schema {SCHEMA}."
        )
    if evaluation.get("split") != "test":
        raise ValueError(f"the evaluation is of the {evaluation.get('split')} split; expected --split test.")
    _check_data(results.get("data", {}), evaluation_results.get("data", {}))
    kept: dict[str, Any] = {"student": _same(results, evaluation)}
    if teacher := of_role(evaluation, "teacher"):
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
    return results | {"judged": {"evaluation": value, "device": run.get("device"), "versions": run.get("versions")}}


def results_of(trainer: Any) -> Results:
    """results.json of a trainer's output_dir where it is of this run, else the same sections from the trainer.

    What a trainer knows is its last evaluation; it is called validation, for it may have chosen by it.

    Raises:
        ValueError: when output_dir holds the results of a run with other objectives.
    """
    folder = Path(trainer.args.output_dir)
    if (folder / FILE).is_file() and (found := read_results(folder)).get("run", {}).get("recipe") == "distill":
        if found.get("objectives") != trainer.args.entries:
            raise ValueError(
                f"{folder / FILE} is of a run with the objectives {found.get('objectives')} and the trainer has "
                f"{trainer.args.entries}. Use another output_dir, or move that file away."
            )
        return found
    return _from_trainer(trainer)


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
    # Through JSON, so that what is not finite or no plain value is met here and not in a card.
    return json.loads(json.dumps(results, default=str))


def _last_scores(history: list[dict[str, Any]]) -> dict[str, float]:
    last: dict[str, Any] = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    found = {key.removeprefix("eval_"): value for key, value in last.items()}
    return {key: value for key, value in found.items() if key in METRICS and math.isfinite(value)}


def _sizes(**datasets: Any) -> dict[str, int]:
    return {
        name: len(data) for name, data in datasets.items() if hasattr(data, "__len__") and not isinstance(data, dict)
    }


# ---- Checks ----


def check_results(results: Results) -> None:
    found = results.get("schema") if isinstance(results, dict) else None
    if found != SCHEMA:
        raise ValueError(
            f"the results have schema {found!r} and this version reads {SCHEMA}. Use the version of hf_kdtl that "
            "wrote them, or run the recipe again."
        )
    if (recipe := results.get("run", {}).get("recipe")) not in (None, "distill"):
        raise ValueError(
            f"the results are of {recipe!r}; expected those of recipes/distill.py, which trains a student. An "
            "evaluation is added to them by hf_kdtl.card.with_evaluation."
        )


def _check_data(mine: dict[str, Any], its: dict[str, Any]) -> None:
    # A student may list the classes in another order than the data; what is judged is named, and not by place.
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
    wanted, students = results.get("models", {}).get("student", {}).get("fingerprint"), of_role(evaluation, "student")
    for model in students.values():
        if wanted is not None and model.get("fingerprint") == wanted:
            return model
    found = ", ".join(f"{name}: {model.get('fingerprint')}" for name, model in students.items())
    raise ValueError(
        f"the evaluation is of another student: the run's has weights {wanted}, found {found or 'no student'}. "
        "Evaluate the run's own: python recipes/evaluate_student.py --models <run>/student ..."
    )
