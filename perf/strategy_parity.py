"""Beside Avalanche's own strategies: final accuracy of each method on both sides, same data, seeds and first weights.

    python perf/strategy_parity.py --data-dir DATA --out RESULTS --workers 2
    python perf/strategy_parity.py ... --methods EWC SI --seeds 0 1 2 3 4 5 6 7 8 9

Every run is a cell (``cells.py``): the command resumes where it stopped, and a second call only prints. A seed decides
the order of classes, the first weights of the body and all that is random. ``agnostic`` is the answer among all
classes, ``aware`` that among the classes of the sample's own experience. A difference is that of the means over
seeds, ours minus Avalanche's; its standard error is that of the paired differences. With five seeds one equal pair
in nine lies outside two standard errors by chance. Rows such as "EWC by sample" are Avalanche's with its definition changed to ours.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from math import sqrt
from pathlib import Path

import peer_bic
import peer_changes
import peer_course
import peer_runs
import peer_strategies
from cells import run_cells
from peer_course import SETTINGS
from peer_strategies import METHODS

SIDES = ("ours", "theirs")
MEASURES = ("agnostic", "aware")
FUTURE = "from __future__ import annotations"
"""Stands at the head of each module; that of several joined has none."""
Found = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Side -> seed -> measure -> accuracy in percent."""


@dataclass(frozen=True)
class Duel:
    """One side's run of one method."""

    data: str
    method: str
    side: str
    seed: int
    data_dir: str | None = None

    @property
    def label(self) -> str:
        return f"{self.data}, {self.method}, {self.side}"

    def path(self, out: Path) -> Path:
        """Its results; another definition of either side is another file, and rows with the same of ours share it."""
        setting, method = SETTINGS[self.data], METHODS[self.method]
        ours = method.ours(setting)
        row = f"{ours} {'growing' if method.growing else 'fixed'}" if self.side == "ours" else self.method
        content = json.dumps([asdict(setting), ours, definitions()])
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        name = "".join(c if c.isalnum() else "-" for c in f"{self.data}-{row}-{self.side}")
        return out / f"{name}-{digest}" / f"seed{self.seed}.json"


@cache
def definitions() -> str:
    """The code of both sides, without what is said about it: sentences, unlike names, have spaces."""
    modules = (peer_course, peer_changes, peer_bic, peer_strategies, peer_runs)
    tree = ast.parse("\n".join(inspect.getsource(module) for module in modules).replace(FUTURE, ""))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            node.value = ""
    return ast.dump(tree)


def finished(duel: Duel, out: Path) -> Path | None:
    """The duel's results, if it has been run."""
    path = duel.path(out)
    return path if path.exists() else None


def run_duel(duel: Duel, out: Path) -> Path:
    """The duel's results, run where there are none yet."""
    import torch

    from clframe.files import write_atomically

    torch.set_num_threads(1)
    path = duel.path(out)
    if not path.exists():
        start = time.process_time()
        course = peer_course.Course(SETTINGS[duel.data], seed=duel.seed, data_dir=duel.data_dir)
        accuracies = peer_runs.final_accuracy(course, duel.method, duel.side)
        content = {**asdict(duel), **accuracies, "cpu_seconds": time.process_time() - start}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content).encode())
    return path


@dataclass(frozen=True)
class Verdict:
    """Ours beside theirs, in percent, over the seeds that both have."""

    ours: tuple[float, float]
    """Mean and sample standard deviation."""
    theirs: tuple[float, float]
    difference: float
    error: float
    """Standard error of the mean of the paired differences."""

    @property
    def within(self) -> bool:
        """Whether the difference is at most two standard errors."""
        return abs(self.difference) <= 2 * self.error + 1e-9


def verdict(found: Found, measure: str) -> Verdict | None:
    """None where fewer than two seeds have been run on both sides."""
    seeds = sorted(set(found["ours"]) & set(found["theirs"]))
    if len(seeds) < 2:
        return None
    ours, theirs = ([found[side][seed][measure] for seed in seeds] for side in SIDES)
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    error = statistics.stdev(differences) / sqrt(len(seeds))
    spread = [(statistics.mean(values), statistics.stdev(values)) for values in (ours, theirs)]
    return Verdict(spread[0], spread[1], statistics.mean(differences), error)


def table(data: str, rows: Mapping[str, Found]) -> str:
    """One data set's methods as Markdown, then what explains differences and what Avalanche needs to run."""
    heading = ["method", *(f"{m}: {s}" for m in MEASURES for s in ("ours", "Avalanche", "difference")), "within 2 SE"]
    lines = [f"### {data}", "", f"| {' | '.join(heading)} |", "|---|" + "---:|" * 6 + "---|"]
    for name, found in rows.items():
        verdicts = [v for m in MEASURES if (v := verdict(found, m)) is not None]
        if len(verdicts) < len(MEASURES):
            continue
        cells = [name]
        for v in verdicts:
            cells += [f"{v.ours[0]:.1f} ± {v.ours[1]:.1f}", f"{v.theirs[0]:.1f} ± {v.theirs[1]:.1f}"]
            cells.append(f"{v.difference:+.1f} (SE {v.error:.1f})")
        outside = [m for m, v in zip(MEASURES, verdicts, strict=True) if not v.within]
        cells.append("yes" if not outside else f"no: {', '.join(outside)}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def notes(names: Sequence[str]) -> str:
    """Definitions and defects, method by method."""
    lines = ["| method | by definition | Avalanche 0.6 on current torch |", "|---|---|---|"]
    for name in names:
        if METHODS[name].definition or METHODS[name].defect:
            lines.append(f"| {name} | {METHODS[name].definition or '-'} | {METHODS[name].defect or '-'} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder of MNIST/raw, or of mnist.npz")
    parser.add_argument("--out", type=Path, default=Path("runs/strategy_parity"))
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--data", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--json", type=Path, help="also write every seed's numbers here")
    options = parser.parse_args()
    wanted = [
        Duel(data, method, side, seed, options.data_dir)
        for data in options.data
        for seed in options.seeds
        for method in options.methods
        for side in SIDES
    ]
    found: dict[str, dict[str, dict[str, dict[int, dict[str, float]]]]] = {
        data: {method: {side: {} for side in SIDES} for method in options.methods} for data in options.data
    }
    seconds = 0.0
    runs = run_cells(wanted, options.out, workers=options.workers, run=run_duel, done=finished, share_processes=True)
    for duel, path in runs:
        content = json.loads(path.read_text())
        seconds += content["cpu_seconds"]
        found[duel.data][duel.method][duel.side][duel.seed] = {m: 100 * content[m] for m in MEASURES}
    for data, rows in found.items():
        print(table(data, rows) + "\n")
    print(notes(options.methods))
    print(f"\n{len(wanted)} runs, {seconds / 60:.1f} CPU minutes")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
