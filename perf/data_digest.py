"""Processor time to compute the digest by which a run recognizes its data.

    python perf/data_digest.py

Three streams, of the shapes of digits and CIFAR-100 in memory, and of 100,000 files that are read batch by batch, of
which names and sizes are read only. Digests are computed once per run, on one thread; the median of the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from clframe.data import Source, TensorSamples, class_incremental
from clframe.data.lazy import DatasetSamples


def in_memory(shape: tuple[int, ...], *, train: int, test: int, classes: int) -> Source:
    """Random bytes with equally many samples of each class."""
    parts = [
        TensorSamples(torch.randint(0, 256, (count, *shape), dtype=torch.uint8), torch.arange(count) % classes)
        for count in (train, test)
    ]
    return Source("random", parts[0], parts[1], classes)


def in_files(folder: Path, *, count: int, classes: int) -> Source:
    """Empty files; their inputs are never read."""
    for name in range(classes):
        (folder / f"{name:03d}").mkdir()
    paths = tuple(str(folder / f"{i % classes:03d}" / f"{i}.png") for i in range(count))
    for path in paths:
        Path(path).touch()
    labels = torch.arange(count) % classes
    everything = DatasetSamples.of(torch.zeros(count, 1, 1, 1, dtype=torch.uint8), labels, paths=paths)
    train, test = torch.arange(count).split([count - count // 6, count // 6])
    return Source("files", everything.subset(train), everything.subset(test), classes)


def main() -> None:
    """Print one row per stream."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        streams = {
            "digits, 5 experiences": (in_memory((1, 8, 8), train=1347, test=450, classes=10), 5),
            "CIFAR-100, 10 experiences": (in_memory((3, 32, 32), train=50_000, test=10_000, classes=100), 10),
            "100,000 files, 10 experiences": (in_files(Path(folder), count=100_000, classes=100), 10),
        }
        for name, (source, experiences) in streams.items():
            seconds = []
            for _ in range(repeats):
                benchmark = class_incremental(source, experiences=experiences)
                start = time.process_time()
                assert len(benchmark.digest.train) == experiences
                seconds.append(time.process_time() - start)
            print(f"{name:32} {1e3 * statistics.median(seconds):8.1f} ms")


if __name__ == "__main__":
    main()
