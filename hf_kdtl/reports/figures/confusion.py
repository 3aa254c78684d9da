"""Change of the confusion matrix against another model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hf_kdtl.evaluation.records import EvaluatedModel
from hf_kdtl.reports.evaluation_values import class_accuracies
from hf_kdtl.reports.figures.classes import MOST_CLASSES
from hf_kdtl.reports.figures.style import figure_label, new_figure, save


def confusion_figure(model: EvaluatedModel, other: EvaluatedModel, role: str, path: str | Path) -> str:
    """Which classes are taken for which more or less often than by another model, red where that is worse; returns
    which classes it shows."""
    names = list(class_accuracies(model))
    change = 100 * (_shares(model, names) - _shares(other, names))
    moved = np.abs(change).sum(1)
    chosen = sorted(np.argsort(-moved, kind="stable")[:MOST_CLASSES].tolist())
    shown = change[np.ix_(chosen, chosen)]
    figure = new_figure(2.4 + 0.36 * len(chosen), 1.8 + 0.33 * len(chosen))
    axes = figure.subplots()
    most = max(1.0, float(np.abs(shown).max()))
    worse = np.where(np.eye(len(chosen), dtype=bool), -shown, shown)  # less often right, or a mistake more often
    image = axes.imshow(worse, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
    ticks = [figure_label(names[i]) for i in chosen]
    axes.set_xticks(range(len(chosen)), ticks, rotation=90, fontsize=8)
    axes.set_yticks(range(len(chosen)), ticks, fontsize=8)
    for (row, column), value in np.ndenumerate(shown):
        if abs(round(value)) >= 1:
            colour = "white" if abs(value) > 0.6 * most else "black"
            axes.text(column, row, f"{value:+.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set(xlabel="taken for", ylabel="true class")
    axes.set_title(f"student minus {role}, points of the class's images", fontsize=9)
    figure.colorbar(
        image, ax=axes, label="better (blue) or worse (red) by", shrink=0.8, format=lambda v, _: f"{abs(v):g}"
    )
    save(figure, path, 130)
    return "" if len(chosen) == len(names) else f"The {len(chosen)} classes that changed most, of {len(names)}."


def _shares(model: EvaluatedModel, names: Sequence[str]) -> np.ndarray:
    """(K, K): of the images of the class of a row, the share that is taken for that of a column."""
    rows = model.confusion
    counts = np.array([[rows[i].get(j, 0) for j in names] for i in names], dtype=float)
    return counts / np.array([sum(rows[i].values()) for i in names])[:, None]
