"""Tables of metrics, formatted by their records (hf_kdtl.evaluation.metrics.RECORDS)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hf_kdtl.evaluation.statistics import mean_and_std
from hf_kdtl.utils.text import escape_markdown, markdown_table

Scores = Mapping[str, float | None]


def scores_table(runs: Mapping[str, Sequence[Scores]]) -> str:
    """Every metric, from {model: the scores of each of its runs}: mean and standard deviation, shares in percent."""
    rows = [[f"`{metric}`", *(_over_runs(metric, found) for found in runs.values())] for metric in _metrics(runs)]
    return markdown_table([["", *map(escape_markdown, runs)], *rows])


def scores_note(runs: Mapping[str, Sequence[Scores]]) -> str:
    """What the metrics of `scores_table` mean, where their name does not say it."""
    from hf_kdtl.evaluation.metrics import RECORDS

    notes = []
    for metric in _metrics(runs):
        record = RECORDS.get(metric)
        if record is not None and record.description:
            facts = _facts(record.unit if record.unit != "%" else "", record.higher_is_better)
            notes.append(f"`{metric}`{facts}: {record.description}.")
    return " ".join(notes)


def is_share(metric: str) -> bool:
    """Whether a metric is stored in [0, 1] and printed in percent."""
    from hf_kdtl.evaluation.metrics import RECORDS

    return metric in RECORDS and RECORDS[metric].unit == "%"


def heading(metric: str) -> str:
    """A metric's name, with its unit and direction: "ece (%, lower is better)"."""
    from hf_kdtl.evaluation.metrics import RECORDS

    record = RECORDS.get(metric)
    return escape_markdown(metric) + ("" if record is None else _facts(record.unit, record.higher_is_better))


def _facts(unit: str | None, higher_is_better: bool | None) -> str:
    facts = ", ".join(fact for fact in (unit, "lower is better" * (higher_is_better is False)) if fact)
    return f" ({facts})" if facts else ""


def _metrics(runs: Mapping[str, Sequence[Scores]]) -> list[str]:
    return list(dict.fromkeys(metric for found in runs.values() for scores in found for metric in scores))


def _over_runs(metric: str, runs: Sequence[Scores]) -> str:
    values = [value for scores in runs if (value := scores.get(metric)) is not None]
    if len(values) < len(runs) or not values:
        return "-"
    scale, digits, unit = (100, 1, " %") if is_share(metric) else (1, 4, "")
    mean, sd = mean_and_std([scale * value for value in values])
    return f"{mean:.{digits}f}{unit}" if sd is None else f"{mean:.{digits}f} ± {sd:.{digits}f}{unit}"
