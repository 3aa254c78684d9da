"""Reliability diagram: accuracy by confidence."""

from __future__ import annotations

from pathlib import Path

from hf_kdtl.evaluation.records import EvaluatedModel
from hf_kdtl.evaluation.scoring import calibration_interval
from hf_kdtl.reports.evaluation_values import overconfidence
from hf_kdtl.reports.figures.style import figure_label, model_colors, new_figure, save


def reliability_figure(models: dict[str, EvaluatedModel], path: str | Path) -> None:
    """For each model accuracy by confidence, in the bins of ECE, and below how many images each bin has."""
    figure = new_figure(0.6 + 2.9 * len(models), 4.4)
    rows = figure.subplots(2, len(models), squeeze=False, sharex=True, sharey="row", height_ratios=[3, 1])
    for (name, model), colour, above, below in zip(models.items(), model_colors(models).values(), *rows, strict=True):
        bins = [one for one in model.reliability if one.images]
        places, width = [(one.lower + one.upper) / 2 for one in bins], 0.9 / len(model.reliability)
        above.bar(places, [one.accuracy or 0.0 for one in bins], width=width, color=colour)
        above.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
        above.set(xlim=(0, 1), ylim=(0, 1), title=figure_label(name, 30))
        verdict = f"confidence minus accuracy:\n{100 * overconfidence(model):+.1f} points"
        if (interval := calibration_interval(model.reliability)) is not None:
            verdict += f" ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})"
        above.text(0.04, 0.97, verdict, va="top", fontsize=8)
        total = sum(one.images for one in bins)
        below.bar(places, [one.images / total for one in bins], width=width, color=colour)
        below.set_xlabel("confidence")
    rows[0][0].set_ylabel("accuracy\n(dashed: equal to confidence)")
    rows[1][0].set_ylabel("share of\nimages")
    save(figure, path, 130)
