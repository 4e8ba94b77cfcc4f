"""A trained decoder converted to experts: perplexity by cost, and time per token, of D2DMoE and MoEfication.

    python perf/language_conversion.py TEXTS --cache CACHE --weights WEIGHTS --seconds 200 --json conversion.json   # one H200
    python perf/language_conversion.py --table conversion.json                                                     # tables of it

WEIGHTS is the folder that language_sizes.py wrote; without weights of ``--size`` in it, a decoder is trained first. The
decoder becomes a Llama of transformers (clframe export), then every variant is one conversion as by ``clframe moefy``:
fine-tuning with ReLU, with a sparsity penalty of some strength or none; split into experts; routers; a sweep of the
gate. Settings for 25, 50 and 75 % of the cost of the feed-forward networks, routers included, are chosen on half of the test
windows, and measured on the other half. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from language_decoders import SIZES, add_arguments, load_weights, parse, spread, text, train
from torch import Tensor, nn

from clframe.data.samples import TensorSamples
from clframe.data.target import Target
from clframe.moe.conversion.convert import Conversion, convert
from clframe.moe.conversion.options import Method, Options
from clframe.moe.conversion.study import Study, measure_conversion, record
from clframe.moe.conversion.sweep import gate_at, time_decoding, time_pair
from clframe.moe.routed import set_gate
from clframe.targets.export_transformers import write_llama
from clframe.targets.language import CausalRows, Reading, causal_target


def windows_of(options: argparse.Namespace) -> dict[str, Tensor]:
    """Token ids of ``fit``, ``validation`` and ``test``, one window of ``context`` ids a row."""
    source = text(options)
    assert isinstance(source.train, TensorSamples)
    x = source.train.x[:, : options.context]
    count = min(options.fit, len(x))
    held = spread(source, 2 * options.windows)[0][:, : options.context]
    return {"fit": x[torch.arange(count) * len(x) // count], "validation": held[::2], "test": held[1::2]}


def make_target(model: nn.Module, windows: Mapping[str, Tensor], options: argparse.Namespace) -> Target:
    """A copy of the language model with its texts."""
    rows = CausalRows({part: ids_WT.tolist() for part, ids_WT in windows.items()})
    return causal_target(
        "decoder", copy.deepcopy(model), rows, reading=Reading(window=options.context), padding=0,
        device=torch.device(options.device), config=None,
    )  # fmt: skip


def llama(options: argparse.Namespace, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The decoder with SwiGLU as a Llama, and where its weights are from."""
    from transformers import AutoModelForCausalLM

    network, facts = None, {}
    if options.weights:
        network = load_weights(options, options.size, "swiglu", Path(options.weights), f"{options.size}-swiglu")
    if network is None:
        network, result = train(options, options.size, "swiglu", options.seed, folder)
        facts = {"trained_seconds": result.train_seconds, "perplexity": result.perplexity_matrix[-1][0]}
    else:
        facts = json.loads((Path(options.weights) / f"{options.size}-swiglu.json").read_text(encoding="utf-8"))
    (folder / "llama").mkdir()
    write_llama(network.cpu(), folder / "llama")
    model = AutoModelForCausalLM.from_pretrained(folder / "llama").float().eval().requires_grad_(False)
    return model.to(options.device), facts


def variant_options(options: argparse.Namespace, method: Method, strength: float) -> Options:
    """Options of one conversion, as of ``clframe moefy``."""
    return Options(
        method=method, strength=strength, sparsify=options.sparsify, expert_size=options.expert_size,
        samples=options.router_windows, epochs=options.router_epochs, batch=options.convert_batch, seed=options.seed,
    )  # fmt: skip


def run_variant(
    model: nn.Module, windows: Mapping[str, Tensor], options: argparse.Namespace, method: Method, strength: float
) -> tuple[dict[str, Any], Study]:
    """Convert a copy of the model and sweep its gate."""
    start = time.perf_counter()
    converted = convert(make_target(model, windows, options), variant_options(options, method, strength))
    done = time.perf_counter() - start
    study = measure_conversion(converted, sizes=())
    content = record(study)
    for large in ("environment", "experts_per_token", "exits", "times"):
        content.pop(large, None)
    row = {"method": method, "strength": strength, "convert_seconds": done, **content}
    return {**row, "seconds": time.perf_counter() - start}, study


