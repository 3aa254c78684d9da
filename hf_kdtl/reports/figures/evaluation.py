"""Pictures of an evaluation: calibration, degraded images, classes. Drawn from results.json's section alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from hf_kdtl.reports.evaluation_values import Model, class_accuracies, overconfidence
from hf_kdtl.reports.figures.run import COLOURS, figure_of
from hf_kdtl.utils.text import drawn

MOST_CLASSES = 24  # in a picture


def colours(models: dict[str, Model]) -> dict[str, str]:
    """A colour for each model: that of its role, and others for further students."""
    more = iter(["#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"] * len(models))
    own = {"teacher": COLOURS["teacher"], "baseline": COLOURS["alone"]}
    return {name: own.get(model["role"]) or next(more) for name, model in models.items()}


def reliability_picture(models: dict[str, Model], path: str | Path) -> None:
    """For each model accuracy by confidence, in the bins of ECE, and below how many images each bin has."""
    figure = figure_of(0.6 + 2.9 * len(models), 4.4)
    rows = figure.subplots(2, len(models), squeeze=False, sharex=True, sharey="row", height_ratios=[3, 1])
    for (name, model), colour, above, below in zip(models.items(), colours(models).values(), *rows, strict=True):
        bins = [one for one in model["reliability"] if one["images"]]
        places, width = [(one["from"] + one["to"]) / 2 for one in bins], 0.9 / len(model["reliability"])
        above.bar(places, [one["accuracy"] for one in bins], width=width, color=colour)
        above.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
        above.set(xlim=(0, 1), ylim=(0, 1), title=drawn(name, 30))
        off = overconfidence(model)
        verdict = f"claims {100 * abs(off):.1f} points\n{'more' if off > 0 else 'less'} than it holds"
        above.text(0.04, 0.97, verdict, va="top", fontsize=8)
        total = sum(one["images"] for one in bins)
        below.bar(places, [one["images"] / total for one in bins], width=width, color=colour)
        below.set_xlabel("confidence")
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
    rows[0][0].set_ylabel("share that is right\n(dashed: as claimed)")
    rows[1][0].set_ylabel("share of\nimages")
    figure.savefig(path, dpi=130)


def degradations_picture(models: dict[str, Model], severities: Sequence[int], path: str | Path) -> None:
    """Accuracy against severity, 0 being the image as it is: a panel for each degradation, and the mean of all."""
    shown = {name: model["degraded"] for name, model in models.items()}
    names = [name for name in next(iter(shown.values())) if name != "clean"]
    panels = [*names, "mean of all"] if len(names) > 1 else names
    columns = min(5, len(panels))
    rows = -(-len(panels) // columns)
    figure = figure_of(1 + 2.2 * columns, 0.8 + 2.1 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, panel in zip(grid, panels, strict=False):
        for (name, found), colour in zip(shown.items(), colours(models).values(), strict=True):
            values = found.get(panel) or [fmean(found[n][i] for n in names) for i in range(len(severities))]
            line = [found["clean"], *values]
            axes.plot(
                [0, *severities], [100 * v for v in line], "o-", color=colour, markersize=3, label=drawn(name, 30)
            )
        axes.set_title(panel.replace("_", " "), fontsize=9, fontweight="bold" if panel not in names else "normal")
        axes.set(xticks=[0, *severities], ylim=(0, 100))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.supxlabel("severity (0: the image as it is)", fontsize=10)
    figure.supylabel("accuracy (%)", fontsize=10)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(models), frameon=False)
    figure.savefig(path, dpi=130)


def classes_picture(model: Model, others: dict[str, Model], path: str | Path) -> str:
    """Each class's accuracy minus that of the others ({role: model}), worst first; returns which classes it shows."""
    mine = class_accuracies(model)
    changes = {
        role: {name: 100 * (mine[name][0] - its[name][0]) for name in mine}
        for role, its in ((role, class_accuracies(other)) for role, other in others.items())
    }
    some = min(MOST_CLASSES, len(mine))
    figure = figure_of(1.6 + 3.6 * len(changes), 1 + 0.24 * some)
    for axes, (role, change) in zip(
        figure.subplots(1, len(changes), squeeze=False, sharex=True)[0], changes.items(), strict=True
    ):
        order = sorted(change, key=lambda name: change[name])
        _bars(axes, {name: change[name] for name in ends(order, some)}, role)
    figure.savefig(path, dpi=130)
    if some == len(mine):
        return "All classes that have images."
    return f"The {some // 2} classes that lose most and the {some - some // 2} that gain most, of {len(mine)}."


def ends(items: Sequence[str], most: int) -> list[str]:
    """The first and the last of a list, `most` in all."""
    return list(items) if len(items) <= most else [*items[: most // 2], *items[most // 2 - most :]]


def _bars(axes: Axes, change: dict[str, float], role: str) -> None:
    places, values = range(len(change)), list(change.values())
    axes.barh(places, values, color=["#D55E00" if value < 0 else "#0072B2" for value in values])
    axes.axvline(0, color="black", linewidth=0.8)
    for place, value in zip(places, values, strict=True):
        side = "right" if value < 0 else "left"
        axes.annotate(f"{value:+.1f}", (value, place), (-3 if value < 0 else 3, 0), textcoords="offset points",
                      ha=side, va="center", fontsize=7)  # fmt: skip
    axes.set_yticks(places, [drawn(name, 18) for name in change], fontsize=8)
    axes.set_ylim(len(change) - 0.4, -0.6)
    axes.margins(x=0.18)
    axes.set_xlabel(f"student minus {role},\npoints of the class's accuracy")
    axes.spines[["top", "right"]].set_visible(False)


def confusion_picture(model: Model, other: Model, role: str, path: str | Path) -> str:
    """Which classes are taken for which more or less often than by another model, red where that is worse; returns
    which classes it shows."""
    names = list(class_accuracies(model))
    change = 100 * (_shares(model, names) - _shares(other, names))
    moved = np.abs(change).sum(1)
    chosen = sorted(np.argsort(-moved, kind="stable")[:MOST_CLASSES].tolist())
    shown = change[np.ix_(chosen, chosen)]
    figure = figure_of(2.4 + 0.36 * len(chosen), 1.8 + 0.33 * len(chosen))
    axes = figure.subplots()
    most = max(1.0, float(np.abs(shown).max()))
    worse = np.where(np.eye(len(chosen), dtype=bool), -shown, shown)  # less often right, or a mistake more often
    image = axes.imshow(worse, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
    ticks = [drawn(names[i]) for i in chosen]
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
    figure.savefig(path, dpi=130)
    return "" if len(chosen) == len(names) else f"The {len(chosen)} classes that changed most, of {len(names)}."


def _shares(model: Model, names: Sequence[str]) -> np.ndarray:
    """(K, K): of the images of the class of a row, the share that is taken for that of a column."""
    rows: dict[str, Any] = model["confusion"]
    counts = np.array([[rows[i].get(j, 0) for j in names] for i in names], dtype=float)
    return counts / np.array([sum(rows[i].values()) for i in names])[:, None]
