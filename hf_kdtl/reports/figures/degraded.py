"""Accuracy on degraded images by severity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from hf_kdtl.evaluation.records import EvaluatedModel
from hf_kdtl.reports.figures.style import figure_label, model_colors, new_figure, save


def degradations_figure(models: dict[str, EvaluatedModel], severities: Sequence[int], path: str | Path) -> None:
    """Accuracy against severity, 0 being the image as it is: a panel for each degradation, and the mean of all."""
    shown = {name: model.by_degradation for name, model in models.items()}
    names = list(next(iter(shown.values())))
    panels = [*names, "mean of all"] if len(names) > 1 else names
    columns = min(5, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(1 + 2.2 * columns, 0.8 + 2.1 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        for (name, found), colour in zip(shown.items(), model_colors(models).values(), strict=True):
            values = found.get(panel) or [fmean(found[n][i] for n in names) for i in range(len(severities))]
            line = [models[name].clean_accuracy or 0.0, *values]
            axes.plot(
                [0, *severities],
                [100 * v for v in line],
                "o-",
                color=colour,
                markersize=3,
                label=figure_label(name, 30),
            )
        axes.set_title(panel.replace("_", " "), fontsize=9, fontweight="bold" if panel not in names else "normal")
        axes.set(xticks=[0, *severities], ylim=(0, 100))
        axes.grid(alpha=0.25)
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.supxlabel("severity (0: the image as it is)", fontsize=10)
    figure.supylabel("accuracy (%)", fontsize=10)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(models), frameon=False)
    save(figure, path, 130)
