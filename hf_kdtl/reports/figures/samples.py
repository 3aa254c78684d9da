"""Images with the probabilities that teacher and student give to their likeliest classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_kdtl.evaluation.scoring import largest_disagreements
from hf_kdtl.reports.figures.style import COLORS, figure_label, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes


SHEET = "sheet.png"
FIRST = (
    "Shown are images that the two classify differently, up to half of the sheet, those whose probabilities are "
    "furthest apart first, and then others; both halves take turns over the classes that the teacher predicts."
)


def choose_samples(teacher: np.ndarray, student: np.ndarray, count: int = 12) -> list[int]:
    """Which images to show: up to half that the two classify differently, those furthest apart first, then others.

    Both halves take turns over the classes that the teacher predicts, because the images of a folder are sorted.

    Args:
        teacher, student: logits (n, K) in one class order.
    """
    order = np.array(largest_disagreements(student, teacher, len(teacher)))
    differ = (teacher.argmax(1) != student.argmax(1))[order]
    chosen = _by_turns(order[differ], teacher)[: count // 2]
    return chosen + _by_turns(order[~differ], teacher)[: count - len(chosen)]


def _by_turns(rows: np.ndarray, teacher: np.ndarray) -> list[int]:
    """The first row of each class that the teacher predicts, then the second of each, ..."""
    seen: dict[int, int] = {}
    turns = []
    for place, row in enumerate(rows.tolist()):
        predicted = int(teacher[row].argmax())
        seen[predicted] = turn = seen.get(predicted, -1) + 1
        turns.append((turn, place, row))
    return [row for _, _, row in sorted(turns)]


def sample_figure(
    path: str | Path,
    images: Sequence[Any],
    labels: Sequence[int],
    names: Sequence[str],
    teacher: np.ndarray,
    student: np.ndarray,
    which: str = FIRST,
) -> str:
    """A grid of images, each next to the probabilities of its three likeliest classes; returns the caption.

    Args:
        images: PIL images.
        labels: their classes.
        teacher, student: probabilities (n, K), row i for image i.
        which: a sentence on how the images were chosen; by default as by `choose_samples`.
    """
    from matplotlib.patches import Patch

    columns = min(2, len(images))
    rows = -(-len(images) // columns)
    figure = new_figure(4.2 * columns, 1.75 * rows + 0.5)
    grid = figure.add_gridspec(rows, 2 * columns, width_ratios=[1, 1.15] * columns)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        _image(figure.add_subplot(grid[row, 2 * column]), image, f"true: {figure_label(names[labels[i]])}")
        bars = figure.add_subplot(grid[row, 2 * column + 1])
        _bars(bars, names, teacher[i], student[i], labels[i])
        if i + columns >= len(images):
            bars.set_xlabel("probability", fontsize=9.5)
    handles = [Patch(color=COLORS[who]) for who in ("teacher", "distilled")]
    figure.legend(handles, ["teacher", "student"], loc="outside upper center", ncols=2, frameon=False)
    save(figure, path, 130)
    return (
        "Images with the probabilities of the three classes that teacher and student together find likeliest (the "
        f"true class in bold). {which}"
    )


def _image(axes: Axes, image: Any, title: str) -> None:
    axes.imshow(image, interpolation="nearest", cmap="gray" if getattr(image, "mode", "") == "L" else None)
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()


def _bars(axes: Axes, names: Sequence[str], teacher: np.ndarray, student: np.ndarray, label: int) -> None:
    top = np.argsort(-(teacher + student), kind="stable")[:3]
    places = np.arange(len(top))
    for who, values, shift in (("teacher", teacher, -0.2), ("distilled", student, 0.2)):
        axes.barh(places + shift, values[top], height=0.38, color=COLORS[who])
        for place, value in zip(places, values[top], strict=True):
            axes.text(value + 0.03, place + shift, f"{value:.2f}", va="center", fontsize=8.5)
    axes.set_yticks(places, [figure_label(names[index]) for index in top], fontsize=9.5)
    for tick, index in zip(axes.get_yticklabels(), top, strict=True):
        tick.set_fontweight("bold" if index == label else "normal")
    axes.set_ylim(len(top) - 0.5, -0.5)
    axes.set_xlim(0, 1.25)
    axes.set_xticks([0, 0.5, 1], ["0", "", "1"], fontsize=8.5)
