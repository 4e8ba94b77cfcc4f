"""Metrics of continual learning: exact counts, one definition per metric, one registry, statistics over seeds."""

from clframe.metrics.continual import (
    Matrix,
    Score,
    average_incremental_accuracy,
    average_seen_accuracy,
    backward_transfer,
    final_average_accuracy,
    final_weighted_accuracy,
    forgetting,
    forgetting_E,
    forward_transfer,
    learning_accuracy,
)
from clframe.metrics.counts import Counts
from clframe.metrics.registry import METRICS, Evaluations, Kind, Metric, all_metrics, metrics_of, scores
from clframe.metrics.tally import Tally, TallyCounter, TokenCounter

__all__ = [
    "METRICS", "Counts", "Evaluations", "Kind", "Matrix", "Metric", "Score", "Tally", "TallyCounter", "TokenCounter",
    "all_metrics",
    "average_incremental_accuracy",
    "average_seen_accuracy", "backward_transfer", "final_average_accuracy", "final_weighted_accuracy",
    "forgetting", "forgetting_E", "forward_transfer", "learning_accuracy", "metrics_of", "scores",
]  # fmt: skip
