"""Pictures of a run: learning curves, and images with what teacher and student make of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from hf_kdtl.utils.text import drawn

CURVES = "curves.png"
SHEET = "sheet.png"
FIRST = (
    "Shown are the first images that the two classify differently, up to half of the sheet, and then the first of the "
    "others."
)
# Told apart by colour-blind eyes too (Okabe and Ito).
COLOURS = {"teacher": "#7f7f7f", "alone": "#E69F00", "distilled": "#0072B2"}


def curves_picture(curves: dict[str, list[dict[str, Any]]], path: str | Path) -> None:
    """Training loss and validation accuracy by step, from {"<arm>-seed<k>": Trainer's log}.

    One thin line for each run, and a thick one for the mean over the seeds of an arm.
    """
    figure = figure_of(9, 3.6)
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
    colour = COLOURS.get(arm, "#009E73")
    for points in runs if len(runs) > 1 else ():
        axes.plot(list(points), list(points.values()), color=colour, alpha=0.35, linewidth=0.8)
    steps = sorted(set.intersection(*(set(points) for points in runs)))
    label = f"{arm} (mean of {len(runs)} seeds)" if len(runs) > 1 else arm
    means = [float(np.mean([points[step] for points in runs])) for step in steps]
    axes.plot(steps, means, color=colour, linewidth=2, label=label, marker="o" if len(steps) == 1 else None)


def sheet_choice(teacher: np.ndarray, student: np.ndarray, count: int = 12) -> list[int]:
    """Which images to show: the first that the two classify differently, up to half; then the first of the others.

    Args:
        teacher, student: logits or probabilities (n, K) in one class order.
    """
    differ = teacher.argmax(1) != student.argmax(1)
    chosen = np.flatnonzero(differ)[: count // 2].tolist()
    return chosen + np.flatnonzero(~differ)[: count - len(chosen)].tolist()


def sheet_picture(
    path: str | Path,
    images: Sequence[Any],
    labels: Sequence[int],
    names: Sequence[str],
    teacher: np.ndarray,
    student: np.ndarray,
    which: str = FIRST,
) -> str:
    """A grid of images, each beside the probabilities of its three likeliest classes; returns the caption.

    Args:
        images: PIL images.
        labels: their classes.
        teacher, student: probabilities (n, K), row i for image i.
        which: a sentence on how the images were chosen; by default as by `sheet_choice`.
    """
    columns = min(3, len(images))
    rows = -(-len(images) // columns)
    figure = figure_of(4.1 * columns, 1.75 * rows + 0.5)
    grid = figure.add_gridspec(rows, 2 * columns, width_ratios=[1, 1.15] * columns)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        _image(figure.add_subplot(grid[row, 2 * column]), image, f"true: {drawn(names[labels[i]])}")
        bars = figure.add_subplot(grid[row, 2 * column + 1])
        _bars(bars, names, teacher[i], student[i], labels[i])
        if i + columns >= len(images):
            bars.set_xlabel("probability", fontsize=8)
    handles = [Patch(color=COLOURS[who]) for who in ("teacher", "distilled")]
    figure.legend(handles, ["teacher", "student"], loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)
    return (
        "Images with the probabilities of the three classes that teacher and student together find likeliest (the "
        f"true class in bold). {which}"
    )


def _image(axes: Axes, image: Any, title: str) -> None:
    axes.imshow(image, interpolation="nearest", cmap="gray" if getattr(image, "mode", "") == "L" else None)
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def _bars(axes: Axes, names: Sequence[str], teacher: np.ndarray, student: np.ndarray, label: int) -> None:
    top = np.argsort(-(teacher + student), kind="stable")[:3]
    places = np.arange(len(top))
    for who, values, shift in (("teacher", teacher, -0.2), ("distilled", student, 0.2)):
        axes.barh(places + shift, values[top], height=0.38, color=COLOURS[who])
        for place, value in zip(places, values[top], strict=True):
            axes.text(value + 0.03, place + shift, f"{value:.2f}", va="center", fontsize=6.5)
    axes.set_yticks(places, [drawn(names[index]) for index in top], fontsize=8)
    for tick, index in zip(axes.get_yticklabels(), top, strict=True):
        tick.set_fontweight("bold" if index == label else "normal")
    axes.set_ylim(len(top) - 0.5, -0.5)
    axes.set_xlim(0, 1.25)
    axes.set_xticks([0, 0.5, 1], ["0", "", "1"], fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def figure_of(width: float, height: float) -> Figure:
    """A figure of that many inches."""
    # Not pyplot, which would choose a backend for the whole program and keep every figure.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
