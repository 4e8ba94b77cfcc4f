"""Perplexity matrices of strategies on text: four domains in a row, with the decoder backbone.

    python perf/language_streams.py DATA --json FILE                       # the sizes of docs/language_models.md
    python perf/language_streams.py DATA --width 384 --depth 6 --heads 6 --vocabulary 4096 --context 256 --batch 64 \
        --characters 0 --seeds 0 1 2 --accelerator cuda --seconds 500 --json FILE

DATA is a folder with NAME_train.txt and NAME_test.txt (or .txt.xz) of each domain, learned in the order of ``--domains``.
A run that would begin after ``--seconds`` is left out; the file is written after every run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import clframe

STRATEGIES = {
    "naive": "naive",
    "er": "er(memory=512)",
    "lwf": "lwf(alpha=1.0, temperature=1.0)",
    "ewc": "ewc(lamb=1000.0, samples=256, ceiling=1.0)",
    "lora": "lora(rank=8)",
    "joint": "joint",
    "er+exits": "er(memory=512) + exits(at=[block1, block2])",
    "er+sparsity": "er(memory=512) + sparsity(strength=0.01)",
}


def overrides(options: argparse.Namespace, strategy: str, seed: int, cache: str) -> list[str]:
    """Overrides of the experiment language_model."""
    return [
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
    asked = overrides(options, STRATEGIES[name], seed, str(Path(folder) / "cache"))
    result = clframe.run("language_model", asked, output=Path(folder) / "runs")
    return {
        "strategy": name, "expression": STRATEGIES[name], "seed": seed, "metrics": dict(result.metrics),
        "nll_matrix": result.nll_matrix, "perplexity_matrix": result.perplexity_matrix, "parameters": result.parameters,
        "macs_per_window": result.macs, "steps": result.steps, "train_seconds": result.train_seconds,
        "seconds": time.perf_counter() - start, "state_bytes": dict(result.state_bytes),
        "exits": {n: record for n, record in zip(result.exit_names, result.exits[-1].nll_KE, strict=True)},
        "exit_forgetting_nats": result.exit_forgetting_nats, "test_tokens": result.test_samples,
    }  # fmt: skip


def main() -> None:
    """Run every strategy and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--domains", nargs="+", default=["literature", "c_code", "python_code", "proposals"])
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    for name, value in (("width", 128), ("depth", 4), ("heads", 4), ("vocabulary", 2048), ("context", 128),
                        ("batch", 16), ("characters", 1_000_000), ("test-characters", 150_000)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--ffn", default="swiglu")
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--json", required=True)
    options = parser.parse_args()
    began, runs = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for name in options.strategies:
                if time.perf_counter() - began > options.seconds:
                    continue
                runs.append(run_one(options, name, seed, folder))
                last = runs[-1]
                rows = " | ".join(" ".join(f"{p:8.1f}" for p in row) for row in last["perplexity_matrix"])
                print(f"{name:12} seed {seed}  {last['seconds']:6.1f} s  {rows}", flush=True)
                content = {"options": vars(options), "runs": runs}
                Path(options.json).write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
