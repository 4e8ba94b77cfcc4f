"""Growth of a run's costs with the length of its stream, and with the number of classes.

    python perf/growth.py                              # streams of 5, 20, 50 and 100 experiences; 10, 100 and 1,000 classes
    python perf/growth.py --experiences 5 50 500 --classes 10 1000 --strategy "er + exits" --json growth.json

Two tables. Streams: two new classes of 60 samples in each experience, so a step costs the same in all of them; the exponent of a column
is the slope of log(value) over log(experiences). Classes: one experience, of which the mean step is shown. Every row
is a separate process, with one thread. Columns:

step           seconds of training per step, mean of the last fifth of the experiences, in ms
first          the same of the first fifth, which shows growth inside a run
evaluation     seconds of the last evaluation, on all test experiences
checkpoint     bytes of the last checkpoint
report         processor seconds of ``clframe report`` on the run
memory         peak of the process
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FEATURES, EACH, TEST = 64, 60, 5
COLUMNS = {"step": ("ms", 1e3), "first": ("ms", 1e3), "evaluation": ("s", 1.0), "checkpoint": ("MB", 1e-6),
           "report": ("s", 1.0), "memory": ("MB", 1e-6)}  # fmt: skip


def write_data(path: Path, *, classes: int) -> None:
    """Write Gaussian blobs of as many classes."""
    generator = np.random.default_rng(0)
    centers_CF = generator.normal(size=(classes, FEATURES))

    def draw(each: int) -> tuple[Any, Any]:
        y_N = np.arange(classes).repeat(each)
        return (centers_CF[y_N] + generator.normal(size=(len(y_N), FEATURES))).astype(np.float32), y_N

    (x_train, y_train), (x_test, y_test) = draw(EACH), draw(TEST)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


def measure(strategy: str, *, experiences: int, classes: int, overrides: Sequence[str]) -> dict[str, float]:
    """Train one run in this process and return its row."""
    import torch

    import clframe

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder) / "blobs.npz", classes=classes)
        given = [
            f"strategy={strategy}", "benchmark=npz", f"benchmark.path={folder}/blobs.npz", f"benchmark.experiences={experiences}",
            "backbone=mlp", "backbone.width=64", "trainer.epochs=2", "trainer.threads=1", "trainer.progress=false",
            "trainer.loggers=[csv]", "trainer.figures=none", *overrides,
        ]  # fmt: skip
        run = Path(str(clframe.run("quickstart", given, output=Path(folder) / "runs").run_folder))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        ledger = json.loads((run / "ledger.json").read_text())["ledger"]
        seconds: dict[str, list[float]] = {}
        for row in ledger["times"]:
            if row["experience"] is not None:
                seconds.setdefault(row["phase"], []).append(row["seconds"])
        steps = json.loads((run / "results.json").read_text())["steps"] / experiences
        part = max(1, experiences // 5)
        subprocess.run([sys.executable, "-m", "clframe", "report", str(run), "--output", f"{folder}/report"],
                       check=True, capture_output=True)  # fmt: skip
        report = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            # The first experience of a process pays for what is loaded and compiled on first use.
            "step": statistics.mean(seconds["training"][-part:]) / steps,
            "first": statistics.mean(seconds["training"][1 : part + 1] or seconds["training"]) / steps,
            "evaluation": seconds["evaluation"][-1],
            "checkpoint": max(path.stat().st_size for path in (run / "checkpoints").iterdir()),
            "report": report.ru_utime + report.ru_stime,
            "memory": peak,
        }


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Return the least-squares slope of log(value) over log(size).

    >>> round(exponent([1, 10, 100], [2.0, 20.0, 200.0]), 6)
    1.0
    """
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean = statistics.mean(x)
    spread = sum((a - mean) ** 2 for a in x)
    return sum((a - mean) * b for a, b in zip(x, y, strict=True)) / spread if spread else math.nan


def table(title: str, rows: dict[int, dict[str, float]]) -> str:
    """Return the rows as Markdown, with a last row of exponents."""
    names = [f"{name}, {unit}" for name, (unit, _) in COLUMNS.items()]
    lines = [f"| {title} | {' | '.join(names)} |", "|---:|" + "---:|" * len(names)]
    for size, row in rows.items():
        lines.append(f"| {size:,} | {' | '.join(f'{row[name] * scale:.3g}' for name, (_, scale) in COLUMNS.items())} |")
    if len(rows) > 1:
        fits = [exponent(list(rows), [row[name] for row in rows.values()]) for name in COLUMNS]
        lines.append(f"| exponent | {' | '.join(f'{fit:+.2f}' for fit in fits)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiences", type=int, nargs="*", default=[5, 20, 50, 100])
    parser.add_argument("--classes", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--strategy", default="er(memory=1000)")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--one", type=int, nargs=2, metavar=("EXPERIENCES", "CLASSES"), help=argparse.SUPPRESS)
    parser.add_argument("--override", nargs="*", default=[], help="key=value for every run")
    options = parser.parse_args(arguments)
    if options.one:
        experiences, classes = options.one
        print(json.dumps(measure(options.strategy, experiences=experiences, classes=classes, overrides=options.override)))
        return

    def row(experiences: int, classes: int, *more: str) -> dict[str, float]:
        command = [sys.executable, __file__, "--strategy", options.strategy, "--one", str(experiences), str(classes),
                   "--override", *options.override, *more]  # fmt: skip
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    streams = {count: row(count, 2 * count) for count in options.experiences}
    print(table("experiences", streams) + "\n", flush=True)
    classes = {count: row(1, count) for count in options.classes}
    print(table("classes", classes))
    if options.json:
        options.json.write_text(json.dumps({"experiences": streams, "classes": classes}, indent=1))


if __name__ == "__main__":
    main()
