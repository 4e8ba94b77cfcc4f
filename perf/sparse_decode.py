"""Decoding that skips inactive neurons against the dense model, one token at a time: FFN alone, and generation.

    python perf/sparse_decode.py --threads 1 2 --json sparse_decode.json                  # CPU, float32
    python perf/sparse_decode.py --device cuda --types float32 bfloat16 --parts ffn step generate --seconds 200 --json FILE
    python perf/sparse_decode.py --device cuda --types bfloat16 --parts sweep --seconds 60 --json FILE

Sizes: ``30m``, a decoder of width 512 with 8 blocks (SwiGLU of 1,368 neurons, 29 million weights with its vocabulary of 8,192),
``30m-relu``, the same with a plain ReLU FFN of 2,048 neurons, ``1b``, SwiGLU 2048 -> 8192 (16 blocks, 1.1 billion weights;
``--depth`` for fewer), and ``1b-relu`` with ReLU. Weights are random, thresholds are the quantiles that give the sparsity asked for. Parts:

- ffn: the FFNs of all blocks (at least as many as exceed the caches), each on its own random token; time of one FFN;
- generate: tokens per second of ``clframe.nn.generation.generate`` after a prompt of 8 tokens, all of the model included; on CUDA
  with recorded passes, ``plain_tokens_s`` the dense model without them;
- step (CUDA): one decoding step of the whole model after 256 tokens as a CUDA graph, without the time of launching;
- sweep (CUDA): tiles of the kernels.

Dense and sparse take turns; medians of times, and the median of the ratios of pairs. ``ceiling`` is the ratio of bytes of
weights. With one thread on a CPU, times are CPU times. On CUDA, FFNs are CUDA graphs too. ``path`` is the function
that computed the sparse FFN, ``error`` its largest difference from the masked dense product.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from clframe.moe.tuning import time_graph
from clframe.nn.backbones.decoder import GatedFFN, PlainFFN, decoder
from clframe.nn.backbones.key_value_cache import KeyValueCache
from clframe.nn.generation import generate
from clframe.nn.kernels import relative_error
from clframe.nn.network import Network
from clframe.sparse_decode import calibrate, read_share, sparse_decoder, sparse_layers
from clframe.sparse_decode.cost import count_bytes
from clframe.sparse_decode.launch import Tile, run
from clframe.sparse_decode.projection import compute_masked

SIZES: Mapping[str, Mapping[str, Any]] = {
    "30m": {"width": 512, "depth": 8, "heads": 8, "vocabulary": 8192},
    "30m-relu": {"width": 512, "depth": 8, "heads": 8, "vocabulary": 8192, "ffn": "relu"},
    "1b": {"width": 2048, "depth": 16, "heads": 32, "vocabulary": 32768, "hidden": 8192},
    "1b-relu": {"width": 2048, "depth": 16, "heads": 32, "vocabulary": 32768, "hidden": 8192, "ffn": "relu"},
}
CONTEXT, PAST = 512, 256
PLACES: Mapping[str, tuple[Any, ...]] = {
    "intermediate": ("intermediate",), "input": ("input",), "gate": ("gate",), "all": ("input", "intermediate"),
}  # fmt: skip


class Rows:
    """Rows that are printed and written as they come, until the time is over."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.rows = options, list[dict[str, Any]]()
        self.end: float = time.perf_counter() + options.seconds

    @property
    def over(self) -> bool:
        """Whether no further measurement begins."""
        return time.perf_counter() > self.end

    def add(self, **row: Any) -> None:
        """Print and write a row."""
        self.rows.append(row)
        print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()),
              flush=True)  # fmt: skip
        if self.options.json:
            device = torch.cuda.get_device_name() if self.options.device == "cuda" else "cpu"
            content = {"options": vars(self.options), "torch": torch.__version__, "device": device, "rows": self.rows}
            Path(self.options.json).write_text(json.dumps(content, indent=1), encoding="utf-8")


def time_cpu(call: Callable[[], object]) -> float:
    """Milliseconds of one call: of the CPU with one thread, so that other processes do not count, else elapsed."""
    clock = time.process_time if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter
    start = clock()
    call()
    return 1e3 * (clock() - start)


def compare(dense: Callable[[], object], sparse: Callable[[], object], *, cuda: bool, rounds: int) -> dict[str, float]:
    """Medians of both in ms, and of the ratio of pairs."""
    clock: Callable[[Callable[[], object]], float] = time_graph if cuda else time_cpu
    if not cuda:
        dense(), sparse()
    pairs = [(clock(dense), clock(sparse)) for _ in range(3 if cuda else rounds)]
    return {"dense_ms": median(a for a, _ in pairs), "sparse_ms": median(b for _, b in pairs),
            "speedup": median(a / b for a, b in pairs)}  # fmt: skip


