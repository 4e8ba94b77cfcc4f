"""What executors of experts cost beside their products: the numbers of ``clframe.moe.Plan``, measured here.

    python perf/expert_costs.py              # some minutes, on one thread
    python perf/expert_costs.py --quick

Each executor runs experts of several sizes under random routing, and the time it takes is fitted by least squares of
relative errors, with no coefficient below zero:

    dense     a + b (read_all + tokens) F W
    others    a + start active + b (read active H W + pairs (H + pair) W)

for F hidden neurons in experts of H, W = inputs + outputs, ``active`` experts that any token keeps and (token, expert)
``pairs``. Printed are MACs a second (1 / b), and all else in the units of the plan; ``call`` is ``a`` beyond dense's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn

from clframe.moe import to_experts
from clframe.moe.dispatch import EXECUTORS, Name
from clframe.moe.executors import grouped_mm_works

SHAPES = ((768, 3072, (24, 96, 512)), (384, 1536, (24, 96)), (192, 768, (24,)), (64, 256, (4, 16)))
TOKENS = (2, 4, 16, 64, 197, 1576)
FRACTIONS = (0.125, 0.25, 0.5)
NAMES: tuple[Name, ...] = ("dense", "grouped", "grouped_mm")

Row = dict[str, Any]


@torch.no_grad()
def measured(*, repeats: int) -> Iterator[Row]:
    """Seconds of every executor that works, by shape."""
    for width, hidden, splits in SHAPES:
        for experts in splits:
            model = nn.Sequential(nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)))
            (layer,) = to_experts(model.eval(), experts=experts, split="random").values()
            weights = layer.experts.weights()
            for tokens in TOKENS:
                if tokens * width * hidden > 5e8 and width < 768:  # as slow as the widest, and nothing new
                    continue
                for fraction in FRACTIONS:
                    count = max(1, round(fraction * experts))
                    cases = [(torch.randn(tokens, width), _keep(tokens, experts, count)) for _ in range(4)]
                    works = grouped_mm_works(weights, cases[0][0])
                    row: Row = {"W": 2 * width, "F": hidden, "H": hidden // experts, "tokens": tokens}
                    row |= {"pairs": tokens * count, "active": int(cases[0][1].any(0).sum())}
                    taken: dict[Name, list[float]] = {name: [] for name in NAMES if works or name != "grouped_mm"}
                    for lap in range(repeats + 2):
                        x, keep = cases[lap % 4]
                        for name in list(taken) if lap % 2 else reversed(taken):
                            start = process_time()
                            EXECUTORS[name](weights, x, keep, None)
                            if lap > 1:
                                taken[name].append(process_time() - start)
                    yield row | {name: median(times) for name, times in taken.items()}


def _keep(tokens: int, experts: int, count: int) -> Tensor:
    best = torch.rand(tokens, experts).topk(count, 1).indices
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, best, True)


def features(name: str, row: Row) -> list[float]:
    """What the time of an executor is a sum of."""
    if name == "dense":
        return [1.0, row["F"] * row["W"], row["tokens"] * row["F"] * row["W"]]
    neuron = row["H"] * row["W"]
    return [1.0, row["active"] * neuron, row["pairs"] * neuron, row["active"], row["pairs"] * row["W"]]


def fitted(name: str, rows: list[Row]) -> tuple[Tensor, float]:
    """Coefficients, none below zero, and the median relative error."""
    rows = [row for row in rows if name in row]
    design = torch.tensor([[value / row[name] for value in features(name, row)] for row in rows], dtype=torch.float64)
    kept = list(range(design.shape[1]))
    while True:
        own = torch.linalg.lstsq(design[:, kept], torch.ones(len(rows), 1, dtype=torch.float64)).solution[:, 0]
        if bool((own >= 0).all()):
            break
        kept = [place for place, value in zip(kept, own.tolist(), strict=True) if value >= 0]
    found = torch.zeros(design.shape[1], dtype=torch.float64)
    found[kept] = own
    return found, float((design @ found - 1).abs().median())


def main() -> None:
    """Measure, fit, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few repetitions only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = list(measured(repeats=4 if options.quick else 16))
    base = 0.0
    for name in NAMES:
        if not any(name in row for row in rows):
            continue
        found, error = fitted(name, rows)
        one = float(found[2])
        call, read, _, *rest = (float(value) / one for value in found)
        base = call if name == "dense" else base
        line = f"{name}: {1e-9 / one:.0f}e9 MACs a second, read {read:.1f} tokens"
        if rest:
            line += f", call {call - base:.2g}, start {rest[0]:.2g} MACs, pair {rest[1]:.0f} neurons"
        print(f"{line}; median error {error:.0%} of {len(rows)} cases")


if __name__ == "__main__":
    main()
