"""report.md, made from results.json alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from hf_kdtl.evaluation.records import HEADLINES, EvaluatedModel, Evaluation, History, Results
from hf_kdtl.evaluation.results import load_results
from hf_kdtl.evaluation.statistics import mean_and_std
from hf_kdtl.reports.embedding import embedding_lines
from hf_kdtl.reports.evaluation_sections import sections
from hf_kdtl.reports.evaluation_summary import first_screen
from hf_kdtl.reports.evaluation_values import sizes_text
from hf_kdtl.reports.export_section import export_section
from hf_kdtl.reports.figures.arms import ARMS_FIGURE, arms_figure
from hf_kdtl.reports.figures.curves import CURVES, curves_figure
from hf_kdtl.reports.figures.gradient_rule import GRADIENT_RULE, gradient_rule_figure
from hf_kdtl.reports.figures.layer_rates import LAYER_RATES, layer_rates_figure
from hf_kdtl.reports.figures.patches import PATCHES
from hf_kdtl.reports.figures.saliency import ATTENTION_SHEET, GRADIENT_SHEET
from hf_kdtl.reports.figures.samples import SHEET
from hf_kdtl.reports.html import write_html
from hf_kdtl.reports.score_tables import is_share, scores_note, scores_table
from hf_kdtl.utils.text import escape_markdown, markdown_table

EVALUATION = "evaluate_student"
"""What results.json calls an evaluation; one of embeddings has the section `embedding` alone."""
ARMS = {
    "teacher": "teacher",
    "alone": "student alone",
    "labelled": "distilled, labelled images only",
    "distilled": "student distilled",
}


def write_report(folder: str | Path) -> Path:
    """Write report.md, report.html and figures, all from results.json, into a run folder; return report.md's path.

    Raises:
        FileNotFoundError, ValueError: as `load_results`.
    """
    folder = Path(folder)
    results = load_results(folder)
    if results.curves:
        curves_figure(results.curves, folder / CURVES)
    if (rates := first_with_history(results.layer_rates)) is not None:
        options = rates[1].options
        layer_rates_figure(rates[1].history, folder / LAYER_RATES, (options["r_min"], options["r_max"]))
    if (conflicts := first_with_history(results.gradient_rule)) is not None:
        gradient_rule_figure(conflicts[1].history, folder / GRADIENT_RULE)
    if results.comparison:
        arms_figure(results.evaluation.models, arm_names(results.evaluation), folder / ARMS_FIGURE)
    report = folder / "report.md"
    figures = [
        name for name in (ARMS_FIGURE, CURVES, LAYER_RATES, GRADIENT_RULE, PATCHES, SHEET) if (folder / name).exists()
    ]
    details = sections(results.evaluation, folder) if results.is_evaluation else []
    report.write_text(markdown(results, figures, details), "utf-8")
    write_html(report)
    return report


def markdown(results: Results, figures: Sequence[str] = (), details: Sequence[str] = ()) -> str:
    """The report as text. A section that the results do not have is left out; `details` are lines of an evaluation."""
    data, run, evaluation = results.data, results.run, results.evaluation
    source = escape_markdown(data.source or "unknown data")
    if results.is_evaluation:
        lines = [f"# Evaluation on {source}", "", *first_screen(evaluation, run.device), *details]
    else:
        title = "Evaluation" if run.recipe == EVALUATION else run.recipe or "run"
        lines = [f"# {title} on {source}", ""]
        if evaluation.models:
            lines += [table(evaluation), "", note(results), "", *_more_scores(evaluation)]
    if sentence := difference(results):
        lines += [sentence, ""]
    lines += embedding_lines(results)
    lines += _figures(results, figures)
    if results.export is not None:
        lines += export_section(results.export)
    if results.objectives:
        lines += ["## Objectives", "", objectives_table(results), ""]
    for name, rows in results.stages.items():
        about = [f"stage {row['stage']}, {row['steps']} steps: {row['kept']}" for row in rows]
        lines += _list(f"Stages of {name}", about)
    models = [f"{who}: {what}" for who, what in results.pairing.items() if who != "notes"]
    lines += _list("Models", models + results.pairing.get("notes", []))
    lines += _list("Data", [f"images: {sizes_text(data)}"] * bool(data.sizes) + data.notes)
    facts = asdict(run)
    if settings := {name: value for name, value in (facts | facts.pop("extra")).items() if value}:
        shown = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        lines += ["## Run", "", "```yaml", shown.strip(), "```", ""]
    return "\n".join(lines)


def _figures(results: Results, figures: Sequence[str]) -> list[str]:
    evaluation, shown = results.evaluation, []
    if ARMS_FIGURE in figures:
        shown.append(("test accuracy of each arm", ARMS_FIGURE, ""))
    if CURVES in figures:
        shown.append(("learning curves", CURVES, ""))
    if LAYER_RATES in figures and (rates := first_with_history(results.layer_rates)) is not None:
        shown.append(("learning rate multipliers and discrepancies by layer", LAYER_RATES, rates_note(*rates)))
    if GRADIENT_RULE in figures and (conflicts := first_with_history(results.gradient_rule)) is not None:
        shown.append(("conflicts between task and transfer gradients", GRADIENT_RULE, conflict_note(*conflicts)))
    if PATCHES in figures:
        about = "Each model's own principal components: compare shapes, not colors."
        shown.append(("patch features as colors", PATCHES, about))
    if SHEET in figures:
        shown.append(("images with the probabilities of teacher and student", SHEET, evaluation.sheet))
    if evaluation.attention:
        shown.append(("attention of teacher and student", ATTENTION_SHEET, evaluation.attention))
    if evaluation.gradients:
        shown.append(("input saliency of teacher and student", GRADIENT_SHEET, evaluation.gradients))
    return [line for what, file, text in shown for line in (f"![{what}]({file})", "", *([text, ""] if text else []))]


def table(evaluation: Evaluation) -> str:
    """A row for each model: accuracy on validation and test (mean and standard deviation over seeds), size, speed."""
    word = HEADLINES[evaluation.headline]
    header = ["", f"validation {word}", f"test {word}", "seeds", "parameters", "images/s"]
    rows, names = [], arm_names(evaluation)
    for arm, model in evaluation.models.items():
        accuracy = [_accuracy(model, split) for split in SPLITS]
        seeds = "-" if arm.split()[0] == "teacher" else str(len(model.runs))
        size = "-" if model.parameters is None else f"{model.parameters:,}"
        speed = "-" if model.images_per_second is None else f"{model.images_per_second:,.0f}"
        rows.append([escape_markdown(names[arm]), *accuracy, seeds, size, speed])
    return markdown_table([header, *rows])


SPLITS = ("validation", "test")


def note(results: Results) -> str:
    """What the table's columns mean."""
    several = any(len(model.runs) > 1 for model in results.evaluation.models.values())
    word = HEADLINES[results.evaluation.headline]
    first = (
        f"{word[0].upper() if word == 'accuracy' else word[0]}{word[1:]}: mean ± standard deviation over seeds. "
        if several
        else ""
    )
    if several and results.evaluation.student_seed is not None:
        first += (
            f"The student that is kept is that of seed {results.evaluation.student_seed}, the best on validation. "
        )
    where = results.run.device or "this machine"
    return f"{first}Images/s: forward pass at batch size {results.evaluation.batch_size} on {where}."


