"""Does failure prediction follow the gains of early exit better than calibration does?

    python perf/proxy_study.py --out RESULTS --workers 2                                   # split digits
    python perf/proxy_study.py --out RESULTS --workers 2 --sets digits mnist --data-dir DATA
    python perf/proxy_study.py --out RESULTS --sets cifar --npz IMAGES.npz --override trainer.accelerator=cuda

Networks with exits are trained i.i.d. and class-incrementally under several training regimes; every run is a cell
(``cells.py``), so the command resumes where it stopped. Printed: correlations over all variants (calibration,
confidence measure, experience), the comparison of confidence measures at equal budgets, and whether a drop of EEFP
precedes a drop of accuracy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from cells import Cell, finished, run_cells

from clframe.accounting import backbone_macs, cumulative_macs
from clframe.exits.proxy import GAINS, Variant, correlations, difference, variants_of_scores
from clframe.exits.study import collect_scores
from clframe.metrics.statistics import paired
from clframe.results import Result
from clframe.tables import to_text
from clframe.targets.exit_studies import proxy_tables, study_proxies, variants_of_run, write_proxy_study
from clframe.targets.opening import open_target

SETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "digits": ("quickstart", ("backbone=small_cnn", "trainer.epochs=4")),
    "mnist": ("split_mnist", ("backbone=mlp", "backbone.depth=4", "trainer.epochs=2")),
    "cifar": (
        "quickstart",
        ("benchmark=npz", "backbone=resnet20", "optimizer.name=sgd", "optimizer.lr=0.05", "optimizer.momentum=0.9",
         "trainer.epochs=12", "trainer.batch_size=64"),
    ),
}  # fmt: skip
"""Data set -> (config, overrides)."""

REGIMES: dict[str, str] = {
    "joint": "exits",
    "probe": "exits(gradient='detached')",
    "disjoint": "exits(regime='disjoint')",
    "constant": "exits(weights='constant')",
    "distill": "exits(distill=0.5)",
}

MEASURES = ("max_probability", "entropy", "margin", "patience", "gate", "failure")
"""Confidence measures compared at equal budgets, without calibration."""


def cells(sets: Sequence[str], shared: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """Every set, regime and stream of every seed."""
    found = []
    for seed in seeds:
        for name in sets:
            config, options = SETS[name]
            for regime, exits in REGIMES.items():
                for stream, experiences in (("iid", 1), ("continual", 5)):
                    replay = "" if stream == "iid" else "er + "
                    overrides = (*options, f"strategy={replay}{exits}", f"benchmark.experiences={experiences}", *shared)
                    found.append(Cell(f"{name}-{regime}-{stream}", config, overrides, seed))
    return found


def policies(run: Path) -> list[Variant]:
    """Variants of the confidence measures of one run, on cached scores."""
    target = open_target(str(run))
    network = target.run.network
    return variants_of_scores(
        str(run), collect_scores(target, "validation"), collect_scores(target, "test"), cost_K=cumulative_macs(network),
        backbone_cost=backbone_macs(network), calibrations=("none",), measures=MEASURES,
    )  # fmt: skip


def prepare(run: Path) -> list[Variant]:
    """Store the variants of one run in its folder; returns those of the confidence measures."""
    import torch

    torch.set_num_threads(1)
    variants_of_run(str(run))
    return policies(run)


def prepare_all(runs: Sequence[Path], workers: int) -> list[tuple[Path, list[Variant]]]:
    """The same for many runs, in processes."""
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(zip(runs, pool.map(prepare, runs), strict=True))


def policy_table(found: dict[tuple[str, int], list[Variant]], *, stream: str) -> str:
    """Mean accuracy at budgets by measure, and the paired difference to the largest probability."""
    keys = sorted(key for key in found if key[0].endswith(stream))
    lines = [f"{stream}, {len(keys)} runs", f"{'measure':16}" + "".join(f"{share:>22}%" for share in (25, 50, 75))]
    for m, measure in enumerate(MEASURES):
        cells = []
        for share in (25, 50, 75):
            values = {n: found[key][m].gains[f"accuracy_{share}"] for n, key in enumerate(keys)}
            base = {n: found[key][0].gains[f"accuracy_{share}"] for n, key in enumerate(keys)}
            both = [n for n in values if not np.isnan(values[n]) and not np.isnan(base[n])]
            if not both:
                cells.append("-")
                continue
            text = f"{100 * np.mean([values[n] for n in both]):.1f}"
            if m and len(both) > 1:
                gap = paired({n: base[n] for n in both}, {n: values[n] for n in both})
                text += f" ({100 * gap.mean:+.2f} ± {100 * gap.half_width:.2f})"
            cells.append(text)
        lines.append(f"{measure:16}" + "".join(f"{cell:>23}" for cell in cells))
    return "\n".join(lines)


def early_warning(runs: Sequence[Path]) -> str:
    """Spearman correlation of the change in EEFP after experience t with the change in accuracy after t + 1."""
    from scipy.stats import spearmanr

    pairs, same = [], []
    for run in runs:
        records = Result.from_json(run / "results.json").exits
        for k in range(len(records[0].accuracy_K) - 1 if records else 0):
            eefp = [record.metrics["eefp"][k] for record in records]
            accuracy = [record.metrics["accuracy"][k] for record in records]
            for t in range(1, len(records) - 1):
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


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=["digits"])
    parser.add_argument("--data-dir", help="folder of MNIST")
    parser.add_argument("--npz", help="images of the set cifar: an .npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--out", type=Path, default=Path("runs/proxy_study"))
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--override", nargs="*", default=[], help="key=value for every run")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further run after this time")
    options = parser.parse_args()
    wanted: list[Cell] = []
    for name in options.sets:
        place = {"mnist": f"benchmark.data_dir={options.data_dir}", "cifar": f"benchmark.path={options.npz}"}
        shared = [*([place[name]] if name in place else []), "benchmark.validation=0.15", "trainer.threads=1",
                  "trainer.progress=false", "trainer.loggers=[csv]", *options.override]  # fmt: skip
        wanted += cells([name], shared, options.seeds)
    wanted.sort(key=lambda cell: cell.seed)  # a study that is broken off has whole seeds
    start = time.perf_counter()
    for size in range(0, len(wanted), 4 * options.workers):
        if time.perf_counter() - start > 60 * options.minutes:
            break
        for cell, _ in run_cells(wanted[size : size + 4 * options.workers], options.out, workers=options.workers):
            print(f"{time.perf_counter() - start:7.0f} s  {cell.label}, seed {cell.seed}", flush=True)
    done: list[tuple[Cell, Path]] = [(c, p.parent) for c in wanted if (p := finished(c, options.out)) is not None]
    prepared = dict(prepare_all([run for _, run in done], options.workers))
    study = study_proxies([str(run) for _, run in done])
    write_proxy_study(study, options.out / "proxy", command=["perf/proxy_study.py"])
    print("\n\n".join(to_text(table, width=170) for table in proxy_tables(study)))
    for stream in ("iid", "continual"):
        runs = {str(run) for cell, run in done if cell.label.endswith(stream)}
        part = [variant for variant in study.variants if variant.run in runs]
        report(stream, part)
    found = {(cell.label, cell.seed): prepared[run] for cell, run in done}
    print("\n" + "\n\n".join(policy_table(found, stream=stream) for stream in ("iid", "continual")))
    print("\n" + early_warning([run for cell, run in done if cell.label.endswith("continual")]))
    compact: dict[str, Any] = {f"{label} seed {seed}": [v.gains for v in each] for (label, seed), each in found.items()}
    (options.out / "policies.json").write_text(json.dumps(compact))


def report(title: str, variants: Sequence[Variant]) -> None:
    """Main comparison on part of the variants."""
    if len(variants) < 3:
        return
    print(f"\n{title}: {len(variants)} variants of {len({v.run for v in variants})} runs")
    rho = {(c.metric, c.gain): c for c in correlations(variants)}
    for gain in GAINS:
        gap = difference(variants, "eefp", "ece", gain=gain)
        print(f"  {gain:12} EEFP {rho['eefp', gain].rho:+.2f}  ECE {rho['ece', gain].rho:+.2f}  "
              f"AURC {rho['aurc', gain].rho:+.2f}  difference |EEFP| - |ECE| {gap.rho:+.2f} ({gap.low:+.2f} to {gap.high:+.2f})")  # fmt: skip


if __name__ == "__main__":
    main()
