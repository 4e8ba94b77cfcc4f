"""``clframe latency``."""

from __future__ import annotations

import argparse

from clframe.errors import ConfigError

NAME = "latency"
HELP = "measure how long predictions of a run take"
WORDS = "RUN [RUN ...]"
DESCRIPTION = """\
Times the trained model of each run on its own test samples, after a warm-up and with the device waited for: the whole
network, as far as each exit, and under the policy of early_exit. Prints medians and 95th percentiles with the MACs
beside them and writes them to RUN/latency.json, from where `clframe report` shows them.

  clframe latency runs/quickstart/20260101-120000-seed0                     batches of 1 and 32, on the CPU
  clframe latency RUN --batches 1,8,256 --device cuda --repeats 200
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--batches", default="1,32", metavar="N,N", help="sizes of batches (1,32)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default), cuda, cuda:N, mps, auto")
    parser.add_argument("--repeats", type=int, default=30, metavar="N", help="timed calls of each (30)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (as it has them)")


def act(options: argparse.Namespace) -> int:
    """Measure, write, print."""
    from clframe.seeding import torch_settings
    from clframe.targets.latency import time_run

    runs = [word for word in options.words if "=" not in word]
    overrides = [word for word in options.words if "=" in word]
    if not runs:
        raise ConfigError("latency: found no run; give a run folder, such as the one clframe run printed")
    if options.threads is not None and options.threads < 1:
        raise ConfigError(f"--threads: found {options.threads}; give 1 or more")
    with torch_settings(threads=options.threads):
        for run in runs:
            found = time_run(
                run, batches=_sizes(options.batches), device=options.device, repeats=options.repeats,
                overrides=overrides,
            )  # fmt: skip
            on = found.setting
            print(f"{run}: {on.device}, {on.threads} threads, {on.dtype}, {on.repeats} calls each")
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