def time_variant(study: Study, options: argparse.Namespace, end: float) -> list[dict[str, Any]]:
    """Time per token of prefill and decode next to the dense model, for each budget, device and type."""
    converted = study.converted
    settings = {point.budget: study.swept.values[point.at] for point in study.points if point.scope == "ffn" and point.at is not None}
    places: list[tuple[str, torch.dtype, int, tuple[int, ...]]]
    places = [("cpu", torch.float32, 1, (1,)), ("cpu", torch.float32, options.threads, (1,))]
    if options.device == "cuda":
        places = [("cuda", torch.float32, 1, (1, 32)), ("cuda", torch.bfloat16, 1, (1, 32)), *places]
    rows: list[dict[str, Any]] = []
    threads = torch.get_num_threads()
    for device, kind, count, sizes in dict.fromkeys(places):
        if time.perf_counter() >= end:
            break
        torch.set_num_threads(count)
        dense, model = (copy.deepcopy(one).to(device, kind) for one in (converted.dense, converted.target.model))
        for budget, setting in settings.items():
            set_gate(model, gate_at(converted.options.gate_kind, setting))
            for size in sizes:
                if time.perf_counter() < end:
                    rows += time_both(converted, dense, model, size=size, facts={"budget": budget, "setting": setting, "type": str(kind)[6:]})
    torch.set_num_threads(threads)
    return rows


