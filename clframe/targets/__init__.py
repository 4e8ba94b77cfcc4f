"""Trained models with their data, opened for analysis, conversion and latency measurements."""

from clframe.data.target import Batch, Batches, DataSplit, DataSplits, Target
from clframe.targets.opening import open_target

__all__ = ["Batch", "Batches", "DataSplit", "DataSplits", "Target", "open_target"]
