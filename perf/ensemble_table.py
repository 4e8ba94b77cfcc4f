"""Zero Time Waste and its parts: accuracy at budgets with and without cascade and ensembles, on one frozen backbone.

    python perf/ensemble_table.py --data-dir DIR --out RESULTS --seeds 0 1 2

Two runs for each seed, the config ``zero_time_waste`` without its ensemble and with or without the cascade: the
backbone is the same, and exits are trained on it while it is frozen. Ensembles are then fitted on the logits of
held-out data, as ``components.exits.ensemble`` does at the end of a run, or of the training data, as published. Every
row has its own thresholds, chosen on held-out data, and other test costs; the cost of ensembles is not counted.

- SDN: largest probability (Kaya et al., 2019); BranchyNet: entropy; PABEE: consecutive exits that agree.
- mean, product: of the probabilities of all exits so far; geometric: weighted, as in Zero Time Waste (Wojcik et al., 2023).
- hindsight improvability: share of an exit's errors that an earlier exit had right, mean over exits from the second on.

Finished runs are read, so the same command resumes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from math import nan
from pathlib import Path
from statistics import mean, stdev

import torch
from cells import Cell, run_cells

from clframe.accounting import backbone_macs, cumulative_macs
from clframe.exits.curves import budget_points
from clframe.exits.diagnostics import hindsight_improvability_K
from clframe.exits.ensembles import EnsembleKind, fit_ensemble, make_ensemble
from clframe.exits.proxy import evaluations
from clframe.exits.study import ExitScores, collect_scores
from clframe.metrics.statistics import paired
from clframe.targets.opening import open_target

NETWORKS = {"": "false", "cascade": "true"}
"""Name of a network -> the option ``components.exits.cascade``."""

ROWS: dict[str, tuple[str, EnsembleKind, str, str]] = {
    "exits alone (SDN)": ("", "single", "", "max_probability"),
    "entropy (BranchyNet)": ("", "single", "", "entropy"),
    "patience (PABEE)": ("", "single", "", "patience"),
    "geometric": ("", "geometric", "validation", "max_probability"),
    "cascade": ("cascade", "single", "", "max_probability"),
    "cascade, mean": ("cascade", "mean", "", "max_probability"),
    "cascade, product": ("cascade", "product", "", "max_probability"),
    "cascade, geometric (Zero Time Waste)": ("cascade", "geometric", "validation", "max_probability"),
    "the same, fitted on training data": ("cascade", "geometric", "fit", "max_probability"),
}
"""Row -> network, ensemble, data that it is fitted on, confidence measure."""

BUDGETS = (0.25, 0.5, 0.75, 1.0)

Numbers = dict[str, float | None]


def numbers_of(
    run: Path, kind: EnsembleKind, fit_on: str, measure: str, *, seed: int, fit_epochs: int | None = None
) -> Numbers:
    """Accuracies and costs of a row, in percent."""
    target = open_target(str(run))
    assert target.run is not None
    network = target.run.network
    exits, classes = len(network.exit_names), network.classes
    torch.manual_seed(seed)
    ensemble = make_ensemble(kind, exits=exits)
    ensemble.grow(range(classes))
    if fit_on:
        data = collect_scores(target, fit_on)
        logits_KNC, y_N = torch.from_numpy(data.scores_KNC.copy()), torch.from_numpy(data.y_N)
        fit_ensemble(ensemble, logits_KNC, y_N, epochs=fit_epochs, generator=torch.Generator().manual_seed(seed))

    def combined(split: str) -> ExitScores:
        scores = collect_scores(target, split)
        with torch.no_grad():
            found = torch.stack(ensemble(torch.from_numpy(scores.scores_KNC.copy()).unbind()))
        return replace(scores, scores_KNC=found.numpy())

    validation, test = evaluations(measure, combined("validation"), combined("test"), cumulative_macs(network))
    points = budget_points(validation, test, backbone_cost=backbone_macs(network), budgets=BUDGETS).points or ()
    numbers: Numbers = {}
    for point in points:
        numbers[f"accuracy at {point.name}"] = None if point.undefined else 100 * point.accuracy
        numbers[f"cost at {point.name}"] = None if point.undefined else 100 * point.cost
    improvable = hindsight_improvability_K(test)[1:-1]  # the last exit belongs to no ensemble
    everything = 100 * cumulative_macs(network)[-1] / backbone_macs(network)
    return numbers | {"hindsight improvability": 100 * mean(improvable), "cost of all exits": everything}


def cells(shared: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """Both networks of every seed."""
    chosen = ["strategy=exits", "components.exits.ensemble=single", *shared]
    return [
        Cell(name or "plain", "zero_time_waste", (*chosen, f"components.exits.cascade={cascade}"), seed)
        for seed in seeds
        for name, cascade in NETWORKS.items()
    ]


def shown(values: Sequence[float | None]) -> str:
    """Mean and sample standard deviation; a dash if a value is missing."""
    found = [value for value in values if value is not None]
    if len(found) < len(values) or not found:
        return "-"
    return f"{mean(found):.1f}" + (f" ± {stdev(found):.1f}" if len(found) > 1 else "")


def difference(base: dict[int, Numbers], other: dict[int, Numbers], name: str) -> str:
    """Mean and half-width of the 95 % interval of the paired t-test; empty with less than two seeds."""
    values = [{s: nan if (value := n[name]) is None else value for s, n in by.items()} for by in (base, other)]
    by = paired(*values)
    return f"{by.mean:+.1f} ± {by.half_width:.1f}" if len(by.seeds) > 1 else ""


def differences(found: dict[str, dict[int, Numbers]]) -> str:
    """Paired differences of the accuracy at every budget to the first row, as Markdown."""
    names = [f"accuracy at {100 * share:g}%" for share in BUDGETS]
    lines = [f"| row | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    base, *rest = found
    for row in rest:
        lines.append(f"| {row} | {' | '.join(difference(found[base], found[row], name) for name in names)} |")
    return "\n".join(lines)


def table(found: dict[str, dict[int, Numbers]]) -> str:
    """The rows as Markdown; the difference is at 50 % and paired with the first row."""
    names = [f"{100 * share:g}%" for share in BUDGETS]
    heading = ["row", *(f"at {name}" for name in [*names, "max"]), "at 50% minus SDN", "hindsight improvability"]
    lines = ["| " + " | ".join(heading) + " |", "|---|" + "---:|" * (len(heading) - 1)]
    first = next(iter(found))
    for row, by_seed in found.items():
        texts = [row]
        for name in [*names, "max"]:
            values, costs = ([n.get(f"{what} at {name}") for n in by_seed.values()] for what in ("accuracy", "cost"))
            texts.append(f"{shown(values)} ({shown([c for c in costs if c is not None]).split(' ')[0]})")
        texts.append("" if row == first else difference(found[first], by_seed, "accuracy at 50%"))
        texts.append(shown([n["hindsight improvability"] for n in by_seed.values()]))
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder of cifar100.npz or cifar-100-python")
    parser.add_argument("--out", type=Path, default=Path("runs/ensemble_table"))
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--fit-epochs", type=int, metavar="N", help="passes that fit an ensemble (default: 4,000 steps)")
    parser.add_argument("--override", nargs="*", default=[], help="key=value for every run")
    parser.add_argument("--json", type=Path, help="write the numbers of every row and seed to this file")
    options = parser.parse_args()
    data = [f"benchmark.data_dir={options.data_dir}"] if options.data_dir else []
    shared = [*data, "trainer.threads=1", "trainer.progress=false", "trainer.figures=none", *options.override]
    runs: dict[tuple[str, int], Path] = {}
    for cell, path in run_cells(cells(shared, options.seeds), options.out, workers=options.workers):
        runs["" if cell.label == "plain" else cell.label, cell.seed] = path.parent
        print(f"{cell.label}, seed {cell.seed}: {json.loads(path.read_text())['train_seconds']:.0f} s", flush=True)
    found = {
        row: {
            seed: numbers_of(runs[name, seed], kind, fit_on, measure, seed=seed, fit_epochs=options.fit_epochs)
            for seed in options.seeds
        }
        for row, (name, kind, fit_on, measure) in ROWS.items()
    }
    print("\n" + table(found) + "\n\nPaired differences to the first row, in points (95 %):\n\n" + differences(found))
    costs = [numbers["cost of all exits"] for numbers in next(iter(found.values())).values()]
    print(f"\nCost of all exits: {shown(costs)} % of the backbone's MACs")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