def random_ffns(size: str, dtype: torch.dtype, device: str) -> tuple[list[nn.Module], list[Tensor]]:
    """FFNs of a size, and a token for each."""
    form = SIZES[size]
    width, relu = form["width"], form.get("ffn") == "relu"
    hidden = form.get("hidden") or (4 * width if relu else -(-8 * width // 24) * 8)
    count = form["depth"] if width < 2048 else 2 if device == "cpu" else 4
    with torch.device(device):
        made = [PlainFFN(width, hidden, nn.ReLU()) if relu else GatedFFN(width, hidden) for _ in range(count)]
        tokens = [torch.randn(1, 1, width, dtype=dtype) for _ in range(count)]
    return [ffn.to(dtype).eval() for ffn in made], tokens


def sparse_ffns(
    ffns: Sequence[nn.Module], tokens: Sequence[Tensor], places: Sequence[Any], sparsity: float
) -> list[nn.Module]:
    """Sparse copies whose thresholds give each token this sparsity."""
    found = []
    for ffn, token in zip(ffns, tokens, strict=True):
        model = nn.Sequential(ffn)
        (rules,) = calibrate(model, [(token, None, None)], sparsities=[sparsity], places=places)
        found.append(sparse_decoder(model, rules))
    return found


def race_ffns(rows: Rows, size: str, dtype: torch.dtype, threads: int) -> None:
    """Times of one FFN."""
    options, cuda = rows.options, rows.options.device == "cuda"
    ffns, tokens = random_ffns(size, dtype, options.device)
    places = [name for name in options.places if name != "gate" or isinstance(ffns[0], GatedFFN)]
    cases = [(name, share) for share in options.sparsities for name in places]
    for name, share in [("intermediate", 0.0), *cases]:
        if rows.over:
            return
        sparse = sparse_ffns(ffns, tokens, PLACES[name], share)
        layers = [next(iter(sparse_layers(one).values())) for one in sparse]
        errors = [
            relative_error(one(x)[0], compute_masked(one.parts(), x[0])) for one, x in zip(layers, tokens, strict=True)
        ]

        def call(models: Sequence[nn.Module]) -> Callable[[], object]:
            return lambda: [model(x) for model, x in zip(models, tokens, strict=True)]

        found = compare(call(ffns), call(sparse), cuda=cuda, rounds=options.rounds)
        share_read = read_share(dict.fromkeys(PLACES[name], share), gated=isinstance(ffns[0], GatedFFN))
        gigabytes = sum(p.nbytes for ffn in ffns for p in ffn.parameters()) / 1e9
        rows.add(part="ffn", size=size, type=str(dtype)[6:], threads=threads, place=name, sparsity=share,
                 dense_us=1e3 * found["dense_ms"] / len(ffns), sparse_us=1e3 * found["sparse_ms"] / len(ffns),
                 speedup=found["speedup"], ceiling=1 / share_read, dense_gb_s=1e3 * gigabytes / found["dense_ms"],
                 path=layers[0].choose(layers[0].parts(), tokens[0][0]).__name__, error=max(errors))  # fmt: skip


def make_network(options: argparse.Namespace, size: str, dtype: torch.dtype) -> Network:
    """A random decoder."""
    form = dict(SIZES[size])
    if form["width"] == 2048 and options.depth:
        form["depth"] = options.depth
    with torch.device(options.device):
        network = Network(decoder((CONTEXT + 1,), **form))
    return network.to(options.device, dtype).eval()


def step_of(network: Network, caches: Sequence[KeyValueCache], token: Tensor) -> Callable[[], Tensor]:
    """The choice of the next token after one more token, with the keys and values of ``PAST`` earlier ones."""
    embed, *blocks = list[Any](network.backbone.stages)
    stages: list[list[Any]] = [list(stage) if isinstance(stage, nn.Sequential) else [stage] for stage in blocks]
    position_1 = torch.tensor([PAST], device=token.device)

    def step() -> Tensor:
        x_1TD = embed.table(token)
        for (block, *rest), cache in zip(stages, caches, strict=True):
            x_1TD = block.extend(x_1TD, cache, position_1, PAST + 1)
            for part in rest:
                x_1TD = part(x_1TD)
        return network.classify(0, x_1TD, None).argmax(-1)

    return step


def race_models(rows: Rows, part: str, size: str, dtype: torch.dtype, threads: int) -> None:
    """Tokens per second of the whole model."""
    options, cuda = rows.options, rows.options.device == "cuda"
    network = make_network(options, size, dtype)
    form, bytes_read = SIZES[size], count_bytes(network)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, form["vocabulary"], (4, 65), generator=generator).to(options.device)
    depth, heads, width = len(network.backbone.stages) - 1, form["heads"], form["width"] // form["heads"]
    caches = [KeyValueCache(PAST + 1) for _ in range(depth)]
    for cache in caches:
        past = torch.randn(1, heads, PAST, width, device=options.device, dtype=dtype)
        cache.write(past, past, torch.arange(PAST, device=options.device))
    gated = form.get("ffn") != "relu"
    for share, name in product(options.sparsities, options.places):
        if rows.over or (name == "gate" and not gated):
            continue
        (rules,) = calibrate(network, [(ids, None, None)], sparsities=[share], places=PLACES[name])
        sparse, plain = sparse_decoder(network, rules), dict[str, float]()
        assert isinstance(sparse, Network)
        if part == "step":
            calls = [step_of(model, caches, ids[:1, :1]) for model in (network, sparse)]
            found, tokens = compare(*calls, cuda=cuda, rounds=options.rounds), 1
        else:
            tokens = options.tokens

            # Reads each token on the host, so that elapsed time is the time of the device.
            whole, less = (partial(generate, model, ids[0, :8].tolist(), tokens) for model in (network, sparse))
            found = compare(whole, less, cuda=False, rounds=options.rounds)
            if cuda:
                alone = compare(whole, partial(whole, graphs=False), cuda=False, rounds=options.rounds)
                plain = {"plain_tokens_s": 1e3 * tokens / alone["sparse_ms"], "graphs_speedup": 1 / alone["speedup"]}
        rows.add(part=part, size=size, depth=depth, type=str(dtype)[6:], threads=threads, place=name, sparsity=share,
                 dense_tokens_s=1e3 * tokens / found["dense_ms"], sparse_tokens_s=1e3 * tokens / found["sparse_ms"],
                 speedup=found["speedup"], ceiling=bytes_read.ceiling(dict.fromkeys(PLACES[name], share)),
                 ffn_share=bytes_read.ffn / bytes_read.model,
                 dense_gb_s=bytes_read.model * tokens / found["dense_ms"] / 1e6, **plain)  # fmt: skip


def sweep_tiles(rows: Rows, size: str, dtype: torch.dtype) -> None:
    """Times of the kernels by tile: products by output (dense part of ``intermediate``), then by input."""
    ffns, tokens = random_ffns(size, dtype, rows.options.device)
    outputs = [
        Tile(r, c, w) for r, c, w in product((4, 8, 16), (256, 512, 1024), (2, 4, 8)) if 32 <= r * c // (32 * w) <= 128
    ]
    inputs = [
        Tile(r, c, w, p)
        for r, c, w, p in product((16, 32, 64), (64, 128, 256), (4, 8), (528, 1056))
        if 16 <= r * c // (32 * w) <= 64
    ]
    cases = [("by_output", one, 0.9) for one in outputs]
    cases += [("by_input", one, share) for one in inputs for share in (0.5, 0.9)]
    for which, tile, share in cases:
        if rows.over:
            return
        sparse = sparse_ffns(ffns, tokens, ("input",) if which == "by_input" else ("intermediate",), share)
        parts = [next(iter(sparse_layers(one).values())).parts() for one in sparse]

        def call(which: str = which, tile: Tile = tile, parts: Any = parts) -> object:
            return [run(part, x[0], **{which: tile}) for part, x in zip(parts, tokens, strict=True)]

        rows.add(part="sweep", size=size, type=str(dtype)[6:], which=which, tile=str(tuple(tile)), sparsity=share,
                 us=1e3 * time_graph(call) / len(parts))  # fmt: skip


@torch.no_grad()
def main() -> None:
    """Run all parts, sizes, types and numbers of threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["ffn", "generate", "step", "sweep"], default=["ffn", "generate"])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--places", nargs="+", choices=list(PLACES), default=list(PLACES))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.25, 0.5, 0.75, 0.9])
    parser.add_argument("--types", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--depth", type=int, help="blocks of the sizes 1b and 1b-relu")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = Rows(options)
    for threads, dtype, size, part in product(options.threads, options.types, options.sizes, options.parts):
        if rows.over:
            break
        torch.set_num_threads(threads)
        kind = getattr(torch, dtype)
        if part == "ffn":
            race_ffns(rows, size, kind, threads)
        elif part == "sweep":
            sweep_tiles(rows, size, kind)
        else:
            race_models(rows, part, size, kind, threads)


if __name__ == "__main__":
    main()
