"""The table of strategies with and without exits: accuracy, relative gain, accuracy and cost of stopping early.

    python perf/exit_table.py --data-dir DATA --out RESULTS --workers 2 --seeds 0 1 2
    python perf/exit_table.py ... --strategies er --variants exits probe control     # the exits themselves

Every run is a cell (``cells.py``): the command resumes where it stopped, and a second call only prints. With exits the
answer is that of the most confident exit, as in the paper (Szatkowski et al., 2025), next to that of the last one;
thresholds of the budgets are chosen on the validation part of the training data, which all rows leave out alike.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import Cell, run_cells

from clframe.metrics.statistics import paired

EXITS = "exits"
Result = dict[str, Any]
"""The content of a results.json."""


@dataclass(frozen=True)
class Row:
    """A strategy of the table and its options."""

    strategy: str
    options: tuple[str, ...] = ()
    with_exits: tuple[str, ...] = ()
    """Options added in the variants with exits."""


STRATEGIES = {
    "naive": Row("naive"),
    "ft_memory": Row("er", ("components.er={memory: 2000, replay: concatenate, selection: random}",)),
    "er": Row("er", ("components.er={memory: 2000, replay: half, selection: random}",)),
    "derpp": Row("derpp", ("components.derpp={memory: 2000}",)),
    "bic": Row("bic", ("components.bic={memory: 2000}",)),
    "lwf": Row("lwf"),
    "ssil": Row("ssil + er", ("components.er={memory: 2000, replay: fixed, replayed: 32, selection: random}",)),
    "icarl": Row("icarl + er", ("components.er={memory: 2000, replay: concatenate, selection: herding}",)),
    "lode": Row("lode + er", ("components.er={memory: 2000, replay: half, selection: random}",)),
    # SGD with learning rate 0.1 is stable up to importances of 2 / (0.1 * 100).
    "ewc": Row("ewc", ("components.ewc={lamb: 100, samples: 1000, ceiling: 0.1}",)),
    "derpp_published": Row(
        "derpp",
        ("components.derpp={memory: 2000, alpha: 0.5, beta: 0.5, draws: two, selection: random, replay: half, batches: apart}",),
        ("components.derpp.beta=1",),
    ),
    "icarl_published": Row(
        "icarl + er",
        ("components.er={memory: 2000, replay: concatenate, selection: herding}",
         "components.icarl={loss: softmax, pooling: max, scores: fourth}"),
    ),
    "lode_published": Row(
        "lode + er",
        ("components.er={memory: 2000, replay: half, batches: apart, selection: random}",),
        ("components.lode={c: 4, rho: 0.5}",),
    ),
    "ewc_published": Row(
        "ewc",
        ("components.ewc={lamb: 10000, mode: merged, alpha: 0.5, heads: free, labels: predicted, estimate: published, scope: block}",),
    ),
    "lwf_published": Row("lwf", (), ("components.lwf.alpha=0.5",)),
    "naive_current": Row("current_classes"),
    "ewc_current": Row(
        "ewc + current_classes",
        ("components.ewc={lamb: 10000, mode: merged, alpha: 0.5, heads: free, labels: predicted, estimate: published, scope: block}",),
    ),
    "lwf_current": Row("lwf + current_classes", (), ("components.lwf.alpha=0.5",)),
}  # fmt: skip
"""Name of a row -> its strategy; memory 2000 where one is kept. Rows that end in ``published`` have the options of the
paper on auxiliary classifiers (Szatkowski et al., 2025), for 10 experiences, and the estimate of its code; those that
end in ``current`` also its cross-entropy without a memory, over the classes of the experience."""

VARIANTS = {
    "": ("", ()),
    "exits": ("exits", ()),
    "probe": ("exits", ("components.exits.gradient=detached",)),
    "control": ("exits", ("components.exits.control=last",)),
}
"""Suffix of a row -> (component added, overrides)."""


def cells(names: Sequence[str], variants: Sequence[str], shared: Sequence[str], config: str, seeds: Sequence[int]) -> list[Cell]:
    """All cells of a table, seed by seed, so that a table that is broken off has whole rows."""
    found = []
    for seed in seeds:
        for name in names:
            base = STRATEGIES[name]
            for variant in variants:
                added, more = VARIANTS[variant]
                expression = " + ".join(part for part in (base.strategy, added) if part)
                options = (*base.options, *base.with_exits) if added else base.options
                label = f"{name} + {variant}" if variant else name
                overrides = (f"strategy={expression}", *options, *more, *shared)
                found.append(Cell(label, config, overrides, seed))
    return found


def row(results: Sequence[Result]) -> dict[str, list[float]]:
    """The numbers of one row, one for each seed, in percent."""
    columns: dict[str, list[float]] = {}
    for result in results:
        record = result["exits"][-1]
        values = {
            "last": record["static"]["last"],
            "confident": record["static"]["confident"],
            "forgetting": result.get("metrics", result)["forgetting"],  # files of schema version 1 have no mapping
            "parameters": result["parameters"] / 100,
            "minutes": result["train_seconds"] / 6000,
        }
        for point in record["points"]["points"] or ():
            if point["accuracy"] is None:
                continue
            values[f"at {point['name']}"] = point["accuracy"]
            values[f"cost {point['name']}"] = point["cost"]
        for name, value in values.items():
            columns.setdefault(name, []).append(float("nan") if value is None else 100 * value)
    return columns


def equal_cost(result: Result, accuracy: float) -> float | None:
    """The smallest share of the backbone's cost at which the test curve is as accurate, None where it never is."""
    curve = result["exits"][-1]["curve"]
    reached = [cost for cost, found in zip(curve["costs"], curve["accuracies"], strict=True) if found >= accuracy]
    return 100 * min(reached) if reached else None


