"""Several runs side by side, as text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_kdtl.evaluation.comparison import Arm, compare, compare_images
from hf_kdtl.evaluation.statistics import mean_and_std
from hf_kdtl.reports.score_tables import heading, is_share
from hf_kdtl.utils.text import escape_markdown, markdown_table


def markdown(arms: Sequence[Arm], split: str, metrics: Sequence[str], level: float = 0.05) -> str:
    """The comparison as text: a table for each metric, what was shown, and the images of each seed."""
    first, found = arms[0], compare(arms, split, metrics)
    lines = [
        f"# {len(arms)} models on the {split} images of {escape_markdown(first.data.get('source', 'unknown data'))}",
        "",
    ]
    lines += [f"Each is compared with {escape_markdown(first.name)}, paired by seed ({', '.join(first.seeds)}).", ""]
    for metric, differences in found.items():
        lines += [f"## {heading(metric)}", "", _table(arms, split, metric, differences), ""]
    lines += [_verdict(arms, found, level), ""]
    return "\n".join([*lines, *_images(compare_images(arms, split), first, split)])


def _table(arms: Sequence[Arm], split: str, metric: str, differences: list[dict[str, Any]]) -> str:
    rows = [["", "mean ± sd", "difference", "95% t interval", "p", "p (Holm)"]]
    for arm, found in zip(arms, [None, *differences], strict=True):
        mean, sd = mean_and_std(arm.values(split, metric))
        shown = _number(mean, metric) if sd is None else f"{_number(mean, metric)} ± {_number(sd, metric)}"
        rows.append([escape_markdown(arm.name), shown, *(["-"] * 4 if found is None else _cells(found, metric))])
    return markdown_table(rows)


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
    shown = [
        f"{escape_markdown(arm.name)} ({escape_markdown(metric)})"
        for metric, arm, one in tests
        if one.get("p_holm", 1.0) <= level
    ]
    tested = f"{len(made)} differences were tested" if len(made) > 1 else "One difference was tested"
    return (
        f"{tested}, corrected by Holm: the chance of seeing any where there is none is at most {level:.0%}. "
        f"Shown: {'; '.join(shown) if shown else 'none'}. What is not shown may still be there: few seeds see only "
        "large differences."
    )


def _images(found: list[dict[str, Any]] | None, first: Arm, split: str) -> list[str]:
    title = ["## The images of each seed", ""]
    if found is None:
        if "map" in next(iter(first.runs.values())).get(split, {}):
            return [
                *title,
                "Not compared: a test of the images is of right and wrong, and these have several labels.",
                "",
            ]
        missing = f"Not every run kept its predictions (predictions_{split}.safetensors)"
        advice = "hf-kdtl distill with --resume_from_checkpoint true writes them."
        return [*title, f"{missing}, so the images of a seed were not compared; {advice}", ""]
    rows = [["", "seed", "difference (%)", "95% bootstrap interval", "right here only", "right there only",
             "p (McNemar)", "p (Holm)"]]  # fmt: skip
    for one in found:
        bounds = one["interval"] or []
        interval = " to ".join(_number(bound, "accuracy", "+") for bound in bounds) or "no image differs"
        counts = [str(one["only_a"]), str(one["only_b"])]
        tests = [_p(one["p_value"]), _p(one["p_holm"])]
        rows.append(
            [
                escape_markdown(one["arm"]),
                one["seed"],
                _number(one["mean"], "accuracy", "+"),
                interval,
                *counts,
                *tests,
            ]
        )
    about = (
        f"Accuracy against {escape_markdown(first.name)} of the same seed. It says whether these two trained models "
        "differ on images of this kind, not whether the way of training does: that is the table over seeds."
    )
    return [*title, markdown_table(rows), "", about, ""]


def _number(value: float, metric: str, sign: str = "") -> str:
    return f"{100 * value:{sign}.2f}" if is_share(metric) else f"{value:{sign}.4f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
