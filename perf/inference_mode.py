"""Does torch.inference_mode shorten evaluation compared with torch.no_grad?

    python perf/inference_mode.py                      # one thread of the CPU
    python perf/inference_mode.py --device cuda        # with a wait after every forward pass

Forward passes of networks under both, in turn; the smallest times of many, which other work disturbs least. A batch of
one sample has hardly anything but the overhead per operation, which is all that inference mode can save: what it saves
there is an upper bound for larger batches.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import clframe
from clframe.build import build

ROUNDS = 8
CASES = (
    ("mlp", ["backbone=mlp"]),
    ("small_cnn", ["backbone=small_cnn"]),
    ("resnet20 with exits", ["backbone=resnet20", "strategy=exits"]),
)


def smallest(overrides: list[str], batch: int, *, device: str, passes: int) -> list[float]:
    """Microseconds of a forward pass without gradients, and in inference mode."""
    network = build(clframe.load_config("quickstart", overrides)).network
    network.grow(range(10))
    network.to(device).eval()
    x = torch.randn(batch, 1, 8, 8, device=device)
    found = [float("inf"), float("inf")]
    for _ in range(ROUNDS):
        for i, mode in enumerate((torch.no_grad, torch.inference_mode)):
            with mode():
                for _ in range(passes):
                    start = time.perf_counter()
                    network(x)
                    if device == "cuda":
                        torch.cuda.synchronize()
                    found[i] = min(found[i], time.perf_counter() - start)
    return [1e6 * seconds for seconds in found]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--passes", type=int, default=20, help="forward passes of each kind in each of 8 rounds")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| network | batch | no_grad, us | inference mode, us | ratio |\n|---|---:|---:|---:|---:|")
    for name, overrides in CASES:
        for batch in options.batches:
            before, after = smallest(overrides, batch, device=options.device, passes=options.passes)
            print(f"| {name} | {batch} | {before:.0f} | {after:.0f} | {after / before:.3f} |", flush=True)
            rows.append({"network": name, "batch": batch, "no_grad_us": before, "inference_us": after})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
