"""What a search has tried: validation accuracy of every trial by step, those that were stopped early in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_kdtl.reports.figures.style import new_figure, save

TUNING = "tune.png"
Points = Sequence[Sequence[float]]


def tuning_figure(curves: Mapping[int, Points], finished: set[int], best: int, path: str | Path) -> None:
    """A line for each trial on its first seed.

    Args:
        curves: {trial: [[step, accuracy], ...]}; trial 0 is what was typed.
        finished: trials that were not stopped early.
        best: of these.
    """
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    for trial, points in curves.items():
        steps, scores = [point[0] for point in points], [100 * point[1] for point in points]
        width = 2.4 if trial in (0, best) else 1.0
        color = (
            "#0072B2" if trial == best else "#E69F00" if not trial else "#009E73" if trial in finished else "#BBBBBB"
        )
        label = f"best: trial {best}" if trial == best else "as typed: trial 0" if not trial else None
        axes.plot(steps, scores, color=color, linewidth=width, marker="o", markersize=3, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("optimizer step (grey: stopped early)")
    axes.set_ylabel("validation accuracy in %")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    save(figure, path, 130)
