"""Strategies, networks and images of the measurements on several devices; see data_parallel.py."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from clframe.core import parse
from clframe.data import Source, TensorSamples, class_incremental
from clframe.data.augmentation import AUGMENTATIONS
from clframe.nn import BACKBONES, Network
from clframe.training.distributed import Group
from clframe.training.launch import _fabric, _joined_fabric
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy

STRATEGIES: dict[str, tuple[str, ...]] = {
    "vit_b_16": (
        "naive", "er(memory=100)", "lwf", "derpp(memory=100)", "er(memory=100) + exits(every=3)",
        "er(memory=100) + moe(samples=64, epochs=1)",
    ),
    "resnet32": (
        "naive", "er(memory=2000)", "lwf", "derpp(memory=2000)", "er(memory=2000) + exits",
    ),  # experts need feed-forward networks
}  # fmt: skip
"""Strategies whose throughput is measured."""
MEAN, STD = (125.0,), (63.0,)


def label(expression: str) -> str:
    """Return a strategy without its options, as in ``--strategies``."""
    return re.sub(r"\([^)]*\)", "", expression)


class Settings:
    """Network and images of a measurement.

    Args:
        backbone: Its name.
        tiny: Whether to replace it by one that a CPU trains in milliseconds.
        batch: Samples of a batch.
        data: The file ``cifar100.npz`` for real images, enlarged where the backbone takes larger ones; None: random
            images.
    """

    def __init__(self, backbone: str, *, tiny: bool, batch: int, data: Path | None = None) -> None:
        self.backbone, self.batch, self.data = backbone, batch, data
        self.options: dict[str, Any] = {}
        side = 224 if backbone == "vit_b_16" else 32
        # Whole batches of every size that is measured, so that all steps of a setting are alike.
        self.images = 2_048 if backbone == "vit_b_16" else 4_864 if data else 5_120
        if tiny:
            side, self.images = 8, 64
            small = {"width": 8, "depth": 1, "patch": 4, "heads": 2}
            self.backbone, self.options = ("vit_tiny", small) if backbone == "vit_b_16" else ("small_cnn", {})
        self.shape = (3, side, side)

    @cached_property
    def backbone_made(self) -> Any:
        """The backbone, made once: its random weights take seconds."""
        return BACKBONES.get(self.backbone)(self.shape, **self.options)

    def make(self) -> Any:
        """Return a copy of the backbone."""
        return copy.deepcopy(self.backbone_made)

    @cached_property
    def benchmark(self) -> Any:
        """Two experiences of ten classes, for throughput."""
        x, y = self._first_images() if self.data else self._random_images()
        augment = AUGMENTATIONS.get("cifar") if self.shape[1] == 32 else ()
        train = TensorSamples(x, y, mean=MEAN, std=STD, augment=augment)
        test = TensorSamples(x[: self.images], y[: self.images], mean=MEAN, std=STD)
        return class_incremental(Source("images", train, test, classes=20), experiences=2, order="sorted")

    def selection(self, *, experiences: int, classes: int, images: int) -> Any:
        """Return a few images of Split CIFAR-100, not augmented, so that those trained on can be recognized.

        Args:
            experiences: Their number.
            classes: New classes of each.
            images: Training images of a class; there are half as many test images.
        """
        assert self.data is not None
        parts = []
        with np.load(self.data) as file:
            for part, count in (("train", images), ("test", (images + 1) // 2)):
                x, y = torch.from_numpy(file[f"{part}_x"]), torch.from_numpy(file[f"{part}_y"])
                rows = torch.cat([(y == c).nonzero()[:count, 0] for c in range(experiences * classes)])
                parts.append(TensorSamples(self._resize(x[rows]), y[rows], mean=MEAN, std=STD))
        train, test = parts
        source = Source("cifar100", train, test, classes=experiences * classes)
        return class_incremental(source, experiences=experiences, order="sorted")

    def _random_images(self) -> tuple[torch.Tensor, torch.Tensor]:
        count = 2 * self.images
        x = torch.randint(256, (count, *self.shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        return x, torch.arange(count) % 20

    def _first_images(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images of the first 20 classes of CIFAR-100, as many of each experience, all classes among the first ones."""
        assert self.data is not None
        with np.load(self.data) as file:
            x, y = torch.from_numpy(file["train_x"]), torch.from_numpy(file["train_y"])
        of_class = torch.stack([(y == c).nonzero()[:500, 0] for c in range(20)])
        rows = torch.stack([ten.T.flatten()[: self.images] for ten in of_class.split(10)]).T.flatten()
        return self._resize(x[rows]), y[rows]

    def _resize(self, x: torch.Tensor) -> torch.Tensor:
        """Return images [N, side, side, 3] as [N, 3, side, side] with pixels repeated, or left out in tiny ones."""
        x, side = x.permute(0, 3, 1, 2), self.shape[1]
        if side < x.shape[2]:
            step = x.shape[2] // side
            return x[:, :, ::step, ::step].contiguous()
        times = side // x.shape[2]
        return x.repeat_interleave(times, 2).repeat_interleave(times, 3).contiguous()


make_settings = cache(Settings)


def build(
    expression: str, data: Any, make: Callable[[], Any], *, device: torch.device, group: Group | None, precision: str,
    batch: int, epochs: int, capture: Any = False, plugins: Any = (), eval_batch: int = 256, sync_batchnorm: bool = False,
    rate: float = 0.01,
) -> LightningStrategy:  # fmt: skip
    """Return a strategy on one device, or on all of a group."""
    torch.manual_seed(0)
    fused = device.type == "cuda" and precision != "64-true"
    sgd = partial(torch.optim.SGD, lr=rate, momentum=0.9, fused=fused)
    module = ContinualModule(Network(make()), parse(expression), optimizer=sgd, seed=0, on_nonfinite="warn")
    if sync_batchnorm and group is not None:
        nn.SyncBatchNorm.convert_sync_batchnorm(module.network)
    if group is None:
        fabric = _fabric(device.type, [device.index] if device.type == "cuda" else 1, precision)
    else:
        fabric = _joined_fabric(group, precision)
    return LightningStrategy(
        model=module, benchmark=data, fabric=fabric, group=group, train_mb_size=batch, train_epochs=epochs,
        eval_mb_size=eval_batch, evaluator=None, capture=capture, plugins=list(plugins),
        channels_last=device.type == "cuda" and precision != "64-true",
    )  # fmt: skip
