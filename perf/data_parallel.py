"""One model on several devices: checks, and throughput against one device.

    python perf/data_parallel.py --json data_parallel.json                 # two GPUs, NCCL, at most 5 minutes
    python perf/data_parallel.py --cpu --tiny --json data_parallel.json    # two CPU processes, gloo, tiny networks
    python perf/data_parallel.py --only checks
    python perf/data_parallel.py --only checks --data cifar100.npz         # of the networks that are measured

Checks, each against one device with the same global batch, in float64: every new sample is trained on once per epoch,
also next to replayed ones; weights, replay buffers and other states are equal in all processes and those of one device
to a tolerance, as are the gradients of a step with teachers and replayed samples; accuracies are those of one device; a
run that is stopped on two devices, continued on one and finished on two ends like one that was not stopped. On GPUs
also, in single precision: recorded steps on all devices end with the weights of eager ones. The checks of strategies
train a small transformer on generated images; with ``--data`` they train ResNet32 (3x32x32) and ViT-B/16 (3x224x224)
on a few images of Split CIFAR-100, without the checks of resumption and of recorded steps. On GPUs batch normalization
uses the statistics of the whole batch. On CPUs, where torch cannot synchronize them, it uses those of a process'
share, so that one device is not equal, and ``equal_to_one_device`` is null.

Throughput, in new samples a second, with random images (``--data``: CIFAR-100) in the memory of each device: ResNet32
on 3x32x32 and ViT-B/16 on 3x224x224, for each strategy in its second experience, so that there are teachers and full
replay buffers.

one          one device; steps recorded as CUDA graphs where possible
same share   all devices, and as many samples for each as for one
same batch   all devices, and the global batch of one
..., eager   the same without recorded steps
average_ms   time of averaging gradients alone, without a backward pass next to it
eval         test samples a second of an evaluation

Replay buffers, in milliseconds an experience; drawing replayed samples is part of the step:

buffer_select_ms     selecting samples at the end of the experience, with the logits or features that are stored
buffer_exchange_ms   sending the buffer of the first process to the others, at the begin and at the end of an experience
buffer_check_ms      comparing checksums of the buffers of all processes, after every epoch
buffer_mib           its size

Measurements are in the order of their importance; those that the time does not allow are listed as skipped.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from data_parallel_checks import (
    CHECKED,
    CHECKED_IMAGES,
    RECORDED,
    TOLERANCES,
    check_recorded,
    check_resumption,
    check_strategy,
    image_check,
    small_check,
)
from data_parallel_settings import STRATEGIES, Settings, label, make_settings
from data_parallel_throughput import throughput

from clframe.seeding import torch_settings
from clframe.training.distributed import Group
from clframe.training.rendezvous import join_group, open_store

NAMES = ("one", "same share", "same batch", "one, eager", "same share, eager")
"""Settings of each strategy's throughput."""


