"""The loaders that race in data_race.py, and the images that all of them serve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

from clframe.data.augmentation import AUGMENTATIONS
from clframe.data.epoch_loader import EpochLoader
from clframe.data.lazy import DatasetSamples
from clframe.data.samples import Loadable, TensorSamples
from clframe.seeding import epoch_order, generator_for

MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
"""Of images from 0 to 1, as Avalanche has them for CIFAR-100."""
BYTE_MEAN, BYTE_STD = tuple(255 * m for m in MEAN), tuple(255 * s for s in STD)
PADDING, SEED = 4, 0

Epoch = Iterator[Any]
"""``x, y`` and perhaps more, batch by batch."""
Loader = Callable[[int], Epoch]
"""An epoch by its number."""


class Pictures:
    """Images as bytes, all of them and those of the first experience.

    Args:
        x: images_NCHW.
        y: targets_N, classes from 0.
        experiences: Into which the classes are split, in their order.
    """

    def __init__(self, x: Tensor, y: Tensor, *, experiences: int) -> None:
        self.all_x, self.all_y, self.experiences = x, y, experiences
        self.classes = int(y.max()) + 1
        self.index = (y < self.classes // experiences).nonzero().flatten()
        self.x, self.y = x[self.index], y[self.index]

    def __len__(self) -> int:
        return len(self.index)


class Cifar(Dataset[tuple[Any, int]]):
    """What ``torchvision.datasets.CIFAR100`` does with its arrays; Avalanche reads ``targets``."""

    def __init__(self, pictures: Pictures, transform: Callable[[Any], Any] | None = None) -> None:
        self.data = np.ascontiguousarray(pictures.all_x.permute(0, 2, 3, 1).numpy())
        self.targets = pictures.all_y.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.data[index])
        return image if self.transform is None else self.transform(image), self.targets[index]


def torchvision_transform() -> Callable[[Any], Any]:
    """The training transform of Avalanche's ``SplitCIFAR100``."""
    made: Callable[[Any], Any] = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=PADDING),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return made


def by_windows(pictures: Pictures, batch: int) -> Loader:
    """Batches by index of one tensor, and clframe's algorithm for crops and flips with nothing around it."""
    x, y = pictures.x, pictures.y
    scale, shift = _scale_shift()
    _, c, h, w = x.shape
    row, plane = w + 2 * PADDING, (h + 2 * PADDING) * (w + 2 * PADDING)
    window = (c - 1) * plane + (h - 1) * row + w

    def epoch(number: int) -> Epoch:
        generator = generator_for(SEED, "augment", 0, number)
        for index in epoch_order(len(y), seed=SEED, experience=0, epoch=number).split(batch):
            b = len(index)
            padded = F.pad(x.index_select(0, index), (PADDING,) * 4)
            top, left = torch.randint(2 * PADDING + 1, (2, b), generator=generator)
            first = torch.arange(0, b * c * plane, c * plane).add_(top, alpha=row).add_(left)
            windows = padded.as_strided((b * c * plane - window + 1, c, h, w), (1, plane, row, 1))
            images = windows.index_select(0, first)
            flipped = torch.rand(b, generator=generator) < 0.5
            both = torch.cat([images, images.flip(-1)])
            images = both.index_select(0, torch.arange(b).add_(flipped, alpha=b))
            yield images.to(torch.float32).mul_(scale).add_(shift), y.index_select(0, index)

    return epoch


def by_gather(pictures: Pictures, batch: int) -> Loader:
    """Batches by index of one tensor, crop and flip by one ``gather``: what one would write first."""
    x, y = pictures.x, pictures.y
    scale, shift = _scale_shift()
    _, c, h, w = x.shape
    side = w + 2 * PADDING

    def epoch(number: int) -> Epoch:
        generator = Generator().manual_seed(number)
        for index in torch.randperm(len(y), generator=generator).split(batch):
            b = len(index)
            padded = F.pad(x[index], (PADDING,) * 4)
            top, left = torch.randint(2 * PADDING + 1, (2, b, 1), generator=generator)
            flipped = torch.rand(b, 1, generator=generator) < 0.5
            column = left + torch.where(flipped, torch.arange(w).flip(0), torch.arange(w))
            place = (top + torch.arange(h))[:, :, None] * side + column[:, None, :]
            images = padded.flatten(2).gather(2, place.reshape(b, 1, h * w).expand(b, c, h * w))
            yield images.reshape(b, c, h, w).float().mul_(scale).add_(shift), y[index]

    return epoch


