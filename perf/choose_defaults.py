"""Defaults that no paper gives, chosen on validation data: accuracy of every candidate, and the best of them.

    python perf/choose_defaults.py --data-dir DATA --out RESULTS --workers 2
    python perf/choose_defaults.py ... --components sparsity --seeds 100 101 102 103 104

Every run is a cell (``cells.py``): the command resumes where it stopped, and a second call only prints. A fifth of the
training samples is held out and answered; test data is never read. The grids are in ``default_grids.py``; seeds
are none of those of any reported table. Best is the highest mean over settings and seeds; chosen is the first candidate
within one standard error of it (of paired differences), and what is published where the best is not more than three
above that: the best of a dozen passes two by chance. For a component whose rule is ``largest`` (sparsity) it is the
largest value whose mean is at most one standard error below that of the smallest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from cells import Cell, finished, run_cell, run_cells
from default_grids import GRIDS, SETTINGS, Grid, Options

PER_CLASS = 1000
"""Images of each class of MNIST's training part that stand for it."""
Found = Mapping[str, Sequence[float]]
"""Setting -> one number for each seed."""


def mnist_subset(out: Path, *, data_dir: str | None) -> Path:
    """The file that stands for MNIST, made where there is none yet; what lies in it is of the training part only."""
    import io

    import numpy as np
    import torch

    from clframe.data import SOURCES
    from clframe.files import write_atomically

    path = out / f"mnist{PER_CLASS}.npz"
    if not path.exists():
        source = SOURCES.get("mnist")(**({"data_dir": data_dir, "download": False} if data_dir else {}))
        chosen = [(source.train.y == c).nonzero().flatten()[:PER_CLASS] for c in range(source.classes)]
        index = torch.cat(chosen)
        buffer = io.BytesIO()
        np.savez(buffer, x=source.train.raw(index).numpy(), y=source.train.y[index].numpy())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
    return path


def cell(component: str, setting: str, options: Options, seed: int, *, subset: Path) -> Cell:
    """The run of one candidate in one setting."""
    grid, tried = GRIDS[component], SETTINGS[setting]
    expression = f"{component}({', '.join(f'{key}={value!r}' for key, value in options.items())})"
    overrides = [f"strategy={' + '.join(part for part in (expression, grid.beside) if part)}", *tried.overrides]
    if setting.startswith("mnist"):  # of the samples that are not held out, a hundredth would be tested on
        overrides += ["benchmark.name=npz", "benchmark.test_fraction=0.01", f"benchmark.path={subset}"]
    overrides += ["benchmark.validation=0.2", "benchmark.evaluate=validation", "trainer.accelerator=cpu"]
    overrides += ["trainer.threads=1", "trainer.progress=false", "trainer.loggers=[csv]"]
    return Cell(f"{component} {setting.replace(', ', '_')}", tried.config, tuple(overrides), seed)


def measured(one: Cell, out: Path) -> Path:
    """Run a cell, and count the hidden activations that its model leaves at zero on validation data."""
    results = run_cell(one, out)
    path = results.parent / "zeros.json"
    if not path.exists():
        import clframe
        from clframe.build import build
        from clframe.files import write_atomically
        from clframe.sparsity import experience_activity

        experiences = build(clframe.load_config(str(results.parent / "config.yaml"))).benchmark.validation
        activities = experience_activity(clframe.load(results.parent).network, experiences, value=1.0)
        shares = [statistics.mean(activity.sparsity.values()) for activity in activities]
        write_atomically(path, json.dumps(statistics.mean(shares)).encode())
    return results


def done(one: Cell, out: Path) -> Path | None:
    """The results of a cell that has been run and measured."""
    results = finished(one, out)
    return results if results is not None and (results.parent / "zeros.json").exists() else None


@dataclass(frozen=True)
class Row:
    """One candidate's validation accuracy in percent, and its share of hidden activations that are zero."""

    options: Options
    accuracy: Found
    zeros: Found

    @property
    def mean(self) -> float:
        """Over the settings, each of the same weight."""
        return statistics.mean(statistics.mean(values) for values in self.accuracy.values())

    @property
    def error(self) -> float:
        """Standard error of the mean over the settings, from the spread of the seeds within each."""
        variances = [statistics.variance(values) / len(values) for values in self.accuracy.values()]
        return sqrt(sum(variances)) / len(variances)

    def above(self, other: Row) -> Row:
        """The paired differences from another row, as one."""
        pairs = {name: zip(self.accuracy[name], other.accuracy[name], strict=True) for name in self.accuracy}
        return Row(self.options, {name: [a - b for a, b in pair] for name, pair in pairs.items()}, {})


