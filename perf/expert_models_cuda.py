"""Whole models with experts on a GPU: time per image or token next to the MACs.

    python perf/expert_models_cuda.py                         # ViT-B/16 and a gated decoder of 12 layers, bfloat16
    python perf/expert_models_cuda.py --seconds 60 --json models.json

Weights are random, which times do not depend on. Every FFN is converted to 24 experts with a norm router; tau of each layer
is the one at which router and chosen experts cost the share of the FFN's MACs asked for. Dense model, the same compiled by
``torch.compile``, and experts are captured as CUDA graphs and timed by turns; medians. MACs promise the ratio of the dense
model's multiply-adds to those of the converted one, attention included. "Experts" run what is chosen for the share of
experts counted before, "tuned" what ``clframe.moe.tuning.tune`` has measured to be fastest for each layer, "bypass" the
same where a layer may be the dense network.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from expert_race_cuda import race, tau_for
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from clframe.moe import DynamicK, count_usage, layer_inputs, routed_layers, to_experts
from clframe.moe.tuning import tune
from clframe.nn.backbones.decoder import decoder

COSTS = (0.25, 0.5)
"""Share of the FFN's MACs, router included."""
EXPERTS = 24


def vision_transformer(batch: int) -> tuple[nn.Module, Tensor, int]:
    """ViT-B/16, images, and the number of images."""
    from torchvision.models import vit_b_16

    return vit_b_16(), torch.randn(batch, 3, 224, 224), batch


def gated_decoder(batch: int, context: int = 1024) -> tuple[nn.Module, Tensor, int]:
    """Decoder of width 768 with gated FFNs of 3,072 neurons and without classifier, ids, and the number of tokens."""
    model = decoder((context + 1,), vocabulary=8192, width=768, depth=12, heads=12, hidden=3072)
    return model, torch.randint(8192, (batch, context + 1)), batch * context


MODELS: dict[str, tuple[Callable[[int], tuple[nn.Module, Tensor, int]], tuple[int, ...]]] = {
    "ViT-B/16": (vision_transformer, (64, 256, 1)),
    "decoder": (gated_decoder, (12, 1)),
}


def set_costs(model: nn.Module, x: Tensor, cost: float) -> float:
    """Set tau of every layer to the given share of its cost; returns the share that was reached."""
    inputs = layer_inputs(model, x)
    shares = []
    for name, layer in routed_layers(model).items():
        macs = layer.macs()
        layer.gate = DynamicK(tau=tau_for(layer, inputs[name], max(cost - macs.router_share, 1 / macs.experts)))
        shares.append(float(layer.keep(inputs[name]).float().mean()) + macs.router_share)
    return sum(shares) / len(shares)


@torch.no_grad()
def rows_of(name: str, *, batch: int, repeats: int, device: str, compiled: bool) -> Iterator[dict[str, Any]]:
    """Times of one model and batch size, at each cost."""
    torch.manual_seed(0)
    make, _ = MODELS[name]
    dense, x, items = make(batch)
    dense, x = dense.to(device, torch.bfloat16).eval(), x.to(device)
    x = x.bfloat16() if x.is_floating_point() else x
    experts = copy.deepcopy(dense)
    layers = to_experts(experts, experts=EXPERTS, split="random")
    with FlopCounterMode(display=False) as counter:
        dense(x)
    macs = counter.get_total_flops() / 2
    tokens = sum(len(seen) for seen in layer_inputs(experts, x).values())
    ffn = next(iter(layers.values())).macs().dense * tokens
    runs: dict[str, Callable[[], Any]] = {"dense": partial(dense, x)}
    if compiled:
        torch._dynamo.reset()
        runs["compiled"] = partial(torch.compile(dense, dynamic=False), x)
    for cost in COSTS:
        reached = set_costs(experts, x, cost)
        with count_usage(experts) as usage:  # as a calibration does: the choice expects this share
            experts(x)
            usage()
        calls: dict[str, Callable[[], Any]] = {**runs, "experts": partial(experts, x)}
        chosen: dict[str, Counter[str]] = {}
        for bypass in (False, True):  # a graph records the choice of its time
            model = copy.deepcopy(experts)
            times = tune(model, x, bypass=bypass)
            calls["bypass" if bypass else "tuned"] = partial(model, x)
            chosen["bypass" if bypass else "tuned"] = Counter(layer.chosen for layer in times.values())
        yield {
            "model": name, "batch": batch, "items": items, "cost": reached, "ffn_share": ffn / macs,
            "promised": macs / (macs - ffn * (1 - reached)), "ms": race(calls, repeats=repeats), "chosen": chosen,
        }  # fmt: skip
        del calls, model


def line(row: dict[str, Any]) -> str:
    """A line of the table."""
    ms = row["ms"]
    compiled = f"{1e3 * ms['compiled'] / row['items']:.3f}" if "compiled" in ms else "-"
    return (
        f"| {row['model']} | {row['batch']} | {row['cost']:.0%} | {row['ffn_share']:.0%} | {1e3 * ms['dense'] / row['items']:.3f} "
        f"| {compiled} | {1e3 * ms['experts'] / row['items']:.3f} | {ms['dense'] / ms['experts']:.2f} "
        f"| {ms['dense'] / ms['tuned']:.2f} | {ms['dense'] / ms['bypass']:.2f} | {row['promised']:.2f} "
        f"| {'; '.join(', '.join(f'{n} {name}' for name, n in found.items()) for found in row['chosen'].values())} |"
    )


HEAD = (
    "| model | batch | cost of FFNs | FFNs, of all MACs | dense, µs an item | compiled | experts | speed-up | tuned | bypass "
    "| MACs | layers tuned; bypass |"
)


def main() -> None:
    """Print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", type=int, nargs="*", help="only these")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile of the dense model")
    parser.add_argument("--seconds", type=float, default=600, help="start nothing new after this time")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options, start = parser.parse_args(), monotonic()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n{HEAD}\n|{'---|' * 12}", flush=True)
    rows = []
    for place in range(3):
        for name in options.model:
            batches = MODELS[name][1]
            if place >= len(batches) or (options.batch and batches[place] not in options.batch):
                continue
            if monotonic() - start > options.seconds:
                continue
            compiled = not options.no_compile and place == 0
            for row in rows_of(name, batch=batches[place], repeats=options.repeats, device="cuda", compiled=compiled):
                rows.append(row)
                print(line(row), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
