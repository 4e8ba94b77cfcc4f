"""Published data sets, and readers of user data."""

from clframe.data.sources.arrays import npz
from clframe.data.sources.characters import omniglot
from clframe.data.sources.folders import csv_table, image_folder, imagenet, imagenet_subset
from clframe.data.sources.given import from_avalanche, from_datasets
from clframe.data.sources.image_files import ImageFiles
from clframe.data.sources.published_folders import core50, cub200, tiny_imagenet
from clframe.data.sources.text import banking77, clinc150
from clframe.data.sources.torchvision_sets import cifar10, cifar100, emnist, fashion_mnist, kmnist, mnist, svhn

__all__ = [
    "ImageFiles", "banking77", "cifar10", "cifar100", "clinc150", "core50", "csv_table", "cub200", "emnist",
    "fashion_mnist", "from_avalanche", "from_datasets", "image_folder", "imagenet", "imagenet_subset",
    "kmnist", "mnist", "npz", "omniglot", "svhn", "tiny_imagenet",
]  # fmt: skip
