"""Metrics: exact counts, and one definition for each number of continual learning."""

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
from clframe.metrics.registry import METRICS, scores
from clframe.metrics.tally import Counts, Tally, TallyCounter

__all__ = [
    "METRICS", "Counts", "Matrix", "Score", "Tally", "TallyCounter", "average_incremental_accuracy",
    "average_seen_accuracy", "backward_transfer", "final_average_accuracy", "final_weighted_accuracy",
    "forgetting", "forgetting_E", "forward_transfer", "learning_accuracy", "scores",
]  # fmt: skip
