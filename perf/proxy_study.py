"""Does failure prediction follow the gains of early exit better than calibration does?

Networks with exits are trained i.i.d. and class-incrementally under five training regimes. Every (data set, regime,
stream, seed) is one cell. A cell is trained once, and ``RECORDS/CELL-seedN.json`` (about 15 kB) has what the analysis
reads: the variants of the cell (calibration, confidence measure, experience) with their metrics and gains, those of
the confidence measures at equal budgets, and the course of every exit.

    python perf/proxy_study.py train --sets digits --out RUNS --records RECORDS --workers 2
    python perf/proxy_study.py analyze --records RECORDS

Train on several machines: give each the same options and ``--part I/N``, every N-th cell from the I-th on, and copy the
record files into one folder; nothing else is needed for the analysis. ``list`` prints the cells with their numbers and
``--only LABEL`` trains single ones. A command that was broken off continues where it stopped: cells with a record are
left out, finished runs are read, begun ones are resumed from their last checkpoint. ``--minutes`` starts no new cell
after that time, and ``--discard`` deletes a run once its record is written.

Sets: digits (scikit-learn, no files); mnist (--data-dir: the folder of MNIST/raw); cifar10of100 (--npz: an .npz with
x_train, y_train, x_test, y_test, ten classes of 500 and 100 images of 32x32; a small network, for one CPU core);
cifar (--npz: larger subsets with ResNet20, for a GPU: --override trainer.accelerator=cuda).
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cells import UNKEYED, Cell, run_cell, run_cells

from clframe.accounting import backbone_macs, cumulative_macs
from clframe.exits.proxy import GAINS, Variant, correlations, difference, variants_of_scores
from clframe.exits.study import collect_scores
from clframe.files import write_atomically
from clframe.metrics.statistics import paired
from clframe.records import read_record, to_plain
from clframe.results import Result
from clframe.tables import to_text
from clframe.targets.exit_studies import correlate, proxy_tables, variants_of_run, write_proxy_study
from clframe.targets.opening import open_target

SETS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "digits": ("quickstart", 4, ("backbone=small_cnn",)),
    "mnist": ("split_mnist", 2, ("backbone=mlp", "backbone.depth=4")),
    "cifar10of100": (
        "quickstart", 8,
        ("benchmark=npz", "backbone=small_cnn", "backbone.depth=3", "trainer.batch_size=64"),
    ),
    "cifar": (
        "quickstart", 12,
        ("benchmark=npz", "backbone=resnet20", "optimizer.name=sgd", "optimizer.lr=0.05", "optimizer.momentum=0.9",
         "trainer.batch_size=64"),
    ),
}  # fmt: skip
"""Data set -> (config, epochs, overrides)."""

REGIMES: dict[str, str] = {
    "joint": "exits",
    "probe": "exits(gradient='detached')",
    "disjoint": "exits(regime='disjoint')",
    "constant": "exits(weights='constant')",
    "distill": "exits(distill=0.5)",
}

STREAMS = {"iid": 1, "continual": 5}
"""Experiences of each stream."""

MEASURES = ("max_probability", "entropy", "margin", "patience", "gate", "failure")
"""Confidence measures compared at equal budgets, without calibration."""

SHARES = (25, 50, 75)
"""Budgets in % of the backbone's cost."""


@dataclass(frozen=True)
class Job:
    """One cell, its place, and the time from which on it is not started."""

    cell: Cell
    records: Path
    deadline: float
    discard: bool

    @property
    def label(self) -> str:
        return self.cell.label

    @property
    def seed(self) -> int:
        return self.cell.seed

    @property
    def record(self) -> Path:
        return self.records / f"{self.label}-seed{self.seed}.json"


