"""The training race: one model, one data set, one number of steps, through every loop.

    python perf/train_race.py                      # perceptron 784-256-256-10, batch 32
    python perf/train_race.py --model mlp-digits   # perceptron 64-256-256-10, the size of the digits
    python perf/train_race.py --model resnet20     # ResNet20 on 3x32x32, batch 128
    python perf/train_race.py --quick              # fewer repetitions, wider spread

Every contestant (contestants.py) has the same layers with the same initial weights, the same float32
images in memory, SGD with momentum, and one thread. They take turns every 20 steps (relay.py); ratios
are taken within a repetition and their median over repetitions is reported, so that what slows the machine
slows everybody. Timed, in processor time, is the loop itself or ``strategy.train(experience)`` and nothing
before it. First of all everybody trains on the same order of samples, and there is no race
unless all weights come out the same.

Replay trains on the second of two experiences: batches of new samples joined by as many out of a memory of
200. All others train on a single experience.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if "MALLOC_ARENA_MAX" not in os.environ:
    # glibc gives every thread a heap of its own and returns it to the system piece by piece: page faults
    # that no loop has outside of this race. Both variables are read when a process starts.
    os.environ.update(MALLOC_ARENA_MAX="1", OMP_NUM_THREADS="1")
    os.execv(sys.executable, [sys.executable, *sys.argv])

import torch
from contestants import (
    EPOCHS,
    Course,
    Setting,
    Start,
    by_hand,
    by_hand_with_loader,
    ours,
    replay_by_hand,
    theirs,
)
from relay import Relay

Contestant = Callable[[Course], Start]
Seconds = dict[str, list[float]]

SETTINGS = {
    "mlp": Setting("mlp", (1, 28, 28), batch=32, steps=100),
    "mlp-digits": Setting("mlp", (1, 8, 8), batch=32, steps=100),
    "resnet20": Setting("resnet20", (3, 32, 32), batch=128, steps=2),
}
PLAIN: dict[str, Contestant] = {
    "by hand": by_hand,
    "by hand, DataLoader": by_hand_with_loader,
    "clframe `naive`": lambda c: ours(c, "naive"),
    "clframe `naive`, fused SGD": lambda c: ours(c, "naive", fused=True),
    "clframe `naive`, logging every 20 steps": lambda c: ours(c, "naive", logs=True),
    "clframe `naive`, Avalanche's metrics": lambda c: ours(c, "naive", metrics=True),
    "clframe `naive`, `engine: trainer`": lambda c: ours(c, "naive", engine="trainer"),
    "Avalanche Naive, no metrics": lambda c: theirs(c, "Naive", metrics="none"),
    "Avalanche Naive": lambda c: theirs(c, "Naive"),
    "Avalanche Naive, metrics of every batch": lambda c: theirs(c, "Naive", metrics="minibatch"),
}
REPLAY: dict[str, Contestant] = {
    "replay by hand": replay_by_hand,
    "clframe `er`": lambda c: ours(c, "er", experience=1),
    "clframe `er`, `engine: trainer`": lambda c: ours(c, "er", experience=1, engine="trainer"),
    "Avalanche Replay": lambda c: theirs(c, "Replay", experience=1),
}
PEERS = ("Avalanche Naive", "Avalanche Replay")
"""Whom the others' speed is compared with: accuracy and loss of every epoch, as its examples have it."""


def check(contestants: dict[str, Contestant], course: Course) -> str:
    """Train everybody on one order of samples and compare the weights with those of the hand-written loop.

    Avalanche's Replay keeps and draws samples of its own choice, so it is left out.
    """
    starts = {name: contestant(course) for name, contestant in contestants.items() if name != PEERS[1]}
    for start in starts.values():
        start.go()
    reference = next(iter(starts.values())).weights()
    exact = 0
    for name, start in starts.items():
        pairs = list(zip(reference, start.weights(), strict=True))
        for a, b in pairs:
            torch.testing.assert_close(a, b, msg=partial("{}: other weights: {}".format, name))
        exact += all(torch.equal(a, b) for a, b in pairs)
    rest = "" if exact == len(starts) else ", those of the others within 1e-5"
    return f"the weights of {exact} of {len(starts)} loops are equal bit for bit{rest}"