class Writer:
    """Appends rows to a file and prints them; in the first process only."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        self._path, self._writes = path, writes

    def add(self, row: dict[str, Any]) -> None:
        """Add a row."""
        if self._writes:
            print(json.dumps(row), flush=True)
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def work(options: argparse.Namespace, rank: int, port: int, size: int) -> None:
    """Check and measure, together with the other processes."""
    cuda = not options.cpu
    devices = [torch.device("cuda", index) if cuda else torch.device("cpu") for index in range(size)]
    group = join_group(open_store(port, size=size, first=rank == 0), rank=rank, devices=devices)
    writer, device = Writer(options.rows, writes=rank == 0), devices[rank]
    end = options.started + 60 * options.minutes - 15

    def is_late() -> bool:
        return bool(group.agree({"late": float(time.time() > end)})["late"])

    def attempt(row: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if is_late():
            row = {**row, "skipped": "no time left"}
        else:
            start = time.perf_counter()
            try:
                row = {**row, **measure()}
            except Exception as error:  # one that fails must not hide the others
                traceback.print_exc()
                row = {**row, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            row["seconds"] = round(time.perf_counter() - start, 1)
            gc.collect()  # runs refer to themselves, and those of ViT-B/16 take gigabytes
        writer.add(row)
        return row

    def check_small(expression: str) -> dict[str, Any]:
        return check_strategy(expression, small_check(), device=device, group=group)

    if options.only in ("all", "checks"):
        with torch_settings(threads=1, deterministic=False, cuda=cuda):
            if options.data:
                _check_images(options, device, group, attempt)
            else:
                for expression in filter(options.wants, CHECKED):
                    attempt({"check": expression}, partial(check_small, expression))
        with torch_settings(threads=1, deterministic=True, cuda=cuda):
            for expression in filter(options.wants, RECORDED) if cuda and not options.data else ():
                measure = partial(check_recorded, expression, device=device, group=group)
                attempt({"check": f"recorded {expression}"}, measure)
    if options.only in ("all", "throughput"):
        with torch_settings(threads=1 if options.cpu else 4, deterministic=False, cuda=cuda):
            rows = zip_longest(*([(b, s) for s in STRATEGIES[b] if options.wants(s)] for b in options.backbones))
            for backbone, expression in filter(None, chain.from_iterable(rows)):
                _measure_row(options, backbone, _fitting(expression, tiny=options.tiny), device, group, attempt)
    group.barrier()
    group.close()


def _fitting(expression: str, *, tiny: bool) -> str:
    """Return a strategy for a network of one block, if it is tiny."""
    return expression.replace("every=3", "every=1") if tiny else expression


def _settings(options: argparse.Namespace, backbone: str) -> Settings:
    return make_settings(backbone, tiny=options.tiny, batch=options.batch[backbone], data=options.data)


def _check_images(options: argparse.Namespace, device: torch.device, group: Group, attempt: Any) -> None:
    """Check the networks that are measured, on a few images."""
    for backbone in options.backbones:
        checked = image_check(
            _settings(options, backbone), precision=options.check_precision, experiences=options.check_experiences,
            classes=options.check_classes, images=options.check_images, epochs=options.check_epochs,
            rate=options.check_rate,
        )  # fmt: skip
        for expression in filter(options.wants, CHECKED_IMAGES[backbone]):
            expression = _fitting(expression, tiny=options.tiny)
            attempt(
                {"check": f"{expression}, {checked.name}"},
                partial(check_strategy, expression, checked, device=device, group=group),
            )


def _measure_row(
    options: argparse.Namespace, backbone: str, expression: str, device: torch.device, group: Group, attempt: Any
) -> None:
    batch, settings = options.batch[backbone], _settings(options, backbone)
    precision = "32-true" if options.cpu or backbone == "resnet32" else options.precision
    base = {"backbone": backbone, "strategy": expression, "precision": precision}
    for name in NAMES:
        if name not in options.settings or (options.cpu and "eager" in name):
            continue
        size = batch * group.size if name.startswith("same share") else batch
        capture: Any = False if "eager" in name else "auto"
        each = None if name.startswith("one") else group

        def measure(each: Any = each, size: int = size, capture: Any = capture) -> dict[str, Any]:
            # A process that measures alone runs on every device, so that all have the same work.
            return throughput(
                expression, settings, batch=size, device=device, group=each, capture=capture, precision=precision,
                seconds=options.seconds, evaluates=expression == "naive",
            )  # fmt: skip

        attempt({**base, "setting": name, "global_batch": size, "devices": 1 if each is None else group.size}, measure)


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the speed-ups over one device."""
    table = []
    for key in dict.fromkeys((r["backbone"], r["strategy"]) for r in rows if "setting" in r and "rate" in r):
        mine = {r["setting"]: r for r in rows if (r.get("backbone"), r.get("strategy")) == key and "rate" in r}
        one = mine.get("one")
        if one is None:
            continue
        line: dict[str, Any] = {"backbone": key[0], "strategy": key[1], "one": one["rate"]}
        for name, row in mine.items():
            if name != "one":
                line[f"{name} / one"] = round(row["rate"] / one["rate"], 2)
            if "eval" in row and "eval" in one:
                line[f"eval, {name} / one"] = round(row["eval"] / one["eval"], 2)
        table.append(line)
    return table


