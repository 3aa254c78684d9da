"""What labels are worth: accuracy against the number of labels a class, for the student alone and distilled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from hf_kdtl.reports.figures.style import COLORS, new_figure, save

LABELS = "labels.png"
FURTHER = ("#009E73", "#CC79A7")


def labels_figure(
    labels: Sequence[float], scores: Mapping[str, Sequence[Sequence[float]]], path: str | Path, about: str = ""
) -> None:
    """A line for each arm through the means over seeds, and a ring for each seed.

    Args:
        labels: numbers of labels a class.
        scores: {arm: for each number the accuracy of every seed}; `alone` first.
        about: what the accuracy is of.
    """
    figure = new_figure(6.0, 4.0)
    axes, more = figure.subplots(), iter(FURTHER)
    for arm, by_size in scores.items():
        color = COLORS.get(arm) or next(more)
        axes.plot(labels, [100 * fmean(found) for found in by_size], color=color, linewidth=2, label=arm)
        for number, found in zip(labels, by_size, strict=True):
            axes.plot([number] * len(found), [100 * one for one in found], "o", mfc="white", mec=color, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(labels, [f"{number:g}" for number in labels])
    axes.set_xlabel("labels a class")
    axes.set_ylabel(f"accuracy in %{about and f' ({about})'}")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    save(figure, path, 130)
