"""The data race: one experience of images the size of CIFAR's, cropped and flipped, through every loader.

    python perf/data_race.py                        # random images
    python perf/data_race.py --data-dir data        # those of data/cifar100.npz
    python perf/data_race.py --batch 32 --quick     # one batch size, fewer repetitions

Every contestant (loaders.py) serves all samples of the first of ten experiences once, in an order of its own, padded
and cropped, flipped and normalized, on one thread. Those that read in the race's own process take turns every few
batches and are timed in processor time; those with workers take turns epoch by epoch with the reference and are
timed by the clock on the wall, because their work is done elsewhere. Workers are started before and stay.
Ratios are taken within a repetition, to the reference timed the same way, and their median over repetitions is
reported, so that what slows the machine slows everybody.

First of all everybody serves images that tell which they are, and there is no race unless each comes exactly once
and clframe's batches are those of the loop written by hand, bit for bit.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from loaders import CONTESTANTS, PEERS, REFERENCE, WITH_WORKERS, Epoch, Loader, Pictures, bytes_of
from torch import Tensor

BATCHES = (10, 32, 128)
IMAGES, CLASSES, EXPERIENCES = 50_000, 100, 10

Seconds = dict[str, list[float]]


def images(data_dir: Path | None) -> Pictures:
    """CIFAR-100's training images, or as many random ones."""
    if data_dir is None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(256, (IMAGES, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return Pictures(x, torch.arange(IMAGES) % CLASSES, experiences=EXPERIENCES)
    with np.load(data_dir / "cifar100.npz") as arrays:
        x, y = (torch.from_numpy(arrays[key]) for key in ("x_train", "y_train"))
    x = x if x.shape[1] == 3 else x.permute(0, 3, 1, 2).contiguous()
    return Pictures(x, y.long(), experiences=EXPERIENCES)


def numbered(count: int = 240) -> Pictures:
    """Images of one color each, by which :func:`served` knows them again; half of them in the first experience."""
    shade_N = torch.arange(1, count + 1, dtype=torch.uint8)
    x = shade_N.reshape(-1, 1, 1, 1).expand(count, 3, 32, 32).contiguous()
    return Pictures(x, torch.arange(count) % 4, experiences=2)


def served(epoch: Epoch) -> Tensor:
    """The shades of the images of an epoch, ascending: crops leave the middle of an image inside."""
    shades = [bytes_of(x)[:, 0, 16, 16] for x, *_ in epoch]
    return torch.cat(shades).sort().values


def check(pictures: Pictures, *, batch: int) -> str:
    """Whether everybody serves every sample once, and clframe what the loop by hand does.

    Raises:
        SystemExit: Somebody does not.
    """
    expected = pictures.x[:, 0, 0, 0].sort().values
    for name, make in CONTESTANTS.items():
        found = served(make(pictures, batch)(0))
        if not torch.equal(found, expected):
            raise SystemExit(f"{name}: serves {found.tolist()} instead of {expected.tolist()}")
    identical = [name for name in CONTESTANTS if name == REFERENCE or name.startswith("clframe")]
    for epoch in range(2):
        runs = [CONTESTANTS[name](pictures, batch)(epoch) for name in identical]
        for batches in zip(*runs, strict=True):
            for name, (x, y) in zip(identical, batches, strict=True):
                if not (torch.equal(x, batches[0][0]) and torch.equal(y, batches[0][1])):
                    raise SystemExit(f"{name}: other batches than those of {REFERENCE}")
    return f"{len(CONTESTANTS)} loaders serve every sample once; the batches of {len(identical)} are equal bit for bit"


def relay(loaders: dict[str, Loader], number: int, *, leg: int) -> tuple[dict[str, float], dict[str, int]]:
    """Processor seconds and samples of an epoch of each loader, in turns of ``leg`` batches.

    Whose turn comes after whose is drawn anew every round: a slow predecessor leaves cold caches behind.
    """
    draw = random.Random(number)
    seconds, samples = dict.fromkeys(loaders, 0.0), dict.fromkeys(loaders, 0)
    running: dict[str, Epoch] = {}
    for name, loader in loaders.items():
        begin = time.thread_time()
        running[name] = loader(number)
        seconds[name] += time.thread_time() - begin
    while running:
        for name in draw.sample(list(running), len(running)):
            batches = running[name]
            begin = time.thread_time()
            count = leg
            while count and (batch := next(batches, None)) is not None:
                samples[name] += len(batch[1])
                count -= 1
            seconds[name] += time.thread_time() - begin
            if count:
                del running[name]
    return seconds, samples


def whole(loader: Loader, number: int) -> float:
    """Seconds on the wall of an epoch."""
    begin = time.perf_counter()
    for _ in loader(number):
        pass
    return time.perf_counter() - begin


def race(pictures: Pictures, names: list[str], *, batch: int, repeats: int, leg: int) -> tuple[Seconds, Seconds]:
    """Seconds of an epoch of every contestant in every repetition; one lap before does not count.

    Returns:
        Processor seconds of those without workers; seconds on the wall of those with workers and of the reference.
    """
    loaders = {name: CONTESTANTS[name](pictures, batch) for name in names}
    alone = [name for name in names if name not in WITH_WORKERS]
    beside = [name for name in names if name in WITH_WORKERS]
    processor: Seconds = {name: [] for name in alone}
    wall: Seconds = {name: [] for name in (REFERENCE, *beside)} if beside else {}
    for lap in range(repeats + 1):
        gc.collect()
        taken, samples = relay({name: loaders[name] for name in alone}, lap, leg=leg)
        assert set(samples.values()) == {len(pictures)}
        elapsed = {name: whole(loaders[name], lap) for name in wall}
        if lap:
            for name, value in taken.items():
                processor[name].append(value)
            for name, value in elapsed.items():
                wall[name].append(value)
    return processor, wall


def summarize(processor: Seconds, wall: Seconds, *, samples: int) -> list[dict[str, Any]]:
    """Medians of paired ratios: time over the reference's, speed over Avalanche's with as many workers."""
    rows = []
    for clock, seconds in (("processor", processor), ("wall", wall)):
        for name, own in seconds.items():
            if clock == "wall" and name == REFERENCE:
                continue
            peer = seconds.get(PEERS[clock])
            speeds = [] if peer is None else [b / a for a, b in zip(own, peer, strict=True)]
            reference = seconds[REFERENCE]
            row = {
                "loader": name,
                "clock": clock,
                "samples_per_second": samples / statistics.median(own),
                "time_over_reference": _spread([a / b for a, b in zip(own, reference, strict=True)]),
                "speed_over_avalanche": _spread(speeds) if speeds else None,
            }
            rows.append(row)
    return rows


def _spread(ratios: list[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| loader | clock | samples/s | time / index loop (min-max) | speed / Avalanche (min-max) |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        ratios = [
            "-" if r is None else f"{r['median']:.2f} ({r['min']:.2f}-{r['max']:.2f})"
            for r in (row["time_over_reference"], row["speed_over_avalanche"])
        ]
        rate = f"{row['samples_per_second']:.0f}"
        lines.append(f"| {' | '.join([row['loader'], row['clock'], rate, *ratios])} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batch", type=int, action="append", help="batch size; may be repeated (10, 32 and 128)")
    parser.add_argument("--data-dir", type=Path, help="folder of cifar100.npz; random images without it")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="three repetitions")
    parser.add_argument(
        "--only", default="", help="only the reference and loaders with one of these texts in their names"
    )
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    warnings.showwarning = lambda *_, **__: None  # Avalanche warns of its own deprecations, filters or not
    torch.set_num_threads(1)
    pictures = images(options.data_dir)
    repeats = 3 if options.quick else options.repeats
    texts = options.only.split(",")
    names = [n for n in CONTESTANTS if n == REFERENCE or any(text in n for text in texts)]
    result: dict[str, Any] = {
        "data": "random" if options.data_dir is None else "cifar100",
        "images": len(pictures.all_x),
        "samples": len(pictures),
        "repeats": repeats,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": 1,
    }
    print(f"{len(pictures)} of {len(pictures.all_x)} images, {repeats} repetitions")
    for batch in options.batch or BATCHES:
        print(f"\nbatch {batch}: {check(numbered(), batch=batch)}\n", flush=True)
        leg = max(1, 640 // batch)
        seconds = race(pictures, names, batch=batch, repeats=repeats, leg=leg)
        result[f"batch_{batch}"] = rows = summarize(*seconds, samples=len(pictures))
        print(table(rows), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
