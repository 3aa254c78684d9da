"""What distillation gained: the accuracy of each arm as a bar, its teacher as a line."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from hf_kdtl.evaluation.records import HEADLINES, EvaluatedModel
from hf_kdtl.evaluation.statistics import mean_interval
from hf_kdtl.reports.figures.style import COLORS, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARMS_FIGURE = "arms.png"


def arms_figure(
    models: dict[str, EvaluatedModel], names: dict[str, str], path: str | Path, split: str = "test", title: str = ""
) -> bool:
    """A bar for each arm: mean accuracy over seeds, the 95 % t interval of it, and a ring for each seed.

    Args:
        models: of a training; `teacher` becomes a line.
        names: what each is called.

    Returns:
        Whether there was something to draw: two arms of two seeds or more.
    """
    values = {arm: _accuracies(model, split) for arm, model in models.items()}
    arms = {arm: found for arm, found in values.items() if arm != "teacher" and len(found) > 1}
    if len(arms) < 2:
        return False
    figure = new_figure(7.2, 1.5 + 0.62 * len(arms))
    axes = figure.subplots()
    for place, (arm, found) in enumerate(arms.items()):
        _bar(axes, place, arm, found)
    lowest = min(min(found) for found in arms.values())
    left = max(0, 10 * (lowest // 10) - 10) if lowest > 20 else 0
    teacher = values.get("teacher")
    if teacher:
        axes.axvline(teacher[0], color="#444444", linewidth=1.4, linestyle="--")
        axes.text(teacher[0], -0.62, f"teacher {teacher[0]:.1f} %", ha="right", va="bottom", fontsize=10)
    right = max([*(max((*found, *(mean_interval(found) or ()))) for found in arms.values()), *(teacher or [])])
    axes.set_xlim(left, right + 0.02 * (right - left))
    axes.set_yticks(range(len(arms)), [names[arm].replace(", ", ",\n") for arm in arms], fontsize=11)
    axes.set_ylim(len(arms) - 0.4, -0.6)
    word = HEADLINES[next(iter(models.values())).headline]
    seeds = len(next(iter(arms.values())))
    scale = f" (the axis begins at {left:.0f})" if left else ""
    axes.set_xlabel(f"{split} {word} in %{scale}\nmean of {seeds} seeds, its 95 % interval; a ring is one seed")
    if title:
        axes.set_title(title, fontsize=11, loc="left", pad=18)
    save(figure, path, 150)
    return True


def _bar(axes: Axes, place: int, arm: str, found: list[float]) -> None:
    mean, interval = fmean(found), mean_interval(found)
    axes.barh(place, mean, height=0.62, color=COLORS.get(arm, "#009E73"))
    if interval is not None:
        axes.plot(interval, [place] * 2, color="black", linewidth=1.6)
    axes.plot(found, [place + 0.2] * len(found), "o", mfc="white", mec="#222222", markersize=4.5)
    axes.annotate(f"{mean:.1f}", (0.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=12,
                  color="white", fontweight="bold")  # fmt: skip


def _accuracies(model: EvaluatedModel, split: str) -> list[float]:
    found = (run.get(split, {}).get(model.headline) for run in model.runs.values())
    return [100 * value for value in found if value is not None]
