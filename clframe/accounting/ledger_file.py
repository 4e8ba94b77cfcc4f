"""ledger.json of a run: its costs and every entry of its ledger."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clframe.accounting.ledger import Ledger
from clframe.accounting.predictions import Predictions
from clframe.files import write_atomically
from clframe.records import to_json_rows


def write_ledger(
    path: Path,
    ledger: Ledger,
    *,
    inference_macs: Mapping[str, int],
    exit_macs: Mapping[str, int],
    steps: int,
    batches: int,
    train_seconds: float,
    state_bytes: Mapping[str, int],
) -> None:
    """Write costs: of training, of a prediction stage by stage, of component states, and every ledger entry.

    Args:
        path: The file.
        ledger: Every entry.
        inference_macs: What :func:`~clframe.accounting.stage_macs` returns for the network at the end.
        exit_macs: MACs of a sample that stops at an exit, by the exit's name.
        steps: Optimizer steps of the run.
        batches: Batches trained on.
        train_seconds: Wall time of training.
        state_bytes: Size of each component's state.
    """
    costs = {
        "convention": "macs: one multiply-add counts 1; FLOPs = 2 x MACs",
        "training": {"steps": steps, "batches": batches, "seconds": train_seconds},
        "inference_macs": dict(inference_macs),
        "exit_macs": dict(exit_macs),
        "state_bytes": dict(state_bytes),
        "ledger": ledger.as_tree(),
        "totals": {
            "macs": ledger.macs,
            "training_macs": ledger.training_macs,
            "by_phase": ledger.by_phase(),
            "by_component": ledger.by_component(),
            "samples": ledger.samples("forward"),
            "replayed_samples": ledger.samples("replay"),
            "seconds": ledger.seconds(),
            "bytes": ledger.bytes(),
            "energy": asdict(ledger.energy()),
            "uncounted": ledger.uncounted(),
            "prediction": _prediction_costs(ledger.predictions),
        },
    }
    write_atomically(path, to_json_rows(costs) + "\n")


def _prediction_costs(found: Predictions) -> dict[str, Any]:
    """Costs of a prediction at the end of the run; a mean without samples is null."""
    mean, experts = found.mean(), found.experts()
    return {
        "whole": found.whole(),
        "mean": None if math.isnan(mean) else mean,
        **({"expert_samples": max(row.samples for row in experts)} if experts else {}),
        "by_component": found.by_component(),
        "by_exit": found.by_exit(),
        "samples_by_exit": found.samples_by_exit(),
        "dense_by_role": found.by_role(),
        "effective_by_role": found.by_role(count="effective"),
    }