def chosen(rows: Sequence[Row], grid: Grid) -> Row:
    """The row to take by a grid's rule."""
    base = published(rows, grid)
    if grid.rule == "best":
        best = max(rows, key=lambda row: row.mean)
        ahead = best.above(base)
        if ahead.mean <= 3 * ahead.error:
            return base
        return next(row for row in rows if best.above(row).mean <= best.above(row).error)
    (key,) = base.options
    near = [row for row in rows if row.mean >= base.mean - base.error]
    return max(near, key=lambda row: row.options[key])


def published(rows: Sequence[Row], grid: Grid) -> Row:
    """The row of what is published."""
    return next(row for row in rows if {**grid.published, **row.options} == grid.published)


def table(component: str, rows: Sequence[Row]) -> str:
    """A component's candidates as Markdown."""
    settings = GRIDS[component].settings
    heading = f"| options | {' | '.join(settings)} | mean | over the published | zeros, % |"
    lines = [f"### {component}", "", heading, "|---|" + "---:|" * (len(settings) + 3)]
    base = published(rows, GRIDS[component])
    for row in rows:
        difference = row.above(base)
        over = "-" if row is base else f"{difference.mean:+.1f} (SE {difference.error:.1f})"
        options = ", ".join(f"{key} {value:g}" for key, value in row.options.items())
        spread = [f"{statistics.mean(v):.1f} ± {statistics.stdev(v):.1f}" for v in row.accuracy.values()]
        zeros = " / ".join(f"{statistics.mean(values):.0f}" for values in row.zeros.values())
        lines.append(f"| {options} | {' | '.join(spread)} | {row.mean:.1f} | {over} | {zeros} |")
    best = chosen(rows, GRIDS[component])
    lines += [
        "",
        f"chosen: {', '.join(f'{key} {value:g}' for key, value in best.options.items())} ({best.mean:.1f}, SE {best.error:.1f})",
    ]
    return "\n".join(lines)


def _final_average_accuracy(path: Path) -> float:
    content = json.loads(path.read_text())
    return float(content.get("metrics", content)["final_average_accuracy"])  # runs before schema version 2 have no metrics


def read(component: str, wanted: Mapping[tuple[str, int], list[Path]]) -> list[Row]:
    """The rows of a component whose cells have all been run; ``wanted`` holds results by setting and candidate."""
    rows = []
    for number, options in enumerate(GRIDS[component].candidates):
        accuracy, zeros = {}, {}
        for setting in GRIDS[component].settings:
            paths = wanted[setting, number]
            accuracy[setting] = [100 * _final_average_accuracy(path) for path in paths]
            zeros[setting] = [100 * json.loads((path.parent / "zeros.json").read_text()) for path in paths]
        rows.append(Row(options, accuracy, zeros))
    return rows


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder of MNIST/raw, or of mnist.npz")
    parser.add_argument("--out", type=Path, default=Path("runs/defaults"))
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102], help="at least two")
    parser.add_argument("--components", nargs="+", choices=GRIDS, default=list(GRIDS))
    options = parser.parse_args()
    subset = mnist_subset(options.out, data_dir=options.data_dir)
    start, seconds = time.perf_counter(), 0.0
    for component in options.components:
        grid, keys = GRIDS[component], {}
        for seed in options.seeds:
            for number, candidate in enumerate(grid.candidates):
                for setting in grid.settings:
                    keys[cell(component, setting, candidate, seed, subset=subset)] = setting, number
        found: dict[tuple[str, int], list[Path]] = {key: [] for key in keys.values()}
        # Starting a process takes longer than a cell, so one serves all of them.
        runs = run_cells(list(keys), options.out, workers=options.workers, run=measured, done=done, share_processes=True)
        for one, path in sorted(runs, key=lambda pair: pair[0].seed):
            found[keys[one]].append(path)
            seconds += json.loads(path.read_text())["train_seconds"]
        print(table(component, read(component, found)) + "\n", flush=True)
    print(f"{seconds / 60:.1f} minutes of training, {(time.perf_counter() - start) / 60:.1f} minutes for this call")


if __name__ == "__main__":
    main()
