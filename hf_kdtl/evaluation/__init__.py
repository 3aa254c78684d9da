"""What a run has to show: metrics, statistics over seeds, cost, results.json and what is derived from it."""

from hf_kdtl.evaluation.metrics import METRICS, compute_metrics
from hf_kdtl.evaluation.results import read_results, update_results
from hf_kdtl.evaluation.statistics import paired_difference

__all__ = ["METRICS", "compute_metrics", "paired_difference", "read_results", "update_results"]