def time_both(
    converted: Conversion, dense: nn.Module, model: nn.Module, *, size: int, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Time prefill of whole windows and decoding of one token of each."""
    device = next(model.parameters()).device
    given = converted.target.batches("test", size=size, limit=size)[0].inputs
    assert isinstance(given, Mapping)
    inputs = {name: value.to(device) for name, value in given.items()}
    batch, length = inputs["input_ids"].shape
    prefill = time_pair(dense, model, inputs, batch=batch, call=converted.exit_logits, pairs=10, least=3, seconds=1, phase="prefill")
    decode = time_decoding(dense, model, inputs, batch=batch, pairs=10)
    return [
        {**facts, **asdict(one), "tokens": tokens, "dense_us": 1e6 * one.dense / tokens, "converted_us": 1e6 * one.converted / tokens}
        for one, tokens in ((prefill, batch * length), (decode, batch))
    ]


def print_row(row: Mapping[str, Any]) -> None:
    """One line for each variant."""
    found = "  ".join(
        f"{100 * point['budget']:.0f} %: {'none' if point['test'] is None else format(point['test']['perplexity'], '.2f')}"
        for point in row["points"] if point["scope"] == "ffn"
    )  # fmt: skip
    tuned = row["perplexity"].get("sparsified")
    print(
        f"{row['method']:12} strength {row['strength']:<6g} perplexity {row['perplexity']['dense']:.2f}, fine-tuned "
        f"{'-' if tuned is None else format(tuned, '.2f')};  {found}  ({row['seconds']:.1f} s, of it converting {row['convert_seconds']:.1f})",
        flush=True,
    )  # fmt: skip


def print_time(row: Mapping[str, Any]) -> None:
    """One line for each timing."""
    print(
        f"  {row['device']:6} {row['type']:8} {row['threads']} threads, batch {row['batch']:2} {row['phase']:7} budget {row['budget']}: "
        f"dense {row['dense_us']:9.2f}, converted {row['converted_us']:9.2f} us a token, {row['speedup']:.2f} x, computed {row['computed']:.2f}",
        flush=True,
    )  # fmt: skip


def tables(file: str) -> None:
    """Print Markdown tables of a finished file."""
    content = json.loads(Path(file).read_text(encoding="utf-8"))
    print("| method | penalty | fine-tuned | 25 % | 50 % | 75 % |\n|---|---|---|---|---|---|")
    for row in content["rows"]:
        by_budget = {point["budget"]: point["test"] for point in row["points"] if point["scope"] == "ffn"}
        shown = [
            "none" if one is None else f"{one['perplexity']:.2f} ({100 * one['ffn_share']:.0f} %)"
            for one in (by_budget[budget] for budget in (0.25, 0.5, 0.75))
        ]
        tuned = row["perplexity"].get("sparsified", row["perplexity"]["dense"])
        print(f"| {row['method']} | {row['strength']:g} | {tuned:.2f} | {' | '.join(shown)} |")
    print("\n| conversion | device | batch | phase | cost | dense, us per token | converted | ratio |\n|---|---|---|---|---|---|---|---|")
    for row in content["rows"]:
        for one in row.get("times", ()):
            device = f"{one['device']} {one['type']}" + (f", {one['threads']} threads" if one["device"] == "cpu" else "")
            print(f"| {row['method']} {row['strength']:g} | {device} | {one['batch']} | {one['phase']} | {100 * one['budget']:.0f} % "
                  f"| {one['dense_us']:.2f} | {one['converted_us']:.2f} | {one['speedup']:.2f} |")  # fmt: skip


def variants(options: argparse.Namespace) -> list[tuple[Method, float]]:
    """Conversions in the order of importance: the first strength and none with both methods, then other strengths."""
    first, *others = options.strengths
    return [
        ("d2dmoe", first), ("moefication", 0.0), ("d2dmoe", 0.0), ("moefication", first), *(("d2dmoe", one) for one in others),
    ]  # fmt: skip


def main() -> None:
    """Convert, measure and print."""
    if "--table" in sys.argv:
        tables(sys.argv[sys.argv.index("--table") + 1])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--size", choices=list(SIZES), default="30M")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", help="folder of language_sizes.py")
    parser.add_argument("--strengths", nargs="+", type=float, default=[1e-3, 1e-4], help="of the penalty")
    parser.add_argument("--expert-size", type=int, default=64)
    for name, value in (("fit", 12288), ("windows", 64), ("router-windows", 2048), ("sparsify", 1), ("router-epochs", 7),
                        ("convert-batch", 64), ("threads", torch.get_num_threads())):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--timed", type=int, default=2, help="variants that are timed, the first ones")
    parser.set_defaults(seconds=200)
    options = parse(parser)
    torch.set_float32_matmul_precision("high")
    began, rows, waiting = time.perf_counter(), list[dict[str, Any]](), list[tuple[dict[str, Any], Study]]()
    with tempfile.TemporaryDirectory() as folder:
        options.cache = options.cache or f"{folder}/cache"
        model, facts = llama(options, Path(folder))
        windows = windows_of(options)
        print(f"decoder and data ready after {time.perf_counter() - began:.1f} s: {facts}", flush=True)
        for method, strength in variants(options):
            longest = max((row["seconds"] for row in rows), default=0.0)  # without its timing
            if time.perf_counter() - began + longest > options.seconds:
                print(f"{method} {strength:g}: left out, it would end after --seconds", flush=True)
                continue
            try:
                row, study = run_variant(model, windows, options, method, strength)
            except Exception:  # the variants after it may still be measured
                print(f"{method} {strength:g}: failed\n{traceback.format_exc()}", flush=True)
                continue
            rows.append(row)
            print_row(row)
            write(options, facts, rows)
            if len(rows) <= options.timed:
                waiting.append((row, study))
            if len(rows) == 1:  # the other timings come last, in the time that is left
                add_times(waiting.pop(), options, began)
                write(options, facts, rows)
        for pair in waiting:
            add_times(pair, options, began)
            write(options, facts, rows)


def add_times(pair: tuple[dict[str, Any], Study], options: argparse.Namespace, began: float) -> None:
    """Time a variant and print its times."""
    row, study = pair
    try:
        row["times"] = time_variant(study, options, began + options.seconds)
    except Exception:  # the variants after it may still be measured
        print(f"timing failed\n{traceback.format_exc()}", flush=True)
    for one in row.get("times", ()):
        print_time(one)


def write(options: argparse.Namespace, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write all rows so far."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    content = {"options": vars(options), "device": device, "torch": torch.__version__, "decoder": facts, "rows": rows}
    Path(options.json).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
