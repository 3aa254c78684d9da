"""report.md, made from results.json alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from hf_kdtl.evaluation.results import read_results
from hf_kdtl.evaluation.statistics import mean_and_std
from hf_kdtl.reports.evaluation_sections import sections
from hf_kdtl.reports.evaluation_summary import first_screen
from hf_kdtl.reports.figures.curves import CURVES, curves_figure
from hf_kdtl.reports.figures.gradient_rule import GRADIENT_RULE, gradient_rule_figure
from hf_kdtl.reports.figures.layer_rates import LAYER_RATES, layer_rates_figure
from hf_kdtl.reports.figures.saliency import ATTENTION_SHEET, GRADIENT_SHEET
from hf_kdtl.reports.figures.samples import SHEET
from hf_kdtl.reports.score_tables import scores_note, scores_table
from hf_kdtl.utils.text import escape_markdown, markdown_table

ARMS = {"teacher": "teacher", "alone": "student alone", "distilled": "student distilled"}


def write_report(folder: str | Path) -> Path:
    """Write report.md and the pictures that results.json is enough for into a run folder; return the report's path.

    Raises:
        FileNotFoundError, ValueError: as `read_results`.
    """
    folder = Path(folder)
    results = read_results(folder)
    if results.get("curves"):
        curves_figure(results["curves"], folder / CURVES)
    if (shown := shown_rates(results)) is not None:
        options = shown[1]["options"]
        layer_rates_figure(shown[1]["history"], folder / LAYER_RATES, (options["r_min"], options["r_max"]))
    if (met := shown_conflicts(results)) is not None:
        gradient_rule_figure(met[1]["history"], folder / GRADIENT_RULE)
    report = folder / "report.md"
    pictures = [p for p in (CURVES, LAYER_RATES, GRADIENT_RULE, SHEET) if (folder / p).exists()]
    details = sections(results["evaluation"], folder) if is_evaluation(results) else []
    report.write_text(markdown(results, pictures, details), "utf-8")
    return report


def is_evaluation(results: dict[str, Any]) -> bool:
    """Whether these are the results of hf-kdtl evaluate, and not of a training."""
    return "split" in results.get("evaluation", {})


def markdown(results: dict[str, Any], pictures: Sequence[str] = (), details: Sequence[str] = ()) -> str:
    """The report as text. A section that the results do not have is left out; `details` are lines of an evaluation."""
    data, run = results.get("data", {}), results.get("run", {})
    evaluation, pairing = results.get("evaluation", {}), results.get("pairing", {})
    source = escape_markdown(data.get("source", "unknown data"))
    if is_evaluation(results):
        lines = [f"# May it ship? Evaluated on {source}", "", *first_screen(evaluation, run["device"]), *details]
    else:
        lines = [f"# {run.get('recipe', 'run')} on {source}", ""]
        if evaluation.get("models"):
            lines += [table(results), "", note(results), "", *_more_scores(evaluation)]
    if sentence := difference(results):
        lines += [sentence, ""]
    if CURVES in pictures:
        lines += [f"![learning curves]({CURVES})", ""]
    if LAYER_RATES in pictures and (shown := shown_rates(results)) is not None:
        lines += [f"![how fast each layer learned, and how far it was]({LAYER_RATES})", "", rates_note(*shown), ""]
    if GRADIENT_RULE in pictures and (met := shown_conflicts(results)) is not None:
        lines += [f"![where task and transfer work against each other]({GRADIENT_RULE})", "", conflict_note(*met), ""]
    if SHEET in pictures:
        lines += [f"![images with the probabilities of teacher and student]({SHEET})", "", evaluation["sheet"], ""]
    if "attention" in evaluation:
        lines += [f"![where teacher and student look]({ATTENTION_SHEET})", "", evaluation["attention"], ""]
    if "gradients" in evaluation:
        lines += [f"![which pixels move teacher and student]({GRADIENT_SHEET})", "", evaluation["gradients"], ""]
    if results.get("objectives"):
        lines += ["## Objectives", "", objectives_table(results["objectives"]), ""]
    models = [f"{who}: {what}" for who, what in pairing.items() if who != "notes"]
    lines += _list("Models", models + pairing.get("notes", []))
    sizes = ", ".join(f"{count} {name}" for name, count in data.get("sizes", {}).items())
    lines += _list("Data", [f"images: {sizes}"] * bool(sizes) + data.get("notes", []))
    if run:
        settings = yaml.safe_dump(run, sort_keys=False, allow_unicode=True)
        lines += ["## Run", "", "```yaml", settings.strip(), "```", ""]
    return "\n".join(lines)


def table(results: dict[str, Any]) -> str:
    """A row for each model: accuracy on validation and test (mean and standard deviation over seeds), size, speed."""
    evaluation = results["evaluation"]
    header = ["", "validation accuracy", "test accuracy", "seeds", "parameters", "images/s"]
    rows = []
    for arm, model in evaluation["models"].items():
        accuracy = [_percent([run[split]["accuracy"] for run in model["runs"].values()]) for split in SPLITS]
        seeds = str(len(model["runs"])) if arm in ("alone", "distilled") else "-"
        speed = f"{model['images_per_second']:,.0f}"
        rows.append([ARMS.get(arm, arm), *accuracy, seeds, f"{model['parameters']:,}", speed])
    return markdown_table([header, *rows])


SPLITS = ("validation", "test")


def note(results: dict[str, Any]) -> str:
    """What the table's columns mean."""
    evaluation, run = results["evaluation"], results.get("run", {})
    several = any(len(model["runs"]) > 1 for model in evaluation["models"].values())
    first = "Accuracy: mean ± standard deviation over seeds. " if several else ""
    size = evaluation["batch_size"]
    return f"{first}Images/s: forward pass at batch size {size} on {run.get('device', 'this machine')}."


