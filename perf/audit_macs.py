"""Audit of the ledger: MACs of whole runs counted by torch's own counter, next to what the ledger says.

    python perf/audit_macs.py
    python perf/audit_macs.py --config quickstart --strategies "er + lwf" ewc -- trainer.budget.relative=0.5

torch's ``FlopCounterMode`` counts every product of every step, of the teachers, and of what components compute between
experiences; the ledger counts the first step of each kind and multiplies. Evaluation is not part of the comparison. torch
overcounts the backward pass of grouped convolutions (which per-sample gradients of convolutions are, as in ``ewc``) and
leaves out LSTMs, so choose a backbone without them. Exit code 1 if a run differs by more than 0.5 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import clframe
from clframe.data.avalanche import import_avalanche

import_avalanche()

from clframe.training.strategy import LightningStrategy

LARGEST_DIFFERENCE = 0.005
RUNS = {"er + lwf + exits": (), "ewc": ("backbone=mlp",), "derpp + sparsity": ()}
"""Strategy -> overrides."""


def audit(config: str, overrides: Sequence[str]) -> tuple[int, int]:
    """Return the MACs of training in a run: those of the ledger, and those that torch counts."""
    counted, train = [], LightningStrategy.train

    def traced(self: Any, *args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            found = train(self, *args, **kwargs)
        counted.append(counter.get_total_flops())
        return found

    LightningStrategy.train = traced  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            quiet = ["trainer.progress=false", "trainer.loggers=[]", "trainer.figures=none"]
            run = clframe.run(config, [*quiet, *overrides], output=folder).run_folder
            ledger = json.loads((Path(str(run)) / "ledger.json").read_text())["ledger"]
            entries = [entry for entry in ledger["entries"] if entry["phase"] != "evaluation"]
            # With a budget, the first calls are those of the copy on which costs are counted.
            experiences = len({entry["experience"] for entry in entries})
    finally:
        LightningStrategy.train = train  # type: ignore[method-assign]
    return sum(entry["macs"] for entry in entries), sum(counted[-experiences:]) // 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--strategies", nargs="+", default=list(RUNS))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    worst = 0.0
    for strategy in options.strategies:
        ledger, traced = audit(options.config, [f"strategy={strategy}", *RUNS.get(strategy, ()), *options.overrides])
        difference = ledger / traced - 1
        worst = max(worst, abs(difference))
        print(f"{strategy:<28} ledger {ledger:>16,}   torch {traced:>16,}   {difference:+.3%}", flush=True)
    return int(worst > LARGEST_DIFFERENCE)


if __name__ == "__main__":
    sys.exit(main())
