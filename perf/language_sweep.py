"""Time of a pass of a sparsity sweep over texts of a language model, against a pass with the head at every position.

    python perf/language_sweep.py                                        # 40 texts of 8 to 64 random tokens
    python perf/language_sweep.py --texts 100 --vocabulary 50000 --json sweep.json

A random Llama of 4 layers. Both ways alternate in one process; shown is the median of the ratio ``selected / whole`` and the least and largest
one. whole: logits of all positions of one batch, then the score of those with a target. selected: as ``clframe analyze sparsity``, with
logits of scored positions only, and batches of 16 texts of similar length.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from clframe.data.target import IGNORED
from clframe.sparsity.scores import token_values
from clframe.targets.language import CausalRows, Reading, causal_target


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    target = make_target(options)
    whole, selected = target.batches("test", size=options.texts), target.batches("test", size=16)
    found: dict[str, Any] = {}
    for score in ("accuracy", "perplexity"):
        run(target, score, whole, select=False), run(target, score, selected, select=True)
        pairs = [(run(target, score, whole, select=False), run(target, score, selected, select=True))
                 for _ in range(options.pairs)]  # fmt: skip
        assert all(abs(one[1] - other[1]) < 1e-3 for one, other in pairs)
        ratios = sorted(other[0] / one[0] for one, other in pairs)
        found[score] = {"whole_s": median(one[0] for one, _ in pairs), "ratio": median(ratios),
                        "least": ratios[0], "largest": ratios[-1]}  # fmt: skip
        print(f"{score:10}  selected / whole {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def make_target(options: argparse.Namespace) -> Any:
    """A random Llama and random texts, the same in every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    draw = random.Random(0)
    device = torch.device(options.device)
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.width, intermediate_size=options.width * 11 // 4,
        num_hidden_layers=4, num_attention_heads=4, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False).to(device)
    rows = [[draw.randrange(3, options.vocabulary) for _ in range(draw.randint(8, 64))] for _ in range(options.texts)]
    return causal_target(
        "llama", model, CausalRows({"fit": rows, "test": rows}), reading=Reading(window=64), padding=0, device=device,
        config=None,
    )  # fmt: skip


@torch.no_grad()
def run(target: Any, score: Any, batches: Any, *, select: bool) -> tuple[float, float]:
    """Seconds of a pass, and the mean of its values."""
    start = time.perf_counter()
    values = []
    for inputs, targets, _ in batches:
        valid = targets != IGNORED
        if select:
            logits_NV = target.logits_at(target.model, inputs, valid)
        else:
            logits_NV = target.predict(target.model, inputs)[valid]
        values.append(token_values(score, logits_NV, targets[valid]))
    mean = float(torch.cat(values).double().mean())  # waits for a GPU
    return time.perf_counter() - start, mean


if __name__ == "__main__":
    main()
