"""Data: sources, protocols and the loaders that feed the model."""

from clframe.data.benchmark import SOURCES, Benchmark, Source, class_incremental
from clframe.data.digits import digits
from clframe.data.samples import EpochLoader, TensorSamples, concatenate

__all__ = [
    "SOURCES", "Benchmark", "EpochLoader", "Source", "TensorSamples", "class_incremental", "concatenate",
    "digits",
]  # fmt: skip