def shown(values: Sequence[float], *, decimals: int = 1) -> str:
    """Mean, and sample standard deviation where there are several."""
    values = [value for value in values if value == value]
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{decimals}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{decimals}f}"


def difference_of(base: dict[int, Result], others: dict[int, Result]) -> str:
    """Points that the most confident exit is better than the base, with the paired t-test's interval from two seeds on."""
    found = paired(
        {seed: 100 * result["exits"][-1]["static"]["last"] for seed, result in base.items()},
        {seed: 100 * result["exits"][-1]["static"]["confident"] for seed, result in others.items()},
    )
    return f"{found.mean:+.1f}" + ("" if found.half_width != found.half_width else f" ± {found.half_width:.1f}")


def table(found: dict[str, dict[int, Result]]) -> str:
    """The rows as Markdown."""
    heading = ["strategy", "seeds", "parameters", "last exit", "most confident", "difference (95 %)", "gain over base", "forgetting",
               "at 25 %", "at 50 %", "at 75 %", "cost at the base's accuracy", "minutes"]  # fmt: skip
    lines = ["| " + " | ".join(heading) + " |", "|---|" + "---:|" * (len(heading) - 1)]
    for label, by_seed in found.items():
        results = [by_seed[seed] for seed in sorted(by_seed)]
        columns, base = row(results), found.get(label.partition(" + ")[0], {})
        gains, costs, difference = [], [], "-"
        if " + " in label:
            for seed in sorted(by_seed):
                if seed in base:
                    before = base[seed]["exits"][-1]["static"]["last"]
                    gains.append(100 * (by_seed[seed]["exits"][-1]["static"]["confident"] / before - 1))
                    cost = equal_cost(by_seed[seed], before)
                    costs.append(float("nan") if cost is None else cost)
            difference = difference_of(base, by_seed)
        points = [
            f"{shown(columns[f'at {share}%'])} (cost {shown(columns[f'cost {share}%'])})" if " + " in label and f"at {share}%" in columns else "-"
            for share in (25, 50, 75)
        ]
        cells = [label, str(len(results)), f"{results[0]['parameters']:,}", shown(columns["last"]),
                 shown(columns["confident"]) if " + " in label else "-", difference, f"{shown(gains)} %" if gains else "-",
                 shown(columns["forgetting"]), *points, f"{shown(costs)} %" if any(c == c for c in costs) else "-",
                 shown(columns["minutes"])]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def answer(result: Result, label: str) -> float:
    """Final accuracy in percent: of the most confident exit, or of the only one."""
    return 100 * float(result["exits"][-1]["static"]["confident" if " + " in label else "last"])


