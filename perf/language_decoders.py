"""Decoders of five sizes trained on mixed text, for the measurements in language_sizes.py and language_conversion.py.

Weights of a size differ between the feed-forward networks by a few percent: SwiGLU has three layers of 8/3 of the width,
ReLU two of 4 times the width. The embedding of 4,096 ids, which is the classifier as well, counts.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import clframe
from clframe.data.samples import TensorSamples
from clframe.data.source import SOURCES, Source
from clframe.metrics.statistics import deviation, mean
from clframe.nn.backbones import BACKBONES
from clframe.nn.network import Network
from clframe.results import Result

DOMAINS = ("literature", "c_code", "python_code", "proposals")


@dataclass(frozen=True)
class Size:
    """Shape and learning rate of a decoder."""

    width: int
    depth: int
    heads: int
    lr: float
    gated: int | None = None
    """Hidden neurons with SwiGLU; None is 8/3 of the width."""


SIZES = {
    "tiny": Size(32, 2, 2, 0.003),
    "1M": Size(128, 4, 4, 0.003),
    "4M": Size(256, 4, 4, 0.002),
    "12M": Size(384, 6, 6, 0.0015),
    "30M": Size(512, 9, 8, 0.001, gated=1344),  # 21 experts of 64 neurons
    "100M": Size(768, 14, 12, 0.0006),
}
FFNS = ("swiglu", "relu")
SHARD = 15 * 2**20
"""Most bytes of a file of weights."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of data and training."""
    parser.add_argument("data", help="folder with NAME_train.txt and NAME_test.txt (or .txt.xz) of each domain")
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS))
    parser.add_argument("--cache", default="", help="folder for the tokenizer and the ids, which later starts read")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--characters", type=int, default=0, help="of each training text; 0 is all")
    parser.add_argument("--test-characters", type=int, default=0, help="of each test text; 0 is all")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2, help="the learning rate of the last one is a quarter")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", help="default: bf16-mixed on cuda, 32-true on cpu")
    parser.add_argument("--seconds", type=float, default=330, help="no training begins that would end later")
    parser.add_argument("--json", required=True)


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the options, and refuse a device that is not there."""
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: found cuda, but PyTorch sees no CUDA device; use cpu")
    if options.precision is None:
        options.precision = "bf16-mixed" if options.device == "cuda" else "32-true"
    return options


def text(options: argparse.Namespace) -> Source:
    """The windows of all domains."""
    return SOURCES.get("language_model")(
        path=options.data, domains=tuple(options.domains), vocabulary=options.vocabulary, context=options.context,
        characters=options.characters, test_characters=options.test_characters, cache=options.cache,
    )  # fmt: skip


def backbone_options(options: argparse.Namespace, name: str, ffn: str) -> dict[str, Any]:
    """Options of the backbone decoder."""
    size = SIZES[name]
    shape = {"vocabulary": options.vocabulary, "width": size.width, "depth": size.depth, "heads": size.heads, "ffn": ffn}
    return {**shape, "hidden": size.gated} if ffn == "swiglu" and size.gated else shape


def overrides(options: argparse.Namespace, name: str, ffn: str, seed: int) -> list[str]:
    """Overrides of the experiment language_model: all domains in one experience."""
    found = [
        f"benchmark.path={options.data}", f"benchmark.domains=[{','.join(options.domains)}]", "benchmark.experiences=1",
        f"benchmark.vocabulary={options.vocabulary}", f"benchmark.context={options.context}",
        f"benchmark.characters={options.characters}", f"benchmark.test_characters={options.test_characters}",
        f"benchmark.cache={options.cache}",
        f"optimizer.lr={SIZES[name].lr}", f"trainer.batch_size={options.batch}",
        f"trainer.epochs={options.epochs}", f"trainer.accelerator={options.device}",
        f"trainer.precision={options.precision}", "trainer.figures=none", "trainer.loggers=[csv]", f"seed={seed}",
    ]  # fmt: skip
    if options.epochs > 1:
        found += ["optimizer.schedule=multistep", f"optimizer.milestones=[{options.epochs - 1}]", "optimizer.gamma=0.25"]
    return found + [f"backbone.{key}={value}" for key, value in backbone_options(options, name, ffn).items()]


def train(options: argparse.Namespace, name: str, ffn: str, seed: int, folder: Path) -> tuple[Network, Result]:
    """Train one decoder; its run folder is deleted."""
    result = clframe.run("language_model", overrides(options, name, ffn, seed), output=folder)
    network = clframe.load(result.run_folder, device=options.device).network
    shutil.rmtree(result.run_folder)
    return network, result


def save_weights(network: Network, folder: Path, label: str, facts: dict[str, Any]) -> None:
    """Write ``LABEL.json`` and the weights in half precision in files ``LABEL-00.safetensors`` of at most 15 MB."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for key, weight in network.named_parameters():  # a tied weight comes once
        half = weight.detach().to("cpu", torch.float16).contiguous()
        if used and used + half.nbytes > SHARD:
            shards.append({})
            used = 0
        shards[-1][key] = half
        used += half.nbytes
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"{label}-{number:02}.safetensors")
    (folder / f"{label}.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


def load_weights(options: argparse.Namespace, name: str, ffn: str, folder: Path, label: str) -> Network | None:
    """Read a decoder that :func:`save_weights` wrote; None if there is none, or one of other sizes."""
    from safetensors.torch import load_file

    files = sorted(folder.glob(f"{label}-*.safetensors"))
    if not files:
        return None
    make = BACKBONES.get("decoder")
    network = Network(make((options.context + 1,), **backbone_options(options, name, ffn)))
    state = {key: weight.float() for file in files for key, weight in load_file(file).items()}
    if {key: weight.shape for key, weight in network.named_parameters()} != {k: w.shape for k, w in state.items()}:
        print(f"{folder}: the weights of {label} have other sizes; training new ones", flush=True)
        return None
    with torch.no_grad():
        for key, weight in network.named_parameters():
            weight.copy_(state[key])
    return network.to(options.device).eval().requires_grad_(False)


def spread(source: Source, windows: int) -> tuple[Tensor, Tensor]:
    """ids_WS of evenly spaced test windows, as many of each domain, and their domains_W."""
    assert isinstance(source.test, TensorSamples)
    x, y = source.test.x, source.test.y
    each = max(1, windows // source.classes)
    index = []
    for domain in range(source.classes):
        own = (y == domain).nonzero()[:, 0]
        count = min(each, len(own))
        index.append(own[torch.arange(count) * len(own) // count])
    chosen = torch.cat(index)
    return x[chosen].long(), y[chosen]


def spread_of(values: Sequence[float], *, digits: int = 1) -> str:
    """Mean and, of several values, standard deviation."""
    shown = f"{mean(values):.{digits}f}"
    return shown if len(values) < 2 else f"{shown} ± {deviation(values):.{digits}f}"
