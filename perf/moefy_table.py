"""Dense, MoEfication and D2DMoE, with and without the regulariser: accuracy at 25, 50 and 75 % of cost, and time.

    python perf/moefy_table.py --data-dir DATA --out RESULTS --benches vit mlp continual --seeds 0 1
    python perf/moefy_table.py --data-dir DATA --out RESULTS --benches text --encoder FOLDER
    python perf/moefy_table.py --data-dir DATA --out RESULTS --strengths 0.001 0.003 0.01 0.03 --seeds 100
    python perf/moefy_table.py --out RESULTS --print-only

Benches: ``vit`` and ``mlp`` learn MNIST, ``text`` fine-tunes a BERT in FOLDER on the first classes of CLINC150, all as
one experience; ``continual`` (an mlp) and ``continual_vit`` are split MNIST under er + exits + sparsity, converted on what
the memory keeps. A dense model is a cell (``cells.py``), each conversion of it a folder beside; what is there is read, so
the command goes on where it was broken off and a second call only prints.

All rows of a bench but ``dense`` see the same fine-tuning: as many epochs, ReLU in place of other activations, and the
same split. They differ in the penalty, the router and the gate. Settings are chosen on validation data, a tenth of the
training data that no row trains on; so are the strengths of the penalty, by ``--strengths``, which shows no test data, on
a seed that no table has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cells import Cell, run_cells

ROWS: dict[str, dict[str, Any]] = {
    "MoEfication": {"method": "moefication"},
    "D2DMoE, no regulariser": {"strength": 0.0},
    "D2DMoE": {},
    "MoEfication + regulariser": {"method": "moefication", "strength": None},
}
"""Row -> options; a strength of None is the bench's."""


