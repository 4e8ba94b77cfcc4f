"""``clframe latency``."""

from __future__ import annotations

import argparse

from clframe.errors import ConfigError

NAME = "latency"
HELP = "time the predictions of a run"
WORDS = "RUN [RUN ...]"
DESCRIPTION = """\
Times the trained model of each run on its own test samples, after a warm-up and with device synchronization: the whole
network, the network up to each exit, and the exit policy of early_exit, on CUDA also by CUDA graphs. Prints medians,
95th percentiles and MACs, and writes them to RUN/latency.json, which `clframe report` includes.

  clframe latency runs/quickstart/er+lwf-seed0-20260101-120000                     batches of 1 and 32, on the CPU
  clframe latency RUN --batches 1,8,256 --device cuda --repeats 200
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("--batches", default="1,32", metavar="N,N", help="batch sizes (default: 1,32)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, mps or auto (default: cpu)")
    parser.add_argument("--repeats", type=int, default=30, metavar="N", help="timed calls of each (default: 30)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")


def act(options: argparse.Namespace) -> int:
    """Measure, write and print."""
    from clframe.config.trainer import MOST_THREADS
    from clframe.seeding import torch_settings
    from clframe.targets.latency import time_run

    runs = [word for word in options.words if "=" not in word]
    overrides = [word for word in options.words if "=" in word]
    if not runs:
        raise ConfigError("latency: found no run; give a run folder, such as the one clframe run printed")
    if options.threads is not None and not 1 <= options.threads <= MOST_THREADS:
        raise ConfigError(f"--threads: found {options.threads}; give a number from 1 to {MOST_THREADS}")
    with torch_settings(threads=options.threads):
        for run in runs:
            found = time_run(
                run, batches=_sizes(options.batches), device=options.device, repeats=options.repeats,
                overrides=overrides,
            )  # fmt: skip
            on = found.setting
            threads = "1 thread" if on.threads == 1 else f"{on.threads} threads"
            print(f"{run}: {on.device}, {threads}, {on.dtype}, {on.repeats} calls each")
            print(f"{'':24}{'batch':>7}{'p50, ms':>12}{'p95, ms':>12}{'samples/s':>12}{'MACs a sample':>16}")
            for row in found.rows:
                times = f"{1e3 * row.p50:12.3f}{1e3 * row.p95:12.3f}{row.throughput:12,.0f}"
                print(f"{row.way:24}{row.batch:7}{times}{row.macs:16,.0f}")
    return 0


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--batches: found '{text}'; give numbers such as 1,32") from None