def cells(options: argparse.Namespace) -> list[Cell]:
    """Every set, regime and stream of every seed; a study that is broken off has whole seeds."""
    found = []
    for seed in options.seeds:
        for name in options.sets:
            config, epochs, chosen = SETS[name]
            place = {"mnist": [f"benchmark.data_dir={options.data_dir}"]}.get(name, [])
            place = [f"benchmark.path={options.npz}"] if name.startswith("cifar") else place
            shared = [f"trainer.epochs={options.epochs or epochs}", *place, "benchmark.validation=0.15",
                      "trainer.threads=1", "trainer.progress=false", "trainer.loggers=[csv]", *options.override]  # fmt: skip
            for stream, experiences in STREAMS.items():
                for regime, exits in REGIMES.items():
                    replay = "" if stream == "iid" else "er + "
                    overrides = (*chosen, f"strategy={replay}{exits}", f"benchmark.experiences={experiences}", *shared)
                    found.append(Cell(f"{name}-{regime}-{stream}", config, overrides, seed))
    if options.only:
        unknown = set(options.only) - {cell.label for cell in found}
        if unknown:
            raise SystemExit(f"--only: found {sorted(unknown)}; give labels that `list` prints")
        found = [cell for cell in found if cell.label in options.only]
    first, every = options.part
    return found[first - 1 :: every]


def run_job(job: Job, out: Path) -> Path:
    """Train a cell and write its record; nothing after the deadline."""
    if job.record.is_file() or time.time() > job.deadline:
        return job.record
    run = run_cell(job.cell, out).parent
    write_atomically(job.record, json.dumps(to_plain(record_of(job, run))) + "\n")
    if job.discard:
        shutil.rmtree(job.cell.folder(out, unkeyed=UNKEYED))
    return job.record


def record_of(job: Job, run: Path) -> dict[str, Any]:
    """What the analysis needs of one run."""
    target = open_target(str(run))
    assert target.run is not None
    network = target.run.network
    measures = variants_of_scores(
        str(run), collect_scores(target, "validation"), collect_scores(target, "test"), cost_K=cumulative_macs(network),
        backbone_cost=backbone_macs(network), calibrations=("none",), measures=MEASURES,
    )  # fmt: skip
    result = Result.from_json(run / "results.json")
    name, regime, stream = job.label.rsplit("-", 2)
    return {
        "set": name, "regime": regime, "stream": stream, "seed": job.seed,
        "overrides": job.cell.overrides, "seconds": result.train_seconds,
        "variants": [asdict(v) for v in variants_of_run(str(run))],
        "measures": {v.label.split(", ")[1]: asdict(v) for v in measures},
        "course": [{"eefp": r.metrics["eefp"], "accuracy": r.metrics["accuracy"]} for r in result.exits],
    }  # fmt: skip


def train(options: argparse.Namespace) -> None:
    """Train the cells that have no record."""
    options.records.mkdir(parents=True, exist_ok=True)
    start = time.time()
    jobs = [Job(cell, options.records, start + 60 * options.minutes, options.discard) for cell in cells(options)]
    done = sum(job.record.is_file() for job in jobs)
    print(f"{len(jobs)} cells, {done} with a record", flush=True)
    waiting = [job for job in jobs if not job.record.is_file()]
    for job, record in run_cells(
        waiting, options.out, workers=options.workers, run=run_job, done=lambda job, out: None
    ):
        if record.is_file():
            print(f"{time.time() - start:7.0f} s  {job.label}, seed {job.seed}", flush=True)
    missing = [job for job in jobs if not job.record.is_file()]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} cells have a record in {options.records}", flush=True)


