"""Arms of a table compared: at their chosen weight, paired by seed, with Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from hf_kdtl.evaluation.statistics import holm, mean_and_std, paired_difference
from hf_kdtl.utils.text import markdown_table

Lines = list[dict[str, Any]]


class ArmRuns(NamedTuple):
    """The runs of an arm at its chosen weight."""

    setting: str
    arm: str
    weight: float
    test: dict[int, float]  # seed -> per cent


def arm_runs(lines: Lines) -> list[ArmRuns]:
    """The runs of every arm in every setting, at the weight with the best mean validation of its first two seeds."""
    found: dict[tuple[str, str], Lines] = {}
    for line in lines:
        found.setdefault((line["setting"], line["arm"]), []).append(line)
    return [_at_chosen(setting, arm, runs) for (setting, arm), runs in found.items()]


def _at_chosen(setting: str, arm: str, runs: Lines) -> ArmRuns:
    first = sorted({run["seed"] for run in runs})[:2]
    weights = sorted({run["weight"] for run in runs})

    def validation(weight: float) -> float:
        return fmean(r["validation"] for r in runs if r["weight"] == weight and r["seed"] in first)

    chosen = max(weights, key=validation)
    return ArmRuns(setting, arm, chosen, {r["seed"]: 100 * r["test"] for r in runs if r["weight"] == chosen})


def comparison_table(runs: Sequence[ArmRuns], references: dict[str, str]) -> str:
    """Markdown: each arm's mean, spread and paired difference to the reference arm of its setting, Holm over all.

    Args:
        references: {setting: "setting/arm"} that the setting's other arms are compared with.
    """
    by_name = {f"{run.setting}/{run.arm}": run for run in runs}
    rows: list[list[str]] = []
    differences = {name: _difference(run, by_name.get(references[run.setting])) for name, run in by_name.items()}
    tested = {name: found["p_value"] for name, found in differences.items() if found and found["p_value"] is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True)) if tested else {}
    for name, run in by_name.items():
        mean, sd = mean_and_std(list(run.test.values()))
        cells = [run.setting, run.arm, f"{run.weight:g}", str(len(run.test)), f"{mean:.2f}"]
        cells.append("" if sd is None else f"{sd:.2f}")
        is_reference = name == references[run.setting]
        rows.append(cells + _difference_cells(differences[name], corrected.get(name), is_reference))
    head = [
        "setting",
        "arm",
        "weight",
        "seeds",
        "test accuracy, %",
        "sd",
        "minus reference, 95 % interval",
        "p (Holm)",
    ]
    return markdown_table([head, *rows])


def _difference(run: ArmRuns, reference: ArmRuns | None) -> dict[str, Any] | None:
    if reference is None or reference is run:
        return None
    seeds = sorted(run.test.keys() & reference.test.keys())
    return paired_difference([run.test[s] for s in seeds], [reference.test[s] for s in seeds]) if seeds else None


def _difference_cells(found: dict[str, Any] | None, p_value: float | None, is_reference: bool) -> list[str]:
    if found is None:
        return ["reference" if is_reference else "", ""]
    if found["interval"] is None:
        return [f"{found['mean']:+.2f} ({found['note']})", ""]
    low, high = found["interval"]
    return [f"{found['mean']:+.2f} ({low:+.2f} to {high:+.2f})", "" if p_value is None else f"{p_value:.2g}"]


def against(runs: Sequence[ArmRuns], *arms: str) -> str:
    """A comparison table for each of the reference arms, within its setting."""
    return "\n\n".join(
        f"Reference `{arm}`:\n\n{comparison_table(runs, {run.setting: f'{run.setting}/{arm}' for run in runs})}"
        for arm in arms
    )


def curve_table(lines: Lines) -> str:
    """Mean accuracy on validation images after so many steps, of the runs at each arm's chosen weight."""
    rows: list[list[str]] = []
    for run in arm_runs(lines):
        taken = [line for line in lines if (line["arm"], line["weight"]) == (run.arm, run.weight)]
        marks = list(taken[0]["curve"])
        rows = rows or [["arm, after steps", *marks]]
        rows.append([run.arm, *(f"{100 * fmean(line['curve'][mark] for line in taken):.1f}" for mark in marks)])
    return f"Accuracy on validation images, %:\n\n{markdown_table(rows)}"
