"""Change of each class's accuracy against teacher and baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_kdtl.evaluation.records import EvaluatedModel
from hf_kdtl.reports.evaluation_values import class_accuracies
from hf_kdtl.reports.figures.style import figure_label, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes


MOST_CLASSES = 24  # in a picture


def classes_figure(model: EvaluatedModel, others: dict[str, EvaluatedModel], path: str | Path) -> str:
    """Each class's accuracy minus that of the others ({role: model}), worst first; returns which classes it shows."""
    mine = class_accuracies(model)
    changes = {
        role: {name: 100 * (mine[name][0] - its[name][0]) for name in mine}
        for role, its in ((role, class_accuracies(other)) for role, other in others.items())
    }
    some = min(MOST_CLASSES, len(mine))
    figure = new_figure(1.6 + 3.6 * len(changes), 1 + 0.24 * some)
    for axes, (role, change) in zip(
        figure.subplots(1, len(changes), squeeze=False, sharex=True)[0], changes.items(), strict=True
    ):
        order = sorted(change, key=lambda name: change[name])
        _bars(axes, {name: change[name] for name in ends(order, some)}, role)
    if not any(value for change in changes.values() for value in change.values()):
        figure.axes[0].set_xlim(-1, 1)  # nothing changed
    save(figure, path, 130)
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
    axes.set_yticks(places, [figure_label(name, 18) for name in change], fontsize=8)
    axes.set_ylim(len(change) - 0.4, -0.6)
    axes.margins(x=0.18)
    axes.set_xlabel(f"student minus {role},\npoints of the class's accuracy")