def race(contestants: dict[str, Contestant], course: Course, *, repeats: int, leg: int) -> Seconds:
    """Seconds a step of every contestant in every repetition; one lap before does not count."""
    seconds: Seconds = {name: [] for name in contestants}
    for lap in range(repeats + 1):
        runs = [contestant(course).go for contestant in contestants.values()]
        gc.collect()
        for name, taken in zip(contestants, Relay(runs, leg=leg).race(), strict=True):
            if lap:
                seconds[name].append(taken)
    return seconds


def summarize(seconds: Seconds) -> list[dict[str, Any]]:
    """Medians of paired ratios: time over the hand-written loop's, speed over Avalanche's."""
    reference = next(iter(seconds.values()))
    peer = next((seconds[name] for name in PEERS if name in seconds), None)
    rows = []
    for name, own in seconds.items():
        speeds = [] if peer is None else [b / a for a, b in zip(own, peer, strict=True)]
        row = {
            "loop": name,
            "steps_per_second": 1 / statistics.median(own),
            "microseconds_over_by_hand": statistics.median(
                1e6 * (a - b) for a, b in zip(own, reference, strict=True)
            ),
            "time_over_by_hand": _spread([a / b for a, b in zip(own, reference, strict=True)]),
            "speed_over_avalanche": _spread(speeds) if speeds else None,
        }
        rows.append(row)
    return rows


def _spread(ratios: list[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| loop | steps/s | µs over by hand | time / by hand (min-max) | speed / Avalanche (min-max) |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratios = [
            "-" if r is None else f"{r['median']:.2f} ({r['min']:.2f}-{r['max']:.2f})"
            for r in (row["time_over_by_hand"], row["speed_over_avalanche"])
        ]
        rate = row["steps_per_second"]
        numbers = [f"{rate:.0f}" if rate >= 100 else f"{rate:.2f}", f"{row['microseconds_over_by_hand']:.0f}"]
        lines.append(f"| {' | '.join([row['loop'], *numbers, *ratios])} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=sorted(SETTINGS), default="mlp")
    parser.add_argument("--steps", type=int, help="steps of an epoch; two epochs are trained")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="three repetitions")
    parser.add_argument("--only", default="", help="only by hand and loops with one of these texts in their names")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    warnings.showwarning = lambda *_, **__: None  # Avalanche warns of its own deprecations, filters or not
    torch.set_num_threads(1)
    setting = SETTINGS[options.model]
    setting = replace(setting, steps=options.steps or setting.steps)
    leg = max(1, min(20, setting.steps // 2))
    repeats = 3 if options.quick else options.repeats
    print(f"{options.model}, batch {setting.batch}, {setting.steps * EPOCHS} steps, {repeats} repetitions")
    result: dict[str, Any] = {
        "model": options.model,
        "batch": setting.batch,
        "steps": setting.steps * EPOCHS,
        "repeats": repeats,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": 1,
    }
    for family, contestants, experiences in (("plain", PLAIN, 1), ("replay", REPLAY, 2)):
        first = next(iter(contestants))
        texts = options.only.split(",")
        chosen = {n: c for n, c in contestants.items() if n == first or any(text in n for text in texts)}
        if len(chosen) == 1:
            continue
        warm_up = replace(setting, steps=min(setting.steps, 20))
        same = check(chosen, Course(warm_up, experiences=experiences, shuffle=False))
        print(f"\n{family}: {same}\n", flush=True)
        course = Course(setting, experiences=experiences, shuffle=True)
        result[family] = summarize(race(chosen, course, repeats=repeats, leg=leg))
        print(table(result[family]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
