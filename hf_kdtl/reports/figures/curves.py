"""Learning curves of a run: training loss and validation accuracy by optimizer step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_kdtl.reports.figures.style import COLORS, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes


CURVES = "curves.png"


SHOWN = {"loss": "training loss (of each arm's own terms)", "eval_accuracy": "validation accuracy",
         "eval_map": "validation mAP", "eval_knn": "kNN accuracy"}  # fmt: skip


def curves_figure(curves: dict[str, list[dict[str, Any]]], path: str | Path) -> bool:
    """Training loss and validation accuracy by step, from {"<arm>-seed<k>": Trainer's log}.

    One thin line for each run, and a thick one for the mean over the seeds of an arm; dotted where the student was
    cut again. What was logged at fewer than two steps is no curve and gets no panel.

    Returns:
        Whether there was a curve to draw.
    """
    steps = {key: {e["step"] for log in curves.values() for e in log if e.get(key) is not None} for key in SHOWN}
    shown = {key: label for key, label in SHOWN.items() if len(steps[key]) > 1}
    if not shown:
        return False
    figure = new_figure(8.6 if len(shown) > 1 else 5.2, 3.6)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (key, label) in zip(panels, shown.items(), strict=True):
        arms: dict[str, list[dict[int, float]]] = {}
        for run, log in curves.items():
            points = {entry["step"]: entry[key] for entry in log if entry.get(key) is not None}
            arms.setdefault(run.split("-seed")[0], []).append(points)
        for arm, runs in arms.items():
            _arm(axes, arm, [points for points in runs if points])
        for step in sorted({step for log in curves.values() for step in _cuts(log)}):
            axes.axvline(step, color="#999999", linestyle=":", linewidth=1)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    save(figure, path, 110)
    return True


def _cuts(log: list[dict[str, Any]]) -> list[int]:
    """The last step of each stage but the last."""
    ends = {entry["stage"]: entry["step"] for entry in log if "stage" in entry}
    return [step for stage, step in ends.items() if stage < max(ends)]


def _arm(axes: Axes, arm: str, runs: list[dict[int, float]]) -> None:
    if not runs:
        return
    colour = COLORS.get(arm, "#009E73")
    for points in runs if len(runs) > 1 else ():
        axes.plot(list(points), list(points.values()), color=colour, alpha=0.35, linewidth=0.8)
    steps = sorted(set.intersection(*(set(points) for points in runs)))
    label = f"{arm} (mean of {len(runs)} seeds)" if len(runs) > 1 else arm
    means = [float(np.mean([points[step] for points in runs])) for step in steps]
    axes.plot(steps, means, color=colour, linewidth=2, label=label, marker="o" if len(steps) == 1 else None)