@dataclass(frozen=True)
class Bench:
    """A dense model and how it is converted."""

    config: str
    overrides: tuple[str, ...]
    options: Mapping[str, Any]
    rows: tuple[str, ...] = tuple(ROWS)
    strength: float = 0.01
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Rows of this bench alone."""


ONE = ("strategy=naive", "benchmark.experiences=1", "benchmark.validation=0.1")
VIT = ("backbone=vit_tiny", "backbone.patch=7", "backbone.depth=4", "optimizer.name=adam", "optimizer.lr=0.001")
REPLAY = ("strategy=er + exits + sparsity", "components.er={memory: 2000, replay: half}", "benchmark.validation=0.1",
          "components.sparsity={strength: 0.003}", "trainer.batch_size=64")  # fmt: skip
BENCHES: dict[str, Bench] = {
    "vit": Bench(
        "split_mnist",
        (*ONE, *VIT, "optimizer.schedule=cosine", "trainer.epochs=3", "trainer.batch_size=64"),
        {"on": "all", "sparsify": 1, "epochs": 5, "samples": 8000, "limit": 1500},
        strength=0.03,
        more={"D2DMoE + projections": {"projections": True}},
    ),
    "mlp": Bench(
        "split_mnist",
        (*ONE, "backbone=mlp", "backbone.width=384", "backbone.depth=4", "optimizer.name=adam", "optimizer.lr=0.001",
         "optimizer.schedule=cosine", "trainer.epochs=3", "trainer.batch_size=64"),
        {"on": "all", "sparsify": 2, "epochs": 5, "samples": 8000, "limit": 4000},
        strength=0.003,
    ),
    "text": Bench(
        "quickstart",
        (*ONE, "benchmark=clinc150", "benchmark.classes=30", "backbone=hf_text", "backbone.pooling=mean",
         "optimizer.name=adamw", "optimizer.lr=0.0002", "optimizer.schedule=cosine", "trainer.epochs=3",
         "trainer.batch_size=32"),
        {"on": "all", "sparsify": 2, "sparsify_lr": 1e-4, "epochs": 5, "batch": 32, "limit": 600},
        strength=0.001,
    ),
    "continual": Bench(
        "split_mnist",
        ("backbone=mlp", "backbone.width=384", "backbone.depth=6", "optimizer.name=adam", "optimizer.lr=0.0005",
         "components.exits={at: [layer2, layer4]}", *REPLAY, "trainer.epochs=1"),
        {"on": "memory", "sparsify": 8, "epochs": 20, "limit": 2000},
        rows=("MoEfication", "D2DMoE, no regulariser", "D2DMoE"),
        strength=0.003,
    ),
    "continual_vit": Bench(
        "split_mnist",
        (*VIT, *REPLAY, "trainer.epochs=2"),
        {"on": "memory", "sparsify": 8, "epochs": 20, "limit": 2000},
        rows=("MoEfication", "D2DMoE, no regulariser", "D2DMoE"),
        more={"D2DMoE on all data": {"on": "all", "sparsify": 1, "epochs": 5, "samples": 8000}},
    ),
}  # fmt: skip


def rows_of(bench: Bench, seed: int) -> dict[str, dict[str, Any]]:
    """The options of each row."""
    found = {}
    for name, own in {**{name: ROWS[name] for name in bench.rows}, **bench.more}.items():
        options = {"strength": bench.strength, **bench.options, **own, "seed": seed}
        if own.get("method") == "moefication" and "strength" not in own:
            options["strength"] = 0.0
        if options["strength"] is None:
            options["strength"] = bench.strength
        found[name] = options
    return found


def convert(run: Path, options: Mapping[str, Any], folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """What a conversion came to, made where it is not there yet."""
    import torch

    from clframe.moe.conversion.options import Options
    from clframe.moe.conversion.study import moefy_target
    from clframe.targets import open_target
    from clframe.targets.folders import write_conversion

    file = folder / "moefy.json"
    if not file.is_file():
        torch.set_num_threads(1)
        study = moefy_target(open_target(str(run), overrides=overrides), Options(**options))
        write_conversion(study, folder)
    tree: dict[str, Any] = json.loads(file.read_text())
    if json.loads(json.dumps({**tree["options"], **options})) != tree["options"]:
        raise SystemExit(f"{folder}: made with other options; delete it, or give another --out")
    return tree


def shown(values: Sequence[float], *, decimals: int = 1, scale: float = 100) -> str:
    """Mean, and sample standard deviation where there are several."""
    if not values:
        return "-"
    mean = f"{scale * statistics.mean(values):.{decimals}f}"
    return mean if len(values) == 1 else f"{mean} ± {scale * statistics.stdev(values):.{decimals}f}"


def chosen(name: str, found: Mapping[float, Sequence[Mapping[str, Any]]]) -> str:
    """Accuracy of D2DMoE on validation data by strength, and the strength with the highest mean over the budgets."""
    lines = [f"### {name}: validation", "", "| strength | at 25 % | at 50 % | at 75 % | mean |", "|---:|---:|---:|---:|---:|"]
    means = {}
    for strength, trees in found.items():
        columns = [[_at(tree, budget)["validation"]["accuracy"] for tree in trees] for budget in (0.25, 0.5, 0.75)]
        means[strength] = statistics.mean(value for column in columns for value in column)
        shares = " | ".join([*map(shown, columns), shown([means[strength]])])
        lines.append(f"| {strength:g} | {shares} |")
    return "\n".join([*lines, "", f"best: {max(means, key=lambda strength: means[strength]):g}", ""])


def table(name: str, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The rows of a bench as Markdown: accuracy on test data at shares of the networks' cost."""
    heading = ["row", "seeds", "dense", "fine-tuned", "at 25 %", "at 50 %", "at 75 %", "model at 50 %",
               "time at 50 %: batch 1", "batch 32", "router"]  # fmt: skip
    lines = [f"### {name}", "", "| " + " | ".join(heading) + " |", "|---|" + "---:|" * (len(heading) - 1)]
    for row, trees in found.items():
        points = {budget: [_at(tree, budget) for tree in trees] for budget in (0.25, 0.5, 0.75)}
        cells = [row, str(len(trees)), shown([tree["accuracy"]["dense"] for tree in trees]),
                 shown([tree["accuracy"].get("sparsified", tree["accuracy"]["dense"]) for tree in trees])]  # fmt: skip
        for at in points.values():
            there = [point["test"]["accuracy"] for point in at if point["test"]]
            costs = [point["test"]["ffn_share"] for point in at if point["test"]]
            cells.append(f"{shown(there)} ({shown(costs)})" if there else "-")
        half = [point for point in points[0.5] if point["test"]]
        cells.append(shown([point["test"]["share"] for point in half]))
        for large in (False, True):
            speed = [_speed(tree, point, large=large) for tree, point in zip(trees, points[0.5], strict=True)]
            cells.append(f"{shown([s for s in speed if s], decimals=2, scale=1)}x")
        cells.append(shown([tree["router_share"] for tree in trees]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *exits(found)])