def analyze(options: argparse.Namespace) -> None:
    """Print all tables of the records and write those of the proxy study to RECORDS/proxy."""
    records = [json.loads(file.read_text()) for file in sorted(options.records.glob("*-seed*.json"))]
    records = [r for r in records if r["set"] in options.sets] if options.sets else records
    if not records:
        raise SystemExit(f"--records: found none in {options.records}; run `train` first")
    of_run = {}
    for record in records:
        name = "{set}-{regime}-{stream} seed {seed}".format(**record)
        of_run[name] = [read_record(Variant, {**each, "run": name}) for each in record["variants"]]
    study = correlate([v for found in of_run.values() for v in found])
    write_proxy_study(study, options.records / "proxy", command=["perf/proxy_study.py", "analyze"])
    print("\n\n".join(to_text(table, width=170) for table in proxy_tables(study)))
    sets = sorted({record["set"] for record in records})
    parts = [("all sets", stream, sets) for stream in STREAMS]
    parts += [(name, stream, [name]) for name in sets for stream in STREAMS] if len(sets) > 1 else []
    chosen = {part: [r for r in records if r["stream"] == part[1] and r["set"] in part[2]] for part in map(_key, parts)}
    for (title, stream, _), found in chosen.items():
        names = {"{set}-{regime}-{stream} seed {seed}".format(**record) for record in found}
        report(f"{title}, {stream}", [v for name in names for v in of_run[name]])
    for (title, stream, _), found in chosen.items():
        if found:
            print(f"\n{title}, {stream}: {len(found)} runs\n" + policy_table(found))
    print("\n" + early_warning([record for record in records if record["stream"] == "continual"]))


def _key(part: tuple[str, str, Sequence[str]]) -> tuple[str, str, tuple[str, ...]]:
    return part[0], part[1], tuple(part[2])


def policy_table(records: Sequence[Mapping[str, Any]], *, learned: str = "failure") -> str:
    """Mean accuracy at budgets by measure, and the paired difference of the learned policy to each measure.

    Differences are averaged over configurations first; the interval is over seeds. Runs in which a measure has no
    threshold within the budget are left out for all measures.
    """
    lines = [f"{'measure':18}" + "".join(f"{share:>9} %" for share in SHARES)
             + "".join(f"{f'{learned} at {share} %':>24}" for share in SHARES)]  # fmt: skip
    usable = {share: [r for r in records if not any(_missing(r, m, share) for m in MEASURES)] for share in SHARES}
    for measure in MEASURES:
        means, gaps = [], []
        for share in SHARES:
            values = [r["measures"][measure]["gains"][f"accuracy_{share}"] for r in usable[share]]
            means.append(f"{100 * np.mean(values):.1f}" if values else "-")
            gaps.append("" if measure == learned else _gap(usable[share], learned, measure, share))
        lines.append(f"{measure:18}" + "".join(f"{cell:>11}" for cell in means) + "".join(f"{g:>24}" for g in gaps))
    lines.append(f"{'runs':18}" + "".join(f"{len(usable[share]):>11}" for share in SHARES))
    return "\n".join(lines)


def _missing(record: Mapping[str, Any], measure: str, share: int) -> bool:
    return record["measures"][measure]["gains"][f"accuracy_{share}"] is None


def _gap(records: Sequence[Mapping[str, Any]], learned: str, measure: str, share: int) -> str:
    by_seed: dict[int, list[tuple[float, float]]] = {}
    for r in records:
        first, second = (r["measures"][name]["gains"][f"accuracy_{share}"] for name in (measure, learned))
        by_seed.setdefault(r["seed"], []).append((first, second))
    base, value = ({s: float(np.mean([pair[n] for pair in found])) for s, found in by_seed.items()} for n in (0, 1))
    if len(base) < 2:
        return f"{100 * (value[s] - base[s]):+.2f}" if (s := next(iter(base), None)) is not None else "-"
    gap = paired(base, value)
    return f"{100 * gap.mean:+.2f} ± {100 * gap.half_width:.2f}"


