"""Data: sources, protocols and the loaders that feed the model."""

from clframe.data.benchmark import Benchmark, class_incremental
from clframe.data.epoch_loader import EpochLoader
from clframe.data.samples import TensorSamples, concatenate
from clframe.data.source import SOURCES, Source
from clframe.data.sources.characters import digits
from clframe.data.sources.given import from_avalanche, from_datasets
from clframe.data.sources.image_files import ImageFiles
from clframe.data.streams import domain_incremental

__all__ = [
    "SOURCES", "Benchmark", "EpochLoader", "ImageFiles", "Source", "TensorSamples", "class_incremental",
    "concatenate", "digits", "domain_incremental", "from_avalanche", "from_datasets",
]  # fmt: skip