def arm_names(evaluation: Evaluation) -> dict[str, str]:
    """What the models of a training are called in its report."""
    names = {arm: ARMS.get(arm, arm) for arm in evaluation.models}
    return names | {"distilled": "distilled, with unlabelled images"} if "labelled" in names else names


def difference(results: Results) -> str:
    """The paired differences between the arms in a sentence each; empty when there is one arm."""
    lines, names = [], arm_names(results.evaluation)
    for found in results.comparison:
        a, b = (names.get(arm, arm).removeprefix("student ") for arm in (found.a, found.b))
        scale, unit = (100, " points") if is_share(found.metric) else (1, "")
        text = f"{a.capitalize()} minus {b}, {found.split} {found.metric}, paired by seed"
        text += f": {scale * found.mean:+.2f}{unit}"
        if found.low is None or found.high is None:
            lines.append(f"{text} ({found.note}).")
            continue
        low, high = scale * found.low, scale * found.high
        verdict = "above 0" if low > 0 else "below 0" if high < 0 else "contains 0: no difference shown"
        lines.append(f"{text}, {found.note} [{low:+.2f}, {high:+.2f}] ({verdict}).")
    return "\n\n".join(lines)


def first_with_history(runs: dict[str, History]) -> tuple[str, History] | None:
    """(name, record) of the first run that measured layer rates or gradient conflicts."""
    return next(((name, found) for name, found in runs.items() if found.history), None)


