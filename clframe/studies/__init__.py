"""What is done to a trained model after its run: looked into, measured, converted."""

from clframe.studies.batches import Batch, Batches, Part
from clframe.studies.target import Parts, Target, open_target

__all__ = ["Batch", "Batches", "Part", "Parts", "Target", "open_target"]
