"""Analytical and trained routers at equal cost: accuracy at 25 and 50 % of the cost of the feed-forward networks.

    python perf/analytical_table.py --data-dir DATA --out RESULTS --benches vit vit_sparse --seeds 0 1 2
    python perf/analytical_table.py --data-dir DATA --out RESULTS --benches text text_sparse --encoder FOLDER --seeds 0 1 2
    python perf/analytical_table.py --data-dir DATA --out RESULTS --benches minilm --encoder FOLDER
    python perf/analytical_table.py --out RESULTS --benches vit text --seeds 0 1 --print-only

``vit``: a small ViT on MNIST. ``text``: a small BERT trained from scratch on 30 intents of CLINC150, with the tokenizer in
FOLDER; ``minilm``: the encoder in FOLDER fine-tuned on them. ``_sparse``: trained with ReLU and a penalty on active neurons
(component ``sparsity``). A dense model is a cell (``cells.py``); its conversions differ in router, split and shared experts
only: nothing is fine-tuned afterwards, and the gate is top-k with the largest k within the budget, so that equal rows cost
the same up to the router. Routers see the inputs of the same training samples.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import Cell, run_cells
from moefy_table import shown

BUDGETS = (0.25, 0.5)
ONE = ("benchmark.experiences=1", "benchmark.validation=0.1", "optimizer.schedule=cosine")
VIT = (*ONE, "backbone=vit_tiny", "backbone.patch=7", "backbone.depth=4", "optimizer.name=adam", "optimizer.lr=0.001",
       "trainer.epochs=2", "trainer.batch_size=64")  # fmt: skip
CLINC = (*ONE, "benchmark=clinc150", "benchmark.classes=30", "benchmark.max_length=16")
MINILM = (*CLINC, "backbone=hf_text", "backbone.pooling=mean", "optimizer.name=adamw", "optimizer.lr=0.0002",
          "trainer.epochs=2", "trainer.batch_size=32")  # fmt: skip
TEXT = (*CLINC, "backbone=bert", "backbone.width=128", "backbone.depth=3", "backbone.pooling=mean", "optimizer.name=adam",
        "optimizer.lr=0.001", "trainer.epochs=8", "trainer.batch_size=64")  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """A dense model and its number of experts."""

    config: str
    overrides: tuple[str, ...]
    experts: int
    samples: int


def sparse(strength: float) -> tuple[str, str]:
    """Overrides that train with ReLU and the penalty."""
    return ("strategy=sparsity", f"components.sparsity={{strength: {strength}, relu: true, schedule: warmup, ramp: step}}")


BENCHES = {
    "vit": Bench("split_mnist", (*VIT, "strategy=naive"), 16, 4000),
    "vit_sparse": Bench("split_mnist", (*VIT, *sparse(0.03)), 16, 4000),
    "text": Bench("quickstart", (*TEXT, "strategy=naive"), 16, 2000),
    "text_sparse": Bench("quickstart", (*TEXT, *sparse(0.003)), 16, 2000),
    "minilm": Bench("quickstart", (*MINILM, "strategy=naive"), 24, 500),
}
ROWS: dict[str, dict[str, Any]] = {
    "trained, kmeans": {"router": "norm"},
    "analytical, kmeans": {"router": "analytical"},
    "trained, coactivation": {"router": "norm", "split": "coactivation"},
    "analytical, coactivation": {"router": "analytical", "split": "coactivation"},
    "trained, coactivation, 2 shared": {"router": "norm", "split": "coactivation", "shared": 2},
    "analytical, coactivation, 2 shared": {"router": "analytical", "split": "coactivation", "shared": 2},
}


def accuracy(target: Any, *, limit: int) -> float:
    """Share of test samples that the last exit classifies correctly."""
    import torch

    right = total = 0
    with torch.no_grad():
        for inputs, targets, _ in target.batches("test", size=64, limit=limit):
            right += int((target.predict(target.model, inputs).argmax(1) == targets).sum())
            total += len(targets)
    return right / total


def convert_row(run: Path, row: str, bench: Bench, *, seed: int, limit: int, overrides: list[str]) -> dict[str, Any]:
    """Convert a dense model and measure it at every budget."""
    from clframe.moe import TopK, set_gate
    from clframe.moe.conversion.convert import convert
    from clframe.moe.conversion.options import Options
    from clframe.targets import open_target

    target = open_target(str(run), overrides=overrides)
    options = Options(on="all", sparsify=0, gate="top_k", experts=bench.experts, samples=bench.samples, limit=limit,
                      seed=seed, **ROWS[row])  # fmt: skip
    conversion = convert(target, options)
    layer = next(iter(conversion.layers.values()))
    macs = layer.macs()
    found: dict[str, Any] = {"dense": conversion.accuracies["dense"], "router": macs.router_share, "points": {}}
    for budget in BUDGETS:
        running = int((budget - macs.router_share) * macs.experts + 1e-9)  # of each token, shared ones included
        set_gate(target.model, TopK(k=running - layer.shared))
        cost = running / macs.experts + macs.router_share
        found["points"][str(budget)] = {"share": cost, "accuracy": accuracy(target, limit=limit)}
    return found


def table(name: str, out: Path, seeds: list[int]) -> str:
    """The rows of a bench as Markdown; the difference is analytical minus trained of the same split, paired over seeds."""
    heading = ["router and split", "seeds", "dense", "at 25 %", "minus trained", "at 50 %", "minus trained", "router"]
    lines = [f"### {name}", "", f"| {' | '.join(heading)} |", "|---|" + "---:|" * (len(heading) - 1)]
    for row in ROWS:
        trees = {seed: json.loads(file.read_text()) for seed in seeds if (file := row_file(out, name, row, seed)).is_file()}
        if not trees:
            continue
        cells = [row, str(len(trees)), shown([tree["dense"] for tree in trees.values()])]
        for budget in map(str, BUDGETS):
            points = {seed: tree["points"][budget] for seed, tree in trees.items()}
            share = 100 * statistics.mean(point["share"] for point in points.values())
            cells.append(f"{shown([point['accuracy'] for point in points.values()])} ({share:.1f})")
            others = {seed: row_file(out, name, row.replace("analytical", "trained"), seed) for seed in points}
            pairs = [(points[s]["accuracy"], json.loads(f.read_text())["points"][budget]["accuracy"])
                     for s, f in others.items() if f.is_file()]  # fmt: skip
            cells.append(shown([a - b for a, b in pairs]) if row.startswith("analytical") and pairs else "-")
        cells.append(shown([next(iter(trees.values()))["router"]]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def row_file(out: Path, bench: str, row: str, seed: int) -> Path:
    """File of one conversion."""
    return out / "converted" / bench / row.replace(", ", "-").replace(" ", "") / f"seed{seed}.json"


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benches", nargs="+", choices=BENCHES, default=["vit", "vit_sparse"])
    parser.add_argument("--data-dir", help="folder of MNIST or of the texts")
    parser.add_argument("--encoder", help="folder of a BERT with its tokenizer, for text")
    parser.add_argument("--out", type=Path, default=Path("runs/analytical_table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--limit", type=int, default=2000, help="test samples")
    parser.add_argument("--print-only", action="store_true", help="print what is finished, run nothing")
    options = parser.parse_args()
    data = [f"benchmark.data_dir={options.data_dir}"] if options.data_dir else []
    for seed in [] if options.print_only else options.seeds:
        for name in options.benches:
            bench, text = BENCHES[name], []
            if not name.startswith("vit"):
                if not options.encoder:
                    parser.error(f"{name}: give --encoder FOLDER")
                text = [f"backbone.pretrained={options.encoder}"] if name == "minilm" else []
                text.append(f"benchmark.tokens={options.encoder}")
            cell = Cell(name, bench.config, (*bench.overrides, *text, *data, "trainer.threads=1", "trainer.progress=false",
                                             "trainer.loggers=[csv]", "trainer.figures=none"), seed)  # fmt: skip
            for _, results in run_cells([cell], options.out, workers=1):
                for row in options.rows:
                    file = row_file(options.out, name, row, seed)
                    if not file.is_file():
                        tree = convert_row(results.parent, row, bench, seed=seed, limit=options.limit, overrides=data)
                        file.parent.mkdir(parents=True, exist_ok=True)
                        file.write_text(json.dumps(tree, indent=2) + "\n")
                        print(f"{name}, seed {seed}: {row}: {tree}", flush=True)
    for name in options.benches:
        print("\n" + table(name, options.out, options.seeds))


if __name__ == "__main__":
    main()
