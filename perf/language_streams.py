"""Perplexity matrices of strategies on text: four domains in a row, with the decoder backbone.

    python perf/language_streams.py DATA --json FILE                       # the sizes of docs/language_models.md
    python perf/language_streams.py DATA --width 384 --depth 6 --heads 6 --vocabulary 4096 --context 256 --batch 64 \
        --characters 0 --seeds 0 1 2 --accelerator cuda --seconds 500 --json FILE
    python perf/language_streams.py --table FILE FILE                      # tables of finished files, over seeds

DATA is a folder with NAME_train.txt and NAME_test.txt (or .txt.xz) of each domain, learned in the order of ``--domains``.
A run that would end after ``--seconds``, as long as the longest before it took, is left out; the file is written after
every run. Several processes may share a GPU, with a file each, such as one for each seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from language_decoders import spread_of

import clframe
from clframe.functional.language import perplexity
from clframe.metrics.statistics import mean
from clframe.results import Result

STRATEGIES = {
    "naive": "naive",
    "er": "er(memory=512)",
    "er-4096": "er(memory=4096)",
    "lwf": "lwf(alpha=1.0, temperature=1.0)",
    "derpp": "derpp(memory=512)",
    "ewc": "ewc(lamb=1000.0, samples=256, ceiling=1.0)",
    "lora": "lora(rank=8)",
    "lora-apart": "lora(rank=8, merge=apart)",
    "lora-domain": "lora(rank=8, merge=apart, choose=domain)",
    "joint": "joint",
    "er+exits": "er(memory=512) + exits(at=[EXITS])",
    "er+sparsity": "er(memory=512) + sparsity(strength=0.001, relu=true)",
}


def expression(options: argparse.Namespace, name: str) -> str:
    """The strategy, with exits after a third and two thirds of the blocks."""
    blocks = [f"block{max(1, part * options.depth // 3)}" for part in (1, 2)]
    return STRATEGIES[name].replace("EXITS", ", ".join(dict.fromkeys(blocks)))


def overrides(options: argparse.Namespace, strategy: str, seed: int, cache: str) -> list[str]:
    """Overrides of the experiment language_model."""
    protocol = "task_incremental" if "choose=domain" in strategy else "class_incremental"
    return [
        f"benchmark.protocol={protocol}",
        f"benchmark.path={options.data}", f"benchmark.domains=[{','.join(options.domains)}]",
        f"benchmark.experiences={len(options.domains)}", f"benchmark.vocabulary={options.vocabulary}",
        f"benchmark.context={options.context}", f"benchmark.characters={options.characters}",
        f"benchmark.test_characters={options.test_characters}", f"benchmark.cache={cache}",
        f"backbone.width={options.width}", f"backbone.depth={options.depth}", f"backbone.heads={options.heads}",
        f"backbone.ffn={options.ffn}", f"optimizer.lr={options.lr}", f"trainer.batch_size={options.batch}",
        f"trainer.accelerator={options.accelerator}", f"trainer.precision={options.precision}", "trainer.figures=none",
        "trainer.loggers=[csv]", f"seed={seed}", f'strategy="{strategy}"',
    ]  # fmt: skip


def run_one(options: argparse.Namespace, name: str, seed: int, folder: str) -> dict[str, Any]:
    """Train one strategy with one seed; returns its numbers."""
    start = time.perf_counter()
    asked = overrides(options, expression(options, name), seed, options.cache or str(Path(folder) / "cache"))
    result = clframe.run("language_model", asked, output=Path(folder) / "runs")
    return {
        "strategy": name, "expression": expression(options, name), "seed": seed, "metrics": dict(result.metrics),
        "nll_matrix": result.nll_matrix, "perplexity_matrix": result.perplexity_matrix, "parameters": result.parameters,
        "macs_per_window": result.macs, "steps": result.steps, "train_seconds": result.train_seconds,
        "seconds": time.perf_counter() - start, "state_bytes": dict(result.state_bytes),
        "exits": {n: record for n, record in zip(result.exit_names, result.exits[-1].nll_KE, strict=True)},
        "exit_forgetting_nats": result.exit_forgetting_nats, "test_tokens": result.test_samples,
        "sparsity": hidden_sparsity(result),
    }  # fmt: skip


def hidden_sparsity(result: Result) -> float | None:
    """Share of hidden neurons that are zero at the end, mean over layers."""
    layers = result.activity[-1].layers.values() if result.activity else ()
    return mean([layer.sparsity for layer in layers]) if layers else None


def tables(files: Sequence[str]) -> None:
    """Print Markdown tables of finished files: means over seeds and standard deviations."""
    contents = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
    runs = [run for content in contents for run in content["runs"]]
    domains = contents[0]["options"]["domains"]
    print("| strategy | seeds | " + " | ".join(domains) + " | final perplexity | nats just after learning | forgetting, nats | training, s |")
    print("|" + "---|" * (6 + len(domains)))
    for name in STRATEGIES:
        own = [run for run in runs if run["strategy"] == name]
        if own:
            columns = [spread_of([perplexity(run["nll_matrix"][-1][at]) for run in own]) for at in range(len(domains))]
            columns.append(spread_of([run["metrics"]["final_perplexity"] for run in own]))
            columns += [spread_of([run["metrics"].get(key, float("nan")) for run in own], digits=2)
                        for key in ("learning_nats", "forgetting_nats")]  # fmt: skip
            columns.append(spread_of([run["train_seconds"] for run in own], digits=0))
            print(f"| `{own[0]['expression']}` | {len(own)} | " + " | ".join(columns) + " |")
    print("\n| strategy | exit | perplexity | forgetting, nats |\n|---|---|---|---|")
    for name in STRATEGIES:
        own = [run for run in runs if run["strategy"] == name and len(run["exits"]) > 1]
        for at, exit in enumerate(own[0]["exits"] if own else ()):
            nats = spread_of([perplexity(mean(run["exits"][exit])) for run in own])
            forgetting = spread_of([run["exit_forgetting_nats"][at] for run in own], digits=2)
            print(f"| {name} | {exit} | {nats} | {forgetting} |")
    for name in STRATEGIES:
        own = [run for run in runs if run["strategy"] == name and run.get("sparsity") is not None]
        if own:
            share = spread_of([100 * run["sparsity"] for run in own])
            print(f"- {name}: {share} % of the hidden neurons are zero at the end")
    for name in STRATEGIES:
        own = [run for run in runs if run["strategy"] == name]
        for after in range(len(domains)) if own else ():
            found = [[run["nll_matrix"][after][at] for run in own] for at in range(len(domains))]
            row = " | ".join(spread_of([perplexity(nat) for nat in column]) for column in found)
            print(f"{name} after {domains[after]}: {row}")


def main() -> None:
    """Run every strategy and seed."""
    if "--table" in sys.argv:
        tables(sys.argv[sys.argv.index("--table") + 1 :])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--domains", nargs="+", default=["literature", "c_code", "python_code", "proposals"])
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    for name, value in (("width", 128), ("depth", 4), ("heads", 4), ("vocabulary", 2048), ("context", 128),
                        ("batch", 16), ("characters", 1_000_000), ("test-characters", 150_000)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--cache", default="", help="folder for the tokenizer and the ids, which later starts read")
    parser.add_argument("--ffn", default="swiglu")
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--json", required=True)
    options = parser.parse_args()
    began, runs = time.perf_counter(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for name in options.strategies:
                longest = max((run["seconds"] for run in runs), default=0.0)
                if time.perf_counter() - began + longest > options.seconds:
                    print(f"{name:12} seed {seed}  left out, it would end after --seconds", flush=True)
                    continue
                runs.append(run_one(options, name, seed, folder))
                last = runs[-1]
                rows = " | ".join(" ".join(f"{p:8.1f}" for p in row) for row in last["perplexity_matrix"])
                print(f"{name:12} seed {seed}  {last['seconds']:6.1f} s  {rows}", flush=True)
                content = {"options": vars(options), "runs": runs}
                Path(options.json).write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