def differences(found: dict[str, dict[int, Result]]) -> str:
    """Paired differences between the variants of each strategy, as Markdown: mean and half-width of the 95 % interval."""
    pairs = [("exits", ""), ("control", ""), ("exits", "control"), ("exits", "probe")]
    heading = ["strategy", *(f"{first} - {second or 'base'}" for first, second in pairs)]
    lines = ["| " + " | ".join(heading) + " |", "|---|" + "---:|" * len(pairs)]
    for name in dict.fromkeys(label.partition(" + ")[0] for label in found):
        cells = [name]
        for first, second in pairs:
            labels = f"{name} + {first}", f"{name} + {second}" if second else name
            values = [{seed: answer(result, label) for seed, result in found.get(label, {}).items()} for label in labels]
            if len(values[0].keys() & values[1].keys()) < 2:
                cells.append("-")
                continue
            by = paired(values[1], values[0])
            cells.append(f"{by.mean:+.1f} ± {by.half_width:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def percent(value: float | None) -> float | str:
    """In percent; empty for a number that a run lacks, such as forgetting after a single experience."""
    return "" if value is None else round(100 * value, 2)


def exit_by_exit(found: dict[str, dict[int, Result]]) -> str:
    """Accuracy and forgetting of every exit after the last experience, as Markdown, of the rows with several exits."""
    several = {label: list(runs.values()) for label, runs in found.items() if " + " in label}
    if not several:
        return ""
    exits = max(len(results[0]["exit_names"]) for results in several.values())
    lines = [f"| row | | {' | '.join(f'exit {k + 1}' for k in range(exits - 1))} | last |", "|---|---|" + "---:|" * exits]
    for label, results in several.items():
        for what, values in (
            ("accuracy", [result["exits"][-1]["metrics"]["accuracy"] for result in results]),
            ("forgetting", [result["exit_forgetting"] for result in results]),
        ):
            columns = [shown([100 * value for value in column if value is not None]) for column in zip(*values, strict=True)]
            lines.append(f"| {label} | {what} | {' | '.join(columns)} |")
    return "\n".join(lines)


def write_runs(found: dict[str, dict[int, Result]], path: Path) -> None:
    """Write a line for every run, in percent."""
    rows = []
    for label, by_seed in sorted(found.items()):
        for seed, result in sorted(by_seed.items()):
            record = result["exits"][-1]
            row = {"row": label, "seed": seed, "parameters": result["parameters"],
                   "forgetting": percent(result["metrics"]["forgetting"])}  # fmt: skip
            row |= {name: percent(record["static"][name]) for name in ("last", "confident", "mean", "oracle")}
            row["train_seconds"] = round(result["train_seconds"], 1)
            for point in record["points"]["points"] or ():
                for name in ("accuracy", "cost"):
                    row[f"{name} at {point['name']}"] = percent(point[name])
            rows.append(row)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="split_cifar100")
    parser.add_argument("--data-dir", help="folder of cifar100.npz or cifar-100-python")
    parser.add_argument("--out", type=Path, default=Path("runs/exit_table"))
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--variants", nargs="+", choices=[v for v in VARIANTS if v], default=["exits"])
    parser.add_argument("--override", nargs="*", default=[], help="key=value for every run")
    parser.add_argument("--csv", type=Path, help="write a line for every run to this file")
    parser.add_argument("--print-only", action="store_true", help="print what is finished, run nothing")
    options = parser.parse_args()
    data = [f"benchmark.data_dir={options.data_dir}"] if options.data_dir else []
    shared = [*data, "benchmark.validation=0.1", "trainer.threads=1",
              "trainer.progress=false", "trainer.loggers=[csv]", *options.override]  # fmt: skip
    wanted = cells(options.strategies, ["", *options.variants], shared, options.config, options.seeds)
    found: dict[str, dict[int, Result]] = {cell.label: {} for cell in wanted}
    start = time.perf_counter()
    pairs: Iterable[tuple[Cell, Path | None]]
    if options.print_only:
        from cells import finished

        pairs = [(cell, finished(cell, options.out)) for cell in wanted]
    else:
        pairs = run_cells(wanted, options.out, workers=options.workers)
    for cell, path in pairs:
        if path is not None:
            found[cell.label][cell.seed] = json.loads(Path(path).read_text())
            print(f"{time.perf_counter() - start:7.0f} s  {cell.label}, seed {cell.seed}", flush=True)
    found = {label: by_seed for label, by_seed in found.items() if by_seed}
    print("\n" + table(found) + "\n\nPaired differences of the final accuracy, in points (95 %):\n\n" + differences(found))
    print("\nEvery exit after the last experience, in percent:\n\n" + exit_by_exit(found))
    if options.csv is not None:
        write_runs(found, options.csv)


if __name__ == "__main__":
    main()
