"""Metrics, statistics over seeds, cost, and results.json."""

from typing import TYPE_CHECKING, Any

from hf_kdtl.evaluation.results import read_results, update_results
from hf_kdtl.evaluation.statistics import paired_difference

if TYPE_CHECKING:
    from hf_kdtl.evaluation.metrics import METRICS, compute_metrics

__all__ = ["METRICS", "compute_metrics", "paired_difference", "read_results", "update_results"]


def __getattr__(name: str) -> Any:
    # The metrics are classes of `evaluate`, whose import only those who use them pay for.
    if name in ("METRICS", "compute_metrics"):
        from hf_kdtl.evaluation import metrics

        return getattr(metrics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