def in_memory(pictures: Pictures, batch: int) -> Loader:
    """clframe, images in one tensor."""
    augment = AUGMENTATIONS.get("cifar")
    return _served(TensorSamples(pictures.x, pictures.y, BYTE_MEAN, BYTE_STD, augment), batch)


def read(pictures: Pictures, batch: int, *, workers: int) -> Loader:
    """clframe, images out of a torch dataset."""
    augment = AUGMENTATIONS.get("cifar")
    samples = DatasetSamples.of(
        Cifar(pictures), pictures.all_y, mean=BYTE_MEAN, std=BYTE_STD, augment=augment, num_workers=workers
    )
    return _served(samples.subset(pictures.index), batch)


def torch_loader(pictures: Pictures, batch: int, *, workers: int) -> Loader:
    """torch's DataLoader over a dataset with torchvision's transforms."""
    part = Subset(Cifar(pictures, torchvision_transform()), pictures.index.tolist())
    generator = Generator().manual_seed(SEED)
    stay = workers > 0
    loader = DataLoader(part, batch, shuffle=True, num_workers=workers, persistent_workers=stay, generator=generator)
    return lambda number: iter(loader)


def avalanche(pictures: Pictures, batch: int, *, workers: int = 0) -> Loader:
    """What Avalanche's ``Naive`` iterates over on a benchmark made as ``SplitCIFAR100`` makes it."""
    from avalanche.benchmarks import nc_benchmark
    from avalanche.training import Naive
    from avalanche.training.plugins import EvaluationPlugin

    data = Cifar(pictures)
    transform = torchvision_transform()
    count = pictures.experiences
    benchmark = nc_benchmark(
        data, data, count, task_labels=False, shuffle=False, train_transform=transform, eval_transform=transform
    )
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategy = Naive(
        model=model,
        optimizer=optimizer,
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=batch,
        evaluator=EvaluationPlugin(),
    )
    strategy.experience = benchmark.train_stream[0]
    strategy.train_dataset_adaptation()
    strategy.make_train_dataloader(num_workers=workers, persistent_workers=workers > 0)
    return lambda number: iter(strategy.dataloader)


def bytes_of(x: Tensor) -> Tensor:
    """Normalized images as the bytes they were."""
    scale, shift = _scale_shift()
    return x.sub(shift).div_(scale).round_().to(torch.uint8)


def _served(samples: Loadable, batch: int) -> Loader:
    loader = EpochLoader(samples, batch, shuffle=True, seed=SEED)

    def epoch(number: int) -> Epoch:
        loader.epoch = number
        return iter(loader)

    return epoch


def _scale_shift() -> tuple[Tensor, Tensor]:
    """``x * scale + shift`` normalizes bytes."""
    mean, std = (torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1) for v in (BYTE_MEAN, BYTE_STD))
    return (1 / std).float(), (-mean / std).float()


REFERENCE = "index loop by hand"
PEERS = {"processor": "Avalanche's loader", "wall": "Avalanche's loader, 2 workers"}
"""Whom the others' speed is compared with, by the clock that times them."""
CONTESTANTS: dict[str, Callable[[Pictures, int], Loader]] = {
    REFERENCE: by_windows,
    "index loop by hand, crops by `gather`": by_gather,
    "clframe, in memory": in_memory,
    "clframe, dataset": lambda p, b: read(p, b, workers=0),
    "torch DataLoader": lambda p, b: torch_loader(p, b, workers=0),
    PEERS["processor"]: avalanche,
    "clframe, dataset, 2 workers": lambda p, b: read(p, b, workers=2),
    "torch DataLoader, 2 workers": lambda p, b: torch_loader(p, b, workers=2),
    PEERS["wall"]: lambda p, b: avalanche(p, b, workers=2),
}
WITH_WORKERS = tuple(name for name in CONTESTANTS if name.endswith("workers"))
