"""The card of a student on the Hub, made from results.json and from nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_kdtl.evaluation.records import Results
from hf_kdtl.evaluation.results import FILE, read_results, upgrade
from hf_kdtl.hub.card_results import JSON, check_results, published, with_evaluation
from hf_kdtl.hub.card_tables import is_headless, models_of, source_name, split_scores
from hf_kdtl.hub.card_values import facts, millions
from hf_kdtl.hub.license import of_parents, parents, student_license
from hf_kdtl.hub.markdown import Markdown, fenced, inline, render
from hf_kdtl.hub.provenance import is_hub_name, is_on_hub
from hf_kdtl.hub.trainer_results import results_of
from hf_kdtl.reports.embedding import embedding_lines, embedding_sentence
from hf_kdtl.utils.redaction import is_local, local_name, without_paths
from hf_kdtl.utils.text import one_line

__all__ = ["inline", "results_of", "student_card", "with_evaluation", "write_card"]
TASK, FEATURES = "image-classification", "image-feature-extraction"


def student_card(
    results: JSON,
    *,
    model_id: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
    tags: str | Sequence[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | Sequence[str] | None = None,
    dataset_tags: str | Sequence[str] | None = None,
    dataset: str | Sequence[str] | None = None,
    dataset_args: str | Sequence[str] | None = None,
) -> ModelCard:
    """The card of the student of a run. What was not measured is stated, and no number is made up.

    Args:
        results: of hf-kdtl distill (`read_results`), with an evaluation where there is one (`with_evaluation`), or
            what `results_of` makes of a trainer.
        model_id: the student's name on the Hub, for the lines that show how to use it.
        license: by default the one that its teacher's card states; a card without one says what is not known.
        language, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args: as of Trainer's
            create_model_card; tags are added to ours, the others in place of what results.json says. Of a path the
            last part is taken; `finetuned_from` and `dataset_tags` are links, and left out where they are none.

    Raises:
        ValueError: for results of another schema or of another recipe, or malformed ones, naming the section; a
            model_id that is no name on the Hub; a license that the teacher's does not allow.
    """
    if model_id is not None and not is_hub_name(model_id):
        raise ValueError(f"model_id is {model_id!r}; expected a name on the Hub, such as your-name/your-student.")
    given = {"model_id": model_id, "license": license, "language": language, "tags": tags, "model_name": model_name,
             "finetuned_from": finetuned_from, "tasks": tasks, "dataset_tags": dataset_tags, "dataset": dataset,
             "dataset_args": dataset_args}  # fmt: skip
    try:
        return _card(_published(results), **given)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{FILE}: what a card needs of it is missing, or of another kind ({type(error).__name__}: {error}). "
            "Restore the file, or run the command again."
        ) from error


def _published(results: JSON) -> Results:
    """The records of results as they may be published, checked."""
    results = upgrade(results)
    check_results(Results.of(results))
    return Results.of(published(results))


def _card(
    results: Results, *, model_id, license, language, tags, model_name, finetuned_from, tasks, dataset_tags, dataset,
    dataset_args,
) -> ModelCard:  # fmt: skip
    from hf_kdtl.evaluation.metrics import METRICS

    found, sentence = _license(results, license)
    model_name = next(iter(_list(model_name)), None)
    name = one_line(model_name or (model_id or "").split("/")[-1] or "student")
    task = next(iter(_list(tasks)), pipeline_task(results))
    data = ModelCardData(
        license=found,
        language=_list(language) or None,
        library_name="peft" if models_of(results).student.saved_as_adapter else "transformers",
        pipeline_tag=task,
        tags=_tags(results, tags),
        datasets=_datasets(results, dataset_tags),
        metrics=[metric for metric in split_scores(results)[1] if metric in METRICS] or None,
        model_name=name,
        eval_results=_eval_results(results, task, dataset, dataset_args) or None,
        **_parents(results, finetuned_from),
    )
    values = facts(results, _title(results, model_name or model_id), sentence, _usage(results, model_id))
    values |= {"headless": is_headless(results), "features": embedding_sentence(results)}
    if lines := embedding_lines(results):
        values["figures"] = Markdown("\n".join(lines).strip())
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{render('student.md', **values)}")


# ---- Metadata ----


def _license(results: Results, asked: str | None) -> tuple[str | None, str]:
    """(license, what the card says of it)."""
    made_from, its = parents(models_of(results)), of_parents(models_of(results))
    only, of_only = "its teacher", "its teacher's license"
    if not models_of(results).all_teachers:
        only, of_only = "the model that it began as", "the license of the model that it began as"
    if its is None and asked is None:
        several = "not all licenses of its teacher and its start are known"
        known = {0: "none was given", 1: f"{of_only} is not known"}.get(len(made_from), several)
        return None, f"not determined: {known}. Ask before you use it."
    found = student_license(models_of(results), asked)
    if asked is None or asked == its:
        return (
            found,
            f"{inline(found)}, as of {'the models that it was made from' if len(made_from) > 1 else only}.",
        )
    its_own = f"theirs is {inline(its)}" if its else "that of the models it was made from is not known"
    return found, f"{inline(found)}, chosen by the publisher{f' ({its_own})' if made_from else ''}."


def _tags(results: Results, tags: str | Sequence[str] | None) -> list[str]:
    taught = ["knowledge-distillation"] if models_of(results).all_teachers else []
    names = [entry["name"] for entry in results.objectives if entry["name"] != "task" and entry.get("weight", 1.0)]
    return list(dict.fromkeys(["hf_kdtl", *taught, *map(one_line, names), *_list(tags)]))


def _datasets(results: Results, asked: str | Sequence[str] | None) -> list[str] | None:
    source = results.data.source
    own = [source] if source and results.data.hub and is_hub_name(source) else []
    given = [asked] if isinstance(asked, str) else asked or []
    return [name for name in given if is_on_hub(name)] or own or None


def _parents(results: Results, finetuned_from: str | None) -> dict[str, Any]:
    """base_model and, where the Hub has a word for it, base_model_relation."""
    student, teachers = models_of(results).student, models_of(results).all_teachers
    start, hub = student.start, any(teacher.hub for teacher in teachers)
    names = [model.name for model in (start, *teachers) if model.hub and model.name]
    finetuned_from = finetuned_from if finetuned_from and is_on_hub(finetuned_from) else None
    names = [*([finetuned_from] if finetuned_from else []), *names]
    if not names:
        return {}
    found: dict[str, Any] = {"base_model": list(dict.fromkeys(names)) if len(set(names)) > 1 else names[0]}
    if student.saved_as_adapter:
        return found | {"base_model_relation": "adapter"}
    began = start.hub or finetuned_from is not None or (start.how == "cut" and hub)
    return found | ({"base_model_relation": "finetune"} if began else {})


def _eval_results(
    results: Results, task: str, dataset: str | Sequence[str] | None, dataset_args: str | Sequence[str] | None
) -> list[EvalResult]:
    split, scores = split_scores(results)
    asked = _list(dataset)
    name = asked[0] if asked else one_line(source_name(results.data) or "unknown")
    kind = name if asked or results.data.hub else re.sub(r"[^\w.-]+", "-", name.lower(), flags=re.ASCII).strip("-")
    config = next(iter(_list(dataset_args)), None)
    return [
        EvalResult(
            task_type=task, dataset_type=kind or "unknown", dataset_name=name, dataset_split=split,
            dataset_config=config, metric_type=metric, metric_value=value,
        )
        for metric, value in scores.items()
    ]  # fmt: skip


def _list(value: str | Sequence[str] | None) -> list[str]:
    """What a script hands on from its own settings, each on one line and of a path the last part."""
    given = [value] if isinstance(value, str) else value or []
    return [one_line(local_name(item) if is_local(item) else without_paths(item)) for item in given if item]


# ---- Text ----


def _title(results: Results, name: str | None) -> str:
    if name:
        return name
    student, teachers = models_of(results).student, [one.name for one in models_of(results).all_teachers if one.name]
    taught = f", distilled from {' and '.join(teachers)}" if teachers else ""
    return f"{student.architecture or 'An image classifier'} of {millions(student.parameters)} parameters{taught}"


def _usage(results: Results, model_id: str | None) -> Markdown:
    where, student = json.dumps(model_id or "path/to/this/folder"), models_of(results).student
    if is_headless(results) and not student.saved_as_adapter:
        return fenced(
            "from transformers import AutoModel, pipeline\n\n"
            f"extractor = pipeline({json.dumps(FEATURES)}, model={where})\n"
            'features = extractor("an_image.png", return_tensors=True)  # the last hidden state\n'
            f"model = AutoModel.from_pretrained({where})  # hf-kdtl train-teacher gives it a head", "python",
        )  # fmt: skip
    if not student.saved_as_adapter:
        return fenced(
            "from transformers import pipeline\n\n"
            f"classifier = pipeline({json.dumps(TASK)}, model={where})\n"
            'answers = classifier("an_image.png")\n'
            'print(answers[0])  # {"label": ..., "score": ...}', "python",
        )  # fmt: skip
    classes = len(results.data.classes) or student.num_labels
    base = json.dumps(student.start.name or "the base model")
    return fenced(
        "from peft import PeftModel\n"
        "from transformers import AutoModelForImageClassification\n\n"
        f"base = AutoModelForImageClassification.from_pretrained(\n    {base}, num_labels={classes}, "
        "ignore_mismatched_sizes=True\n)  # its head is replaced by the student's own\n"
        f"student = PeftModel.from_pretrained(base, {where})", "python",
    )  # fmt: skip


def pipeline_task(results: Results) -> str:
    """What the Hub calls what the student does: image-classification, or without a head image-feature-extraction."""
    return FEATURES if is_headless(results) else TASK


def write_card(folder: str | Path) -> Path:
    """Write README.md of a published example again, from its results.json."""
    path = Path(folder, "README.md")
    path.write_text(str(student_card(read_results(folder), model_name=Path(folder).resolve().name)), encoding="utf-8")
    return path