def early_warning(records: Sequence[Mapping[str, Any]]) -> str:
    """Spearman correlation of the change in EEFP after experience t with the change in accuracy after t + 1."""
    from scipy.stats import spearmanr

    pairs, same = [], []
    for record in records:
        course = record["course"]
        for k in range(len(course[0]["accuracy"]) - 1 if course else 0):
            eefp = [np.nan if each["eefp"][k] is None else each["eefp"][k] for each in course]
            accuracy = [each["accuracy"][k] for each in course]
            for t in range(1, len(course) - 1):
                pairs.append((eefp[t] - eefp[t - 1], accuracy[t + 1] - accuracy[t]))
                same.append((accuracy[t] - accuracy[t - 1], accuracy[t + 1] - accuracy[t]))
    lines = []
    for name, rows in (("change of EEFP", pairs), ("change of accuracy", same)):
        rows = [row for row in rows if not np.isnan(row).any()]
        if len(rows) > 2:
            rho = spearmanr(*zip(*rows, strict=True))
            lines.append(f"{name} after t against the change of accuracy after t + 1: rho {rho.statistic:+.2f}, "
                         f"p {rho.pvalue:.3f}, {len(rows)} (run, exit, t)")  # fmt: skip
    return "\n".join(lines)


def report(title: str, variants: Sequence[Variant]) -> None:
    """Main comparison on part of the variants."""
    if len(variants) < 3:
        return
    print(f"\n{title}: {len(variants)} variants of {len({v.run for v in variants})} runs")
    rho = {(c.metric, c.gain): c for c in correlations(variants)}
    for gain in GAINS:
        gap = difference(variants, "eefp", "ece", gain=gain)
        print(f"  {gain:12} EEFP {rho['eefp', gain].rho:+.2f}  ECE {rho['ece', gain].rho:+.2f}  "
              f"AURC {rho['aurc', gain].rho:+.2f}  accuracy {rho['accuracy', gain].rho:+.2f}  "
              f"difference |EEFP| - |ECE| {gap.rho:+.2f} ({gap.low:+.2f} to {gap.high:+.2f})")  # fmt: skip


def _part(text: str) -> tuple[int, int]:
    first, _, every = text.partition("/")
    if not (first.isdigit() and every.isdigit() and 1 <= int(first) <= int(every)):
        raise argparse.ArgumentTypeError(f"found '{text}'; give I/N with 1 <= I <= N")
    return int(first), int(every)


def main() -> None:
    """Train, list or analyze."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=["train", "list", "analyze"])
    add("--sets", nargs="+", choices=SETS, help="data sets (default: digits; analyze: all with records)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--only", nargs="+", metavar="LABEL", help="cells by label, such as digits-joint-iid")
    add("--part", type=_part, default=(1, 1), metavar="I/N", help="every N-th cell from the I-th on (default: 1/1)")
    add("--epochs", type=int, help="epochs of every cell (default: digits 4, mnist 2, cifar10of100 8, cifar 12)")
    add("--data-dir", metavar="DIR", help="folder of MNIST/raw")
    add("--npz", metavar="FILE", help="images of cifar10of100 or cifar")
    add("--out", type=Path, default=Path("runs/proxy_study"), help="folder of the runs (default: runs/proxy_study)")
    add("--records", type=Path, help="folder of the records (default: OUT/records)")
    add("--workers", type=int, default=1, help="processes, one thread each (default: 1)")
    add("--override", nargs="*", default=[], metavar="KEY=VALUE", help="for every run")
    add("--minutes", type=float, default=1e9, help="start no further cell after this time")
    add("--discard", action="store_true", help="delete a run once its record is written")
    options = parser.parse_args()
    options.records = options.records or options.out / "records"
    if options.what == "analyze":
        return analyze(options)
    options.sets = options.sets or ["digits"]
    for name, given, option in (("mnist", options.data_dir, "--data-dir"), ("cifar", options.npz, "--npz")):
        if given is None and any(each.startswith(name) for each in options.sets):
            parser.error(f"{option}: found none; set {name} needs it")
    if options.what == "train":
        return train(options)
    for n, cell in enumerate(cells(options), start=1):
        record = Job(cell, options.records, 0, False).record
        print(f"{n:4}  {cell.label:32} seed {cell.seed}  {'done' if record.is_file() else '-'}")


if __name__ == "__main__":
    main()