def exits(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Experts and early exits together, at shares of the model's cost."""
    if not any(tree["exits"] for trees in found.values() for tree in trees):
        return []
    heading = ["row", "way", "at 25 % of the model", "at 50 %", "at 75 %"]
    lines = ["| " + " | ".join(heading) + " |", "|---|---|" + "---:|" * 3]
    for row, trees in found.items():
        for way in ("experts", "exits", "both"):
            cells = [row, way]
            for budget in (0.25, 0.5, 0.75):
                points = [next(p for p in tree["exits"]["points"] if p["budget"] == budget).get(way) for tree in trees]
                there = [point for point in points if point]
                at = f"{shown([p['accuracy'] for p in there])} ({shown([p['share'] for p in there])})"
                cells.append(at if len(there) == len(trees) else "-")
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _at(tree: Mapping[str, Any], budget: float) -> Mapping[str, Any]:
    return next(point for point in tree["points"] if point["scope"] == "ffn" and point["budget"] == budget)


def _speed(tree: Mapping[str, Any], point: Mapping[str, Any], *, large: bool) -> float | None:
    name = "k" if "k" in tree["setting"] else "tau"
    times = (one for one in tree["times"] if one[name] == point[name] and (one["batch"] > 1) == large)
    return next((one["speedup"] for one in times), None)


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benches", nargs="+", choices=BENCHES, default=["vit", "mlp", "continual"])
    parser.add_argument("--data-dir", help="folder of MNIST or of the texts")
    parser.add_argument("--encoder", help="folder of a BERT with its tokenizer, for text")
    parser.add_argument("--out", type=Path, default=Path("runs/moefy_table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", help="these only")
    parser.add_argument("--strengths", type=float, nargs="+", help="D2DMoE at each, on validation data only")
    parser.add_argument("--override", nargs="*", default=[], help="key=value for every run")
    parser.add_argument("--print-only", action="store_true", help="print what is finished, run nothing")
    options = parser.parse_args()
    if options.print_only:
        for name in options.benches:
            print(table(name, _finished(options.out, name, options.seeds)))
        return
    data = [f"benchmark.data_dir={options.data_dir}"] if options.data_dir else []
    for name in options.benches:
        bench = BENCHES[name]
        if name == "text" and not options.encoder:
            parser.error("text: give --encoder FOLDER")
        text = [f"backbone.pretrained={options.encoder}", f"benchmark.tokens={options.encoder}"] if name == "text" else []
        shared = (*bench.overrides, *text, *data, "trainer.threads=1", "trainer.progress=false", "trainer.loggers=[csv]",
                  *options.override)  # fmt: skip
        cells = [Cell(name, bench.config, shared, seed) for seed in options.seeds]
        for cell, results in run_cells(cells, options.out, workers=1):
            seconds = json.loads(results.read_text())["train_seconds"]
            print(f"{name}, seed {cell.seed}: dense, {seconds:.0f} s of training", flush=True)
            wanted_rows = rows_of(bench, cell.seed)
            if options.strengths:
                wanted_rows = {_tried(s): {**wanted_rows["D2DMoE"], "strength": s} for s in options.strengths}
            for row, wanted in wanted_rows.items():
                if options.rows is None or row in options.rows:
                    start = time.process_time()
                    convert(results.parent, wanted, _folder(options.out, name, row, cell.seed), data)
                    print(f"{name}, seed {cell.seed}: {row}, {time.process_time() - start:.0f} s of CPU", flush=True)
    for name in options.benches:
        if options.strengths:
            rows = {strength: _read(options.out, name, _tried(strength), options.seeds) for strength in options.strengths}
            print("\n" + chosen(name, rows))
        else:
            print("\n" + table(name, _finished(options.out, name, options.seeds)))


def _folder(out: Path, bench: str, row: str, seed: int) -> Path:
    return out / "converted" / bench / row.replace(",", "").replace(" + ", "-").replace(" ", "-") / f"seed{seed}"


def _tried(strength: float) -> str:
    return f"D2DMoE at {strength:g}"


def _finished(out: Path, name: str, seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    found = {row: _read(out, name, row, seeds) for row in rows_of(BENCHES[name], 0)}
    return {row: trees for row, trees in found.items() if trees}


def _read(out: Path, name: str, row: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    files = [_folder(out, name, row, seed) / "moefy.json" for seed in seeds]
    return [json.loads(file.read_text()) for file in files if file.is_file()]


if __name__ == "__main__":
    main()
