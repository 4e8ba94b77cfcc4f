"""Throughput of a sweep on one GPU and on all of them, with as many cells at a time on each.

    python perf/sweep_devices.py --data-dir DIR --per-device 4 --cells 8 --json sweep_devices.json

Cells are runs of ``er`` with a ResNet32 on Split CIFAR-100, one epoch, one seed each: ``--cells`` of them on one GPU,
then that many for each GPU on all. If GPUs do not slow one another down, both take the same time. Starts of processes
and reading of data are part of it, as in any sweep.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch


def run_sweep(devices: int, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Run a sweep on the first ``devices`` GPUs; returns its seconds and its cells."""
    cells = options.cells * devices
    command = [
        sys.executable, "-m", "clframe", "sweep", "split_cifar100", f"benchmark.data_dir={options.data_dir}", "strategy=er",
        "backbone=resnet32", "trainer.epochs=1", "trainer.batch_size=128", "trainer.figures=none", "trainer.loggers=[csv]",
        "trainer.threads=1", f"seed=0..{cells - 1}", "--device", "cuda", "--jobs", str(options.per_device * devices),
        "--per-device", str(options.per_device), "--folder", str(folder), "--quiet",
    ]  # fmt: skip
    visible = ",".join(map(str, range(devices)))
    start = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": visible}, stdout=sys.stderr)
    seconds = time.perf_counter() - start
    results = [json.loads(path.read_text()) for path in folder.rglob("results.json")]
    assert len(results) == cells, f"{len(results)} of {cells} cells ended"
    trained = sum(result["train_seconds"] for result in results)
    return {"devices": devices, "cells": cells, "seconds": round(seconds, 1), "training_seconds": round(trained, 1)}


def main() -> None:
    """Run both sweeps and print their throughput."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder of cifar100.npz or cifar-100-python")
    parser.add_argument("--per-device", type=int, default=4, help="cells at a time on each GPU")
    parser.add_argument("--cells", type=int, default=8, help="cells for each GPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for devices in (1, torch.cuda.device_count()):
            rows.append(run_sweep(devices, options, Path(place) / str(devices)))
            print(json.dumps(rows[-1]), flush=True)
    rates = [row["cells"] / row["seconds"] for row in rows]
    rows.append({"throughput / (GPUs x throughput of one)": round(rates[1] / (rates[0] * rows[1]["devices"]), 3)})
    print(json.dumps(rows[-1]))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