def difference(results: dict[str, Any]) -> str:
    """The paired differences of the two arms in a sentence each; empty when there is one arm."""
    found = results.get("evaluation", {}).get("paired_difference", {})
    lines = []
    for split, value in found.items():
        text = f"Distilled minus alone, {split} accuracy, paired by seed: {100 * value['mean']:+.2f} points"
        if value["interval"] is None:
            lines.append(f"{text} ({value['note']}).")
            continue
        low, high = (100 * bound for bound in value["interval"])
        verdict = "above 0" if low > 0 else "below 0" if high < 0 else "holds 0: no difference was shown"
        lines.append(f"{text}, {value['note']} [{low:+.2f}, {high:+.2f}] ({verdict}).")
    return "\n".join(lines)


def shown_rates(results: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(name, layer rates) of the first run that measured any."""
    runs = results.get("layer_rates", {}).items()
    return next(((name, rates) for name, rates in runs if rates["history"]), None)


def rates_note(name: str, rates: dict[str, Any]) -> str:
    """What the picture of the layers' rates shows."""
    options, last = rates["options"], rates["history"][-1]["multipliers"]
    found = ", ".join(f"{m:.2f}" for m in last)
    of = options["source"] + (f" by {options['wrt']}" if options["source"] != "attention" else "")
    return (
        f"Multipliers of the layers' learning rates in {name} (mode {options['mode']}, {of}), and the discrepancies "
        f"between student and teacher that they follow. At the end, from the first block to the last: {found}."
    )


def shown_conflicts(results: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(name, history of the gradient rule) of the first run that has one."""
    runs = results.get("gradient_rule", {}).items()
    return next(((name, found) for name, found in runs if found["history"]), None)


def conflict_note(name: str, found: dict[str, Any]) -> str:
    """What the picture of the rule's conflicts shows, and what the rule does not promise."""
    rule = ", ".join(f"{key} {value}" for key, value in found["options"].items() if value is not None)
    history = found["history"]
    removed = [entry["removed"] for entry in history if entry["removed"] is not None]
    against = [entry["task_step"] for entry in history if entry["task_step"] is not None]
    worse = sum(step < 0 for step in against)
    return (
        f"Gradients of task and transfer in {name} (gradient_rule {rule}): the cosine between them layer by layer, "
        f"and the share of the transfer gradient that the rule took out, {fmean(removed or [0.0]):.0%} in the mean. "
        "What is promised is the gradient that the optimizer gets, not its step: of the "
        f"{len(against)} steps that were measured {worse} went against the task's gradient."
    )


def objectives_table(objectives: list[dict[str, Any]]) -> str:
    """One row for each term of the loss."""
    rows = [["name", "weight", "options"]]
    for entry in objectives:
        options = {key: value for key, value in entry.items() if key not in ("name", "weight")}
        text = escape_markdown(", ".join(f"{key} {value}" for key, value in options.items())) or "-"
        rows.append([entry["name"], str(entry.get("weight", 1.0)), text])
    return markdown_table(rows)


def _percent(values: list[float]) -> str:
    mean, sd = mean_and_std(values)
    return f"{100 * mean:.1f} %" if sd is None else f"{100 * mean:.1f} ± {100 * sd:.1f} %"


def _more_scores(evaluation: dict[str, Any]) -> list[str]:
    """What a test accuracy does not say."""
    runs = {ARMS.get(arm, arm): [run["test"] for run in m["runs"].values()] for arm, m in evaluation["models"].items()}
    if all(set(scores) == {"accuracy"} for found in runs.values() for scores in found):
        return []
    return ["On test, beyond accuracy:", "", scores_table(runs), "", scores_note(runs), ""]


def _list(title: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    return [f"## {title}", "", *(f"- {item}" for item in map(escape_markdown, items)), ""]
