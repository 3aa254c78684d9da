"""Several runs side by side, as text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_kdtl.evaluation.comparison import Arm, compare, compare_images
from hf_kdtl.evaluation.statistics import spread
from hf_kdtl.utils.text import aligned, drawn, plain

COMPARISON = "comparison.png"
SHARES = ("accuracy", "top5", "mean_class_accuracy")  # printed in per cent
ERRORS = ("nll", "brier", "ece")


def markdown(arms: Sequence[Arm], split: str, metrics: Sequence[str], level: float = 0.05) -> str:
    """The comparison as text: a table for each metric, what was shown, and the images of each seed."""
    first, found = arms[0], compare(arms, split, metrics)
    lines = [f"# {len(arms)} models on the {split} images of {plain(first.data.get('source', 'unknown data'))}", ""]
    lines += [f"Each is compared with {plain(first.name)}, paired by seed ({', '.join(first.seeds)}).", ""]
    for metric, differences in found.items():
        unit = " (%)" if metric in SHARES else " (lower is better)" if metric in ERRORS else ""
        lines += [f"## {plain(metric)}{unit}", "", _table(arms, split, metric, differences), ""]
    lines += [_verdict(arms, found, level), ""]
    return "\n".join([*lines, *_images(compare_images(arms, split), first, split)])


def _table(arms: Sequence[Arm], split: str, metric: str, differences: list[dict[str, Any]]) -> str:
    rows = [["", "mean ± sd", "difference", "95% t interval", "p", "p (Holm)"]]
    for arm, found in zip(arms, [None, *differences], strict=True):
        mean, sd = spread(arm.values(split, metric))
        shown = _number(mean, metric) if sd is None else f"{_number(mean, metric)} ± {_number(sd, metric)}"
        rows.append([plain(arm.name), shown, *(["-"] * 4 if found is None else _cells(found, metric))])
    return aligned(rows)


def _cells(found: dict[str, Any], metric: str) -> list[str]:
    difference = _number(found["mean"], metric, "+")
    if found["interval"] is None:
        return [difference, found["note"], "-", "-"]
    interval = " to ".join(_number(bound, metric, "+") for bound in found["interval"])
    return [difference, interval, *(_p(found[key]) for key in ("p_value", "p_holm"))]


def _verdict(arms: Sequence[Arm], found: dict[str, list[dict[str, Any]]], level: float) -> str:
    tests = [(metric, arm, one) for metric, row in found.items() for arm, one in zip(arms[1:], row, strict=True)]
    made = [one for _, _, one in tests if one["p_value"] is not None]
    if not made:
        return "No difference can be tested: that takes several seeds that do not all differ by the same amount."
    shown = [f"{plain(arm.name)} ({plain(metric)})" for metric, arm, one in tests if one.get("p_holm", 1.0) <= level]
    tested = f"{len(made)} differences were tested" if len(made) > 1 else "One difference was tested"
    return (
        f"{tested}, corrected by Holm: the chance of seeing any where there is none is at most {level:.0%}. "
        f"Shown: {'; '.join(shown) if shown else 'none'}. What is not shown may still be there: few seeds see only "
        "large differences."
    )


def _images(found: list[dict[str, Any]] | None, first: Arm, split: str) -> list[str]:
    title = ["## The images of each seed", ""]
    if found is None:
        missing = (
            f"Not every run kept its predictions (predictions_{split}.safetensors), so the images of a seed were "
        )
        return [
            *title,
            f"{missing}not compared; recipes/distill.py with --resume_from_checkpoint true writes them.",
            "",
        ]
    rows = [["", "seed", "difference (%)", "95% bootstrap interval", "right here only", "right there only",
             "p (McNemar)", "p (Holm)"]]  # fmt: skip
    for one in found:
        bounds = one["interval"] or []
        interval = " to ".join(_number(bound, "accuracy", "+") for bound in bounds) or "no image differs"
        counts = [str(one["only_a"]), str(one["only_b"])]
        tests = [_p(one["p_value"]), _p(one["p_holm"])]
        rows.append([plain(one["arm"]), one["seed"], _number(one["mean"], "accuracy", "+"), interval, *counts, *tests])
    about = (
        f"Accuracy against {plain(first.name)} of the same seed. It says whether these two trained models differ on "
        "images of this kind, not whether the way of training does: that is the table over seeds."
    )
    return [*title, aligned(rows), "", about, ""]


def _number(value: float, metric: str, sign: str = "") -> str:
    return f"{100 * value:{sign}.2f}" if metric in SHARES else f"{value:{sign}.4f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def comparison_picture(arms: Sequence[Arm], split: str, metrics: Sequence[str], path: str | Path) -> None:
    """The differences from the first arm: a ring for each seed, their mean, and its t interval where there is one."""
    found, first, names = compare(arms, split, metrics), arms[0], [drawn(arm.name, 40) for arm in arms[1:]]
    figure = Figure(figsize=(2.2 + 3.6 * len(metrics), 1.6 + 0.45 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (metric, differences) in zip(
        np.atleast_1d(figure.subplots(1, len(metrics))), found.items(), strict=True
    ):
        scale = 100 if metric in SHARES else 1
        for place, (arm, one) in enumerate(zip(arms[1:], differences, strict=True)):
            pairs = zip(arm.values(split, metric), first.values(split, metric), strict=True)
            seeds = [scale * (a - b) for a, b in pairs]
            axes.plot(seeds, [place - 0.15] * len(seeds), "o", mfc="none", color="#7f7f7f", markersize=5)
            axes.plot(scale * one["mean"], place, "D", color="#0072B2", markersize=6)
            if one["interval"] is not None:
                axes.plot([scale * bound for bound in one["interval"]], [place] * 2, color="#0072B2", linewidth=2)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), names if axes is figure.axes[0] else [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(f"{metric}, difference from\n{drawn(first.name, 40)}{' (points)' if scale == 100 else ''}")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
