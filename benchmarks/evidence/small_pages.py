"""The pages of the tables with fewer seeds: what to cut, and weights measured at the start of training."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from hf_kdtl.evaluation.statistics import mean_and_std, paired_difference
from hf_kdtl.utils.text import markdown_table

Lines = list[dict[str, Any]]
STEPS = 500  # of the plan; lines with other steps are trials


def difference(a: Sequence[float], b: Sequence[float]) -> str:
    """a - b in points with a paired 95 % interval, of shares.

    >>> difference([0.5, 0.54], [0.4, 0.42])
    '+11.0 (-1.7 to +23.7)'
    """
    found = paired_difference([100 * value for value in a], [100 * value for value in b])
    if found["interval"] is None:
        return f"{found['mean']:+.1f}"
    low, high = found["interval"]
    return f"{found['mean']:+.1f} ({low:+.1f} to {high:+.1f})"


def _spread(values: Sequence[float]) -> str:
    mean, sd = mean_and_std([100 * value for value in values])
    return f"{mean:.1f}" if sd is None else f"{mean:.1f} ± {sd:.1f}"


def cut(lines: Lines) -> str:
    """What to cut: each arm before and after training, and the difference to cutting depth alone."""
    lines = [line for line in lines if line.get("steps") == STEPS]
    whole = next(line for line in lines if line["arm"] == "teacher")
    found: dict[tuple[float, str], dict[int, dict[str, Any]]] = {}
    for line in lines:
        if line["arm"] != "teacher":
            found.setdefault((line["share"], line["arm"]), {})[line["seed"]] = line
    rows = [["FLOPs", "arm", "M parameters", "seeds", "before, %", "after, %", "after, minus depth"]]
    for (share, arm), runs in sorted(found.items(), key=lambda item: -item[0][0]):
        depth, one = found[share, "depth"], next(iter(runs.values()))
        seeds = sorted(runs.keys() & depth.keys())
        against = difference([runs[s]["after"] for s in seeds], [depth[s]["after"] for s in seeds])
        before, after = (_spread([run[key] for run in runs.values()]) for key in ("before", "after"))
        cells = [f"{one['flops']:.1%}", arm, f"{one['parameters'] / 1e6:.2f}", str(len(runs)), before, after]
        rows.append([*cells, "reference" if arm == "depth" else against])
    teacher = f"The teacher: {whole['parameters'] / 1e6:.2f} M parameters, {100 * whole['before']:.1f} %"
    return f"{teacher} on the same {whole['test_images']:,} test images.\n\n{markdown_table(rows)}"


def auto_weight(lines: Lines) -> str:
    """auto beside weight 1 and the tuned weight, a table for each set."""
    return "\n\n".join(_weights_of(name, [x for x in lines if x["set"] == name]) for name in _order(lines, "set"))


def _order(lines: Lines, key: str) -> list[Any]:
    return list(dict.fromkeys(line[key] for line in lines))


def _weights_of(name: str, lines: Lines) -> str:
    tried = [line for line in lines if line["term"] == "none"]
    rates = {rate: fmean(_validation(tried, "learning_rate", rate)) for rate in _order(tried, "learning_rate")}
    rate = max(rates, key=lambda key: rates[key])
    alone = _tests([line for line in tried if line["learning_rate"] == rate], 0)
    rows = [["term", "alone", "weight 1", "tuned", "auto", "auto - weight 1", "auto - tuned", "tuned to", "measured"]]
    for term in [term for term in _order(lines, "term") if term != "none"]:
        own = [line for line in lines if line["term"] == term]
        weights = [weight for weight in _order(own, "weight") if weight != "auto"]
        scores = {weight: _validation(own, "weight", weight) for weight in weights}
        best = max((w for w in weights if scores[w]), key=lambda w: fmean(scores[w]), default=None)
        auto, one = _tests(own, "auto"), _tests(own, 1.0)
        tuned = _tests(own, best) if best is not None else {}
        measured = [line["measured"] for line in own if line["weight"] == "auto"]
        rows.append(
            [term, *(_spread(list(v.values())) if v else "" for v in (alone, one, tuned, auto)), _paired(auto, one),
             _paired(auto, tuned), "" if best is None else f"{best:g}", f"{min(measured):.3g} to {max(measured):.3g}"]
        )  # fmt: skip
    return f"{name}, learning rate {rate:g}, test accuracy in %:\n\n{markdown_table(rows)}"


def probe_reliability(lines: Lines) -> str:
    """What each probe foretold beside what full trainings gained, and how well the two agree."""
    from scipy.stats import spearmanr

    rows = [["setting", "steps of a run", "foretold gain", "gained", "sign"]]
    told, gained, signs = [], [], []
    for probe in [line for line in lines if line["arm"] == "probe"]:
        runs = {(x["arm"], x["seed"]): x["test"] for x in lines if x["setting"] == probe["setting"] and "test" in x}
        seeds = [s for s in (1, 2, 3) if ("alone", s) in runs and (probe["best"], s) in runs]
        if len(seeds) < 3:
            continue
        a, b = ([runs[arm, s] for s in seeds] for arm in (probe["best"], "alone"))
        told.append(probe["gain"])
        gained.append(fmean(a) - fmean(b))
        signs.append((told[-1] > 0) == (gained[-1] > 0))
        low, high = (100 * bound for bound in probe["interval"])
        rows.append(
            [probe["setting"], str(probe["steps"]), f"{100 * told[-1]:+.1f} ({low:+.1f} to {high:+.1f})",
             difference(a, b), "right" if signs[-1] else "wrong"]
        )  # fmt: skip
    if len(told) < 3:
        return markdown_table(rows)
    apart = fmean(abs(100 * (x - y)) for x, y in zip(told, gained, strict=True))
    return (
        f"{markdown_table(rows)}\n\nRank correlation (Spearman) {spearmanr(told, gained).statistic:.2f} over "
        f"{len(told)} settings; sign right in {sum(signs)} of {len(signs)}; mean distance {apart:.1f} points."
    )


TUNING = 10  # seeds above this chose the learning rate and the weight; those below are scored


def _validation(lines: Lines, key: str, value: Any) -> list[float]:
    return [line["validation"] for line in lines if line[key] == value and line["seed"] > TUNING]


def _tests(lines: Lines, weight: Any) -> dict[int, float]:
    return {line["seed"]: line["test"] for line in lines if line["weight"] == weight and line["seed"] <= TUNING}


def _paired(a: dict[int, float], b: dict[int, float]) -> str:
    seeds = sorted(a.keys() & b.keys())
    return difference([a[s] for s in seeds], [b[s] for s in seeds]) if seeds else ""
