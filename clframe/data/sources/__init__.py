"""Published data sets, and readers of user data.

Adding a data source takes one file: a module of this package with ``@SOURCES.register("name")`` above the function.
"""

from __future__ import annotations

import importlib
import pkgutil

from clframe.data.sources.arrays import npz
from clframe.data.sources.characters import omniglot
from clframe.data.sources.folders import csv_table, image_folder, imagenet, imagenet_subset
from clframe.data.sources.given import from_avalanche, from_datasets
from clframe.data.sources.image_files import ImageFiles
from clframe.data.sources.published_folders import core50, cub200, tiny_imagenet
from clframe.data.sources.text import banking77, clinc150
from clframe.data.sources.torchvision_sets import cifar10, cifar100, emnist, fashion_mnist, kmnist, mnist, svhn

# Importing a module registers its sources, so a new module needs no line here.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "ImageFiles", "banking77", "cifar10", "cifar100", "clinc150", "core50", "csv_table", "cub200", "emnist",
    "fashion_mnist", "from_avalanche", "from_datasets", "image_folder", "imagenet", "imagenet_subset",
    "kmnist", "mnist", "npz", "omniglot", "svhn", "tiny_imagenet",
]  # fmt: skip