def rates_note(name: str, rates: History) -> str:
    """What the figure of the layers' rates shows."""
    options, last = rates.options, rates.history[-1]["multipliers"]
    found = ", ".join(f"{m:.2f}" for m in last)
    of = options["source"] + (f" by {options['wrt']}" if options["source"] != "attention" else "")
    return (
        f"Multipliers of the layers' learning rates in {escape_markdown(name)} (mode {options['mode']}, {of}), and "
        "the "
        f"discrepancies between student and teacher that they follow. At the end, from the first block to the last: "
        f"{found}."
    )


def conflict_note(name: str, found: History) -> str:
    """What the figure of the rule's conflicts shows, and what the rule does not guarantee."""
    rule = ", ".join(f"{key} {value}" for key, value in found.options.items() if value is not None)
    removed = [entry["removed"] for entry in found.history if entry["removed"] is not None]
    against = [entry["task_step"] for entry in found.history if entry["task_step"] is not None]
    worse = sum(step < 0 for step in against)
    return (
        f"Gradients of task and transfer in {escape_markdown(name)} (gradient_rule {rule}): the cosine between them "
        "by "
        f"layer, and the share of the transfer gradient that the rule removed, {fmean(removed or [0.0]):.0%} on "
        "average. "
        "The guarantee holds for the gradient that the optimizer gets, not for its step: of the "
        f"{len(against)} steps that were measured {worse} went against the task's gradient."
    )


def objectives_table(results: Results) -> str:
    """One row for each term of the loss."""
    rows = [["name", "weight", "options"]]
    for entry in results.objectives:
        options = {key: value for key, value in entry.items() if key not in ("name", "weight")}
        text = escape_markdown(", ".join(f"{key} {value}" for key, value in options.items())) or "-"
        rows.append([entry["name"], escape_markdown(weight_text(entry, results)), text])
    return markdown_table(rows)


def weight_text(entry: dict[str, Any], results: Results) -> str:
    """An entry's weight; where it is auto, with what the runs measured.

    >>> weight_text({"name": "logit_kd", "weight": 0.9}, Results())
    '0.9'
    """
    weight, key = entry.get("weight", 1.0), entry.get("key", entry["name"])
    if isinstance(weight, int | float):
        return str(weight)
    asked = weight if isinstance(weight, str) else ", ".join(f"{name} x {ratio}" for name, ratio in weight.items())
    found = [run.terms[key].weight for run in results.auto_weights.values() if key in run.terms]
    ends = [f"{end:.3g}" for end in (min(found), max(found))] if found else []
    return f"{asked}: {' to '.join(dict.fromkeys(ends)) or 'not measured'}"


def _accuracy(model: EvaluatedModel, split: str) -> str:
    values = [run.get(split, {}).get(model.headline) for run in model.runs.values()]
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    mean, sd = mean_and_std(known)
    return f"{100 * mean:.1f} %" if sd is None else f"{100 * mean:.1f} ± {100 * sd:.1f} %"


def _more_scores(evaluation: Evaluation) -> list[str]:
    """What a test accuracy does not say."""
    runs = {
        arm_names(evaluation)[arm]: [run.get("test", {}) for run in model.runs.values()]
        for arm, model in evaluation.models.items()
    }
    if not any(set(scores) - {*HEADLINES} for found in runs.values() for scores in found):
        return []
    return [f"On test, beyond {HEADLINES[evaluation.headline]}:", "", scores_table(runs), "", scores_note(runs), ""]


def _list(title: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    return [f"## {title}", "", *(f"- {item}" for item in map(escape_markdown, items)), ""]
