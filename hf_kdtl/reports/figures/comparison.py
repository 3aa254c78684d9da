"""Differences between several runs, paired by seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hf_kdtl.evaluation.comparison import Arm, compare
from hf_kdtl.reports.figures.style import figure_label, new_figure, save
from hf_kdtl.reports.score_tables import is_share

COMPARISON = "comparison.png"


def comparison_figure(arms: Sequence[Arm], split: str, metrics: Sequence[str], path: str | Path) -> None:
    """The differences from the first arm: a ring for each seed, their mean, and its t interval where there is one."""
    found, first, names = compare(arms, split, metrics), arms[0], [figure_label(arm.name, 40) for arm in arms[1:]]
    figure = new_figure(2.2 + 3.6 * len(metrics), 1.6 + 0.45 * len(names))
    for axes, (metric, differences) in zip(
        np.atleast_1d(figure.subplots(1, len(metrics))), found.items(), strict=True
    ):
        scale = 100 if is_share(metric) else 1
        for place, (arm, one) in enumerate(zip(arms[1:], differences, strict=True)):
            pairs = zip(arm.values(split, metric), first.values(split, metric), strict=True)
            seeds = [scale * (a - b) for a, b in pairs]
            axes.plot(seeds, [place - 0.15] * len(seeds), "o", mfc="none", color="#7f7f7f", markersize=5)
            axes.plot(scale * one["mean"], place, "D", color="#0072B2", markersize=6)
            if one["interval"] is not None:
                axes.plot([scale * bound for bound in one["interval"]], [place] * 2, color="#0072B2", linewidth=2)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), names if axes is figure.axes[0] else [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(
            f"{metric}, difference from\n{figure_label(first.name, 40)}{' (points)' if scale == 100 else ''}"
        )
    save(figure, path, 130)
