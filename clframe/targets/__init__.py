"""Trained models after their run: opened with their data, measured, and written."""

from clframe.data.target import Batch, Batches, Part, Parts, Target
from clframe.targets.opening import open_target

__all__ = ["Batch", "Batches", "Part", "Parts", "Target", "open_target"]
