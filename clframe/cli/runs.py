"""``clframe runs``."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clframe.errors import ConfigError, RunFolderError, UnknownNameError, unknown_name

if TYPE_CHECKING:
    from clframe.run_states import RunState

NAME = "runs"
HELP = "list runs: strategy, accuracy, forgetting, cost, state"
WORDS = "[FILTER ...]"
DESCRIPTION = """\
Lists the runs in ./runs, newest first: their folder, strategy, benchmark, seed, final average accuracy, forgetting,
MACs per prediction, state (running, finished, stopped, failed, diverged, damaged) and age, which is the time since
the last line of the log; backbone and devices as well where they differ between the runs listed. A run is shown where
each word of FILTER is a component of its strategy, or begins a word in its folder, name, benchmark or backbone.

  clframe runs
  clframe runs er exits                  runs with er and exits; not those with er_ace or derpp
  clframe runs --sort accuracy           the most accurate first
  clframe runs resnet32                  runs with this backbone
  clframe runs cifar100 --best 3         the three most accurate finished runs of each benchmark
  clframe runs --output results
"""

_KEYS: dict[str, Callable[[RunState], Any]] = {
    "run": lambda run: str(run.path),
    "name": lambda run: run.name,
    "strategy": lambda run: run.strategy,
    "benchmark": lambda run: run.benchmark,
    "backbone": lambda run: run.backbone,
    "devices": lambda run: run.devices,
    "seed": lambda run: math.nan if run.seed is None else run.seed,
    "accuracy": lambda run: -run.accuracy,
    "forgetting": lambda run: run.forgetting,
    "macs": lambda run: run.macs,
    "state": lambda run: run.state,
    "age": lambda run: run.age,
}
"""Keys of ``--sort``: the best, smallest or first one comes first."""
_COLUMNS = (
    "run", "strategy", "benchmark", "backbone", "devices", "seed", "accuracy, %", "forgetting, %",
    "MACs per prediction", "age", "state",
)  # fmt: skip
_LEFT = ("run", "strategy", "benchmark", "backbone", "state")
_WHERE_DIFFERENT = ("backbone", "devices")
"""Columns that are shown only if two runs differ in them."""
_NUMBER = re.compile(r"[-+]?[0-9.]+")
_LABEL = re.compile(r"(^|/)[^/]*(-seed[0-9]+-[0-9]{8}-[0-9]{6})")
"""The end of the path of a run that was not given a folder, with the strategy in front."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("--sort", metavar="KEY", default="age", help=f"order: {', '.join(_KEYS)} (default: age)")
    parser.add_argument("--best", metavar="N", nargs="?", const="1", help="only the N (1) most accurate of a benchmark")
    parser.add_argument("--output", metavar="DIR", default="runs", help="folder of the runs (default: runs)")


def act(options: argparse.Namespace) -> int:
    """Print the table."""
    import time

    from clframe.run_states import find_folders, read_state

    words = list(options.words)
    if options.best is not None and not _NUMBER.fullmatch(options.best):
        words.append(options.best)  # `--best er`: a word of the filter
        options.best = "1"
    if options.best is not None and not (options.best.isdecimal() and int(options.best[:9]) > 0):
        raise ConfigError(f"--best: found '{options.best}'; give a number from 1")
    if options.sort not in _KEYS:
        raise UnknownNameError(unknown_name("key", options.sort, _KEYS, where="--sort"))
    output = Path(options.output).expanduser()
    try:
        folders = find_folders(output)
    except OSError as error:
        raise RunFolderError(
            f"--output: {output} cannot be listed ({error.strerror}); give the folder of the runs"
        ) from None
    now = time.time()
    runs = select([read_state(path, now=now) for path in folders], words, output=output)
    if options.best is not None:
        runs = best(runs, count=int(options.best[:9]))
    if not runs:
        print(f"no runs in {output}" + (f" with {' '.join(words)}" if words and folders else ""))
        return 0
    print(table(sort(runs, key=options.sort), output=output))
    return 0


def select(runs: Sequence[RunState], words: Sequence[str], *, output: Path) -> list[RunState]:
    """Return the runs that have each word: as a component, or at the start of a word of folder and names.

    Args:
        runs: All runs.
        words: Compared without regard to case; ``er+lwf`` are two components.
        output: The folder of the runs, relative to which their folders are shown.
    """
    return [run for run in runs if all(_has(run, word.lower(), output=output) for word in words)]


def _has(run: RunState, word: str, *, output: Path) -> bool:
    folder = run.path.relative_to(output).as_posix().lower()
    components = {part.partition("(")[0].strip() for part in run.strategy.lower().split("+")}
    if word == folder or components.issuperset(part.strip() for part in word.split("+")):
        return True
    if run.strategy:  # components in the name that a folder gets by itself are not compared again
        folder = _LABEL.sub(r"\1\2", folder)
    begins = re.compile(rf"(?<![^\W_]){re.escape(word)}")
    return any(begins.search(text.lower()) for text in (folder, run.name, run.benchmark, run.backbone))


def best(runs: Sequence[RunState], *, count: int) -> list[RunState]:
    """Return the ``count`` most accurate finished runs of each benchmark."""
    benchmarks: dict[str, list[RunState]] = {}
    for run in runs:
        if run.state == "finished" and not math.isnan(run.accuracy):
            benchmarks.setdefault(run.benchmark, []).append(run)
    return [run for group in benchmarks.values() for run in sort(group, key="accuracy")[:count]]


def sort(runs: Sequence[RunState], *, key: str) -> list[RunState]:
    """Return the runs by a key of ``--sort``; runs without it come last."""
    value = _KEYS[key]

    def order(run: RunState) -> tuple[bool, Any, str]:
        found = value(run)
        missing = found == "" or found != found
        return missing, "" if missing and isinstance(found, str) else 0 if missing else found, str(run.path)

    return sorted(runs, key=order)


def table(runs: Sequence[RunState], *, output: Path) -> str:
    """Render one line a run, however wide, so that it can be searched."""
    cells = [_cells(run, output) for run in runs]
    shown = [
        k for k, name in enumerate(_COLUMNS)
        if name not in _WHERE_DIFFERENT or len({row[k] for row in cells} - {"-"}) > 1
    ]  # fmt: skip
    rows = [_COLUMNS, *cells]
    widths = {k: max(len(row[k]) for row in rows) for k in shown}
    lines = [
        "  ".join(row[k].ljust(widths[k]) if _COLUMNS[k] in _LEFT else row[k].rjust(widths[k]) for k in shown)
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cells(run: RunState, output: Path) -> tuple[str, ...]:
    from clframe.printable import printable

    def number(value: float, form: str) -> str:
        return "-" if math.isnan(value) else format(value, form)

    texts = (
        str(run.path.relative_to(output)), run.strategy or "-", run.benchmark or "-", run.backbone or "-",
        run.devices or "-",
    )  # fmt: skip
    return (
        *map(printable, texts), "-" if run.seed is None else str(run.seed), number(100 * run.accuracy, ".1f"),
        number(100 * run.forgetting, ".1f"), number(run.macs, ",.0f"), format_age(run.age),
        printable(f"{run.state} {run.detail}" if run.state in ("running", "stopped") else f"{run.state}: {run.detail}")
        .removesuffix(": ").rstrip(),
    )  # fmt: skip


def format_age(seconds: float) -> str:
    """Format an age with one unit.

    >>> format_age(42), format_age(150), format_age(7300), format_age(3 * 86400)
    ('42 s', '2 min', '2 h', '3 d')
    """
    if math.isnan(seconds):
        return "-"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"
