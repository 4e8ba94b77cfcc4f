"""The exit race under ``torch.compile``: the rivals of exit_race_cuda.py, each in a separate process."""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from exit_race import macs, shares_for, thresholds_for
from exit_race_graphs import CALLS, Run, bare, build, captured, compile_parts, placed_by_time, race, stage_times
from torch import Tensor

from clframe.exits.captured import CapturedNetwork
from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.policies import ExitPolicy
from clframe.nn import Network

RIVALS = ("default", "reduce-overhead", "stages")
START = 25.0
"""Seconds at most in which the process of a rival begins to compile."""
RACE = Path(__file__).with_name("exit_race_cuda.py")


def rival(model: str, batch: int, budgets: Sequence[float], kind: str) -> dict[str, Any]:
    """The captured backbone against torch.compile, or the fast runner with compiled stages and heads."""
    network = build(model, torch.device("cuda"))
    torch.manual_seed(1)
    batches = [torch.randn(batch, *network.input_shape, device="cuda") for _ in range(2 * CALLS[batch])]
    row: dict[str, Any] = {"model": model, "batch": batch, "rival": kind}
    with torch.no_grad():
        runs: dict[str, Run] = {"captured": captured(bare(network), batches[0])}
        start = time.perf_counter()
        if kind == "stages":
            compiled, row["timed"] = compiled_stages(model, batch, budgets, network, batches)
            runs |= compiled
        else:
            runs[f"compiled {kind}"] = torch.compile(bare(network), mode=kind, dynamic=False)
            for _ in range(3):
                runs[f"compiled {kind}"](batches[0])
        torch.cuda.synchronize()
        row["compiling_s"] = time.perf_counter() - start
        row["ms"] = race(runs, batches, calls=CALLS[batch], seconds=1)
    return row


def compiled_stages(
    model: str, batch: int, budgets: Sequence[float], network: Network, batches: Sequence[Tensor]
) -> tuple[dict[str, Run], dict[str, Any]]:
    """The contestants with compiled stages: all exits, exits placed by the time of compiled stages, and no exits."""
    scores = [network(x).logits for part in batches for x in part.split(256)]
    on_host, work = [torch.cat(parts).cpu() for parts in zip(*scores, strict=True)], macs(network)
    # Stages of one class share their code, and the limit of its variants, beyond which they would not be compiled.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    own = build(model, torch.device("cuda"))
    compile_parts(own)
    runs: dict[str, Run] = {}
    notes: dict[str, Any] = {}
    for budget in budgets:
        shares = shares_for(work, tuple(range(len(work.heads) - 1)), budget)
        if shares is None:
            continue
        policy = ExitPolicy(thresholds=thresholds_for(on_host, shares))
        runs[f"fast compiled {budget:.0%}"] = warmed(CapturedNetwork(DynamicNetwork(own, policy), batch=batch), batches)
    runs["captured compiled"] = captured(bare(own), batches[0])
    by_time = placed_by_time(model, own, stage_times(own, batches[0][:256], work), batches, compiled=True)
    for budget in budgets:
        if by_time is not None and (share := by_time(budget, batch)) is not None:
            runs[f"timed compiled {budget:.0%}"], notes[f"{budget:.0%}"] = warmed(share[0], batches), share[1]
    return runs, notes


def warmed(fast: CapturedNetwork, batches: Sequence[Tensor]) -> CapturedNetwork:
    """Record its graphs."""
    for _, x in itertools.product(range(4), batches):
        fast(x)
    if fast.failure:
        raise RuntimeError(fast.failure)
    return fast


def rival_apart(model: str, batch: int, options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """The row of a rival from a separate process: one that crashes ends it."""
    limit = START + options.compile * (2 if kind == "stages" else 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        command = [sys.executable, str(RACE), "--rival", kind, "--model", model, "--batch", str(batch),
                   "--budget", *map(str, options.budget), "--json", str(path)]  # fmt: skip
        row: dict[str, Any] = {"model": model, "batch": batch, "rival": kind}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return row | {"failure": f"not compiled within {limit:.0f} s"}
        if done.returncode or not path.exists():
            lines = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines()[-1:]
            return row | {"failure": f"exit code {done.returncode}: {' '.join(lines[:1])[:300]}"}
        found: dict[str, Any] = json.loads(path.read_text())
        return found
