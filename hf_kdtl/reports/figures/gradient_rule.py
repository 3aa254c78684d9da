"""A picture of how far the transfer worked against the task, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_kdtl.reports.figures.style import new_figure, save

GRADIENT_RULE = "gradient_rule.png"


def gradient_rule_figure(history: Sequence[dict[str, Any]], path: str | Path) -> None:
    """A heat map, optimizer steps by layers, of the cosine between task and transfer gradient; under it, by step, the
    share of the transfer gradient that was removed and the share of the steps in which the full gradients conflict.

    Args:
        history: entries {"step", "cosine": {layer: in [-1, 1], None where it has not both}, "removed", "whole":
            {"conflicting"}}; each stands for the steps since the one before.
        path: of the PNG.

    Raises:
        ValueError: when nothing was logged.
    """
    from matplotlib.colors import CenteredNorm

    if not history:
        raise ValueError("there is no history of a gradient rule to draw: no rule was set, or no step was logged.")
    steps = [entry["step"] for entry in history]
    layers = list(history[0]["cosine"])
    cosines = np.array([[_number(entry["cosine"][layer]) for entry in history] for layer in layers])
    figure = new_figure(9, 3.2 + 0.3 * len(layers))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1 + 0.3 * len(layers), 2.2])
    above.set_facecolor("#dddddd")  # a layer without one of the two
    # Red and blue can be distinguished by colour-blind readers too; white is where the two do not conflict. The scale
    # is that of the run: cosines of thousands of numbers are small.
    norm = CenteredNorm(0.0)
    image = above.imshow(cosines, aspect="auto", interpolation="nearest", origin="lower", cmap="RdBu", norm=norm)
    above.set_yticks(range(len(layers)), [f"block {layer}" if layer.isdecimal() else layer for layer in layers])
    figure.colorbar(image, ax=above, label="cosine (red: they conflict)")
    for key, values, colour in (
        ("transfer removed", [entry["removed"] for entry in history], "#0072B2"),
        (
            "steps in conflict",
            [_all_layers(entry)["conflicting"] for entry in history],
            "#D55E00",
        ),
    ):
        below.plot(range(len(steps)), [_number(v) for v in values], color=colour, label=key, marker=".")
    below.set_ylim(-0.05, 1.05)
    below.set_ylabel("share")
    below.grid(alpha=0.25)
    below.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 0.98))  # above the lines, hides none
    shown = sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(9, len(steps)))})
    below.set_xticks(shown, [str(steps[i]) for i in shown])
    below.set_xlabel("optimizer step")
    save(figure, path, 130)


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _all_layers(entry: dict[str, Any]) -> dict[str, Any]:
    return entry["all_layers"] if "all_layers" in entry else entry["whole"]  # the key of results before this version
