"""Learning curves of a run: training loss and validation accuracy by optimizer step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_kdtl.reports.figures.style import COLORS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


CURVES = "curves.png"


def curves_figure(curves: dict[str, list[dict[str, Any]]], path: str | Path) -> None:
    """Training loss and validation accuracy by step, from {"<arm>-seed<k>": Trainer's log}.

    One thin line for each run, and a thick one for the mean over the seeds of an arm.
    """
    figure = new_figure(9, 3.6)
    shown = (("loss", "training loss (of each arm's own terms)"), ("eval_accuracy", "validation accuracy"))
    for axes, (key, label) in zip(figure.subplots(1, 2), shown, strict=True):
        arms: dict[str, list[dict[int, float]]] = {}
        for run, log in curves.items():
            points = {entry["step"]: entry[key] for entry in log if entry.get(key) is not None}
            arms.setdefault(run.split("-seed")[0], []).append(points)
        for arm, runs in arms.items():
            _arm(axes, arm, [points for points in runs if points])
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


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