def main() -> None:
    """Start the processes and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="CPU processes with gloo")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and images")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=5.0, help="time for all of it")
    parser.add_argument("--seconds", type=float, default=1.5, help="time of each measurement")
    parser.add_argument("--only", choices=("all", "checks", "throughput"), default="all")
    parser.add_argument("--backbones", nargs="+", default=["vit_b_16", "resnet32"], choices=sorted(STRATEGIES))
    parser.add_argument("--vit-batch", type=int, default=64)
    parser.add_argument("--resnet-batch", type=int, default=128)
    parser.add_argument("--precision", default="bf16-mixed", help="of vit_b_16")
    parser.add_argument("--strategies", nargs="+", metavar="NAME", choices=sorted({*map(label, CHECKED)}),
                        help="only these, without options, such as \"er + exits\"")  # fmt: skip
    parser.add_argument("--settings", nargs="+", default=NAMES, choices=NAMES, metavar="NAME",
                        help="of the throughput: " + "; ".join(NAMES))  # fmt: skip
    parser.add_argument("--data", type=Path, help="cifar100.npz: throughput and checks on real images")
    parser.add_argument("--check-experiences", type=int, default=3, help="of the checks with --data")
    parser.add_argument("--check-classes", type=int, default=3, help="new classes of each experience")
    parser.add_argument("--check-images", type=int, default=13, help="training images of each class; resnet32 equals one "
                        "device where the last batch of 8, and of 4, has at least 2 for each device, replayed ones "
                        "included")  # fmt: skip
    parser.add_argument("--check-epochs", type=int, default=2, help="epochs of each experience")
    parser.add_argument("--check-rate", type=float, default=0.01, help="learning rate; at 0.01 differences of rounding in "
                        "resnet32 grow to 0.05 within 60 steps")  # fmt: skip
    parser.add_argument("--check-precision", choices=sorted(TOLERANCES), default="64-true", help="tolerances: "
                        + ", ".join(f"{value:g} in {name}" for name, value in TOLERANCES.items()))  # fmt: skip
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)  # rank, port, file of rows, time of the start
    options = parser.parse_args()
    options.batch = {"vit_b_16": options.vit_batch, "resnet32": options.resnet_batch}
    if options.tiny:
        options.batch = {"vit_b_16": 8, "resnet32": 8}
    options.wants = lambda expression: not options.strategies or label(expression) in options.strategies
    warnings.filterwarnings("ignore")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products on CUDA
    logging.getLogger("clframe").setLevel(logging.WARNING)
    if options.worker:
        rank, port, rows, started = options.worker
        options.rows, options.started = Path(rows), float(started)
        work(options, int(rank), int(port), options.devices)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes are ended, too
    started, rows = time.time(), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.touch()
        if options.only in ("all", "checks") and not options.data:
            try:
                rows.append(check_resumption(cuda=not options.cpu, devices=options.devices))
            except Exception as error:
                traceback.print_exc()
                rows.append({"check": "resume", "failed": f"{type(error).__name__}: {error}"})
            rows[-1]["seconds"] = round(time.time() - started, 1)
            print(json.dumps(rows[-1]), flush=True)
        port = _free_port()
        command = [sys.executable, __file__, *sys.argv[1:]]
        workers = [
            subprocess.Popen([*command, "--worker", str(rank), str(port), str(path), str(started)], env=dict(os.environ))
            for rank in range(options.devices)
        ]
        try:
            while any(worker.poll() is None for worker in workers):
                late = time.time() > started + 60 * options.minutes + 30
                if late or any(worker.poll() not in (None, 0) for worker in workers):
                    print("a process has failed or has no time left; the others are ended", file=sys.stderr)
                    break
                time.sleep(0.5)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        rows += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    table = summarize(rows)
    for line in table:
        print(json.dumps(line))
    if options.json:
        report = {
            "command": sys.argv, "torch": str(torch.__version__), "minutes": (time.time() - started) / 60, "rows": rows,
            "speedups": table, "device": "cpu" if options.cpu else torch.cuda.get_device_name(),
        }  # fmt: skip
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
