"""Critical activation sparsity of trained decoders by role and size, next to that of Gaussian vectors.

    python perf/language_sizes.py TEXTS --cache CACHE --seconds 330 --json sizes.json             # one H200
    python perf/language_sizes.py TEXTS --sizes 1M 4M --seeds 0 1 2 --json small.json --weights WEIGHTS
    python perf/language_sizes.py --table sizes.json small.json                                   # tables of such files

TEXTS is a folder with NAME_train.txt and NAME_test.txt (or .txt.xz) of each domain. Every decoder is trained on all
domains together (benchmark language_model, one experience), then top-p masks are swept over each role of its
feed-forward networks (clframe.sparsity.analysis) on test windows. Critical sparsity is the highest one at which the
perplexity rises by at most the tolerance; its interval is a bootstrap over windows within domains. Rows are written as
they come; a file has the likelihoods of every window at every point, so that other tolerances need no new run.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from language_decoders import FFNS, SIZES, add_arguments, parse, save_weights, spread, spread_of, text, train
from torch import Tensor, nn

from clframe.functional.language import next_token_targets, perplexity
from clframe.metrics.statistics import mean, paired
from clframe.nn.network import Network
from clframe.sparsity.analysis import analyze
from clframe.sparsity.functional import critical_point, keep, keep_by_sorting
from clframe.sparsity.scores import lowest_mean, token_values

TOLERANCES = (0.01, 0.05)
"""Relative rises of the perplexity."""
VALUES = (1.0, 0.999, 0.998, 0.995, 0.99, 0.985, 0.98, 0.97, 0.96, 0.95, 0.94, 0.92, 0.9, 0.88, 0.86, 0.84, 0.82, 0.8,
          0.77, 0.74, 0.7, 0.65, 0.6, 0.5, 0.4, 0.25)  # fmt: skip
"""p of the rule top-p."""
ROLES = ("input", "up", "gate", "intermediate")
SAMPLES = 1000
"""Bootstrap samples."""


def analyze_network(network: Network, ids_WS: Tensor, domain_W: Tensor, *, batch: int) -> dict[str, Any]:
    """Sweep top-p over the roles; returns curves, with the nats per token of each window at each point."""
    device = next(network.parameters()).device
    batches = [(ids_BS.to(device), next_token_targets(ids_BS.to(device)), None) for ids_BS in ids_WS.split(batch)]
    nats: list[list[Tensor]] = [[]]

    def evaluate(model: nn.Module, inputs: Any, targets_N: Tensor) -> Tensor:
        values_N = token_values("perplexity", model(inputs).last, targets_N)
        nats[-1].append(-values_N.double().view(len(inputs), -1).mean(1))
        return values_N

    report = analyze(
        network, batches, evaluate=evaluate, sweep={"top_p": VALUES}, roles=ROLES, inside=network.backbone,
        least=lambda dense: lowest_mean("perplexity", dense, share=1 - max(TOLERANCES)), rank_tokens=64,
        on_pass=lambda done, passes: nats.append([]),
    )  # fmt: skip
    nats_PW = torch.stack([torch.cat(parts) for parts in nats if parts]).cpu()
    dense_W, rest = nats_PW[0], list(nats_PW[1:].split(len(VALUES)))
    curves = [
        {"role": curve.role, "achieved": curve.achieved, "gaussian": curve.gaussian, "layers": dict(curve.layers),
         "nats": [[round(nat, 5) for nat in row] for row in own_VW.tolist()]}
        for curve, own_VW in zip(report.curves, rest, strict=True)
    ]  # fmt: skip
    return {"p": VALUES, "domains": domain_W.tolist(), "dense": dense_W.tolist(), "curves": curves}


def critical(curve: dict[str, Any], dense: float, scores: Sequence[float], tolerance: float) -> tuple[float, float]:
    """Critical sparsity, and the Gaussian's at the same p."""
    least = lowest_mean("perplexity", dense, share=1 - tolerance)
    i, j, way = critical_point(curve["achieved"], scores, dense=dense, least=least)
    found = curve["achieved"], curve["gaussian"]
    first, second = (values[i] + way * (values[j] - values[i]) for values in found)
    return first, second


def summarize(analysis: dict[str, Any], tolerance: float, *, samples: int = SAMPLES) -> dict[str, Any]:
    """Critical sparsity of each role with its 95 % interval over texts, and the order of the roles in the samples."""
    weight_BW = resample(torch.tensor(analysis["domains"]), samples)
    dense_W = torch.tensor(analysis["dense"], dtype=torch.float64)
    dense_B = weight_BW @ dense_W
    roles, drawn = {}, {}
    for curve in analysis["curves"]:
        nats_VW = torch.tensor(curve["nats"], dtype=torch.float64)
        point, gaussian = critical(curve, -float(dense_W.mean()), (-nats_VW.mean(1)).tolist(), tolerance)
        scores_BV = -(weight_BW @ nats_VW.T)
        found = [
            critical(curve, -float(dense), scores, tolerance)[0]
            for dense, scores in zip(dense_B, scores_BV.tolist(), strict=True)
        ]
        drawn[curve["role"]] = found
        ordered = sorted(found)
        low, high = ordered[round(0.025 * (samples - 1))], ordered[round(0.975 * (samples - 1))]
        roles[curve["role"]] = {"critical": point, "gaussian": gaussian, "low": low, "high": high}
    pairs = [("intermediate", "input"), ("input", "gate"), ("input", "up")]
    order = {
        f"{one} > {other}": mean([float(a > b) for a, b in zip(drawn[one], drawn[other], strict=True)])
        for one, other in pairs
        if one in drawn and other in drawn
    }
    return {"tolerance": tolerance, "roles": roles, "order": order}


def resample(domain_W: Tensor, samples: int) -> Tensor:
    """weight_BW, rows of sum 1: windows drawn with replacement within each domain."""
    generator = torch.Generator().manual_seed(0)
    weight_BW = torch.zeros(samples, len(domain_W), dtype=torch.float64)
    for domain in domain_W.unique():
        own = (domain_W == domain).nonzero()[:, 0]
        drawn = own[torch.randint(len(own), (samples, len(own)), generator=generator)]
        weight_BW.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return weight_BW / len(domain_W)


def cells(options: argparse.Namespace) -> Iterator[tuple[int, str, str]]:
    """Seeds, sizes and feed-forward networks in the order of training."""
    for seed in options.seeds:
        for name in options.sizes:
            for ffn in options.ffns:
                yield seed, name, ffn


def run_cell(
    options: argparse.Namespace, seed: int, name: str, ffn: str, windows: tuple[Tensor, Tensor], folder: Path
) -> dict[str, Any]:
    """Train one decoder and analyze it."""
    start = time.perf_counter()
    network, result = train(options, name, ffn, seed, folder)
    trained = time.perf_counter() - start
    facts = {
        "size": name, "ffn": ffn, "seed": seed, "parameters": result.parameters, "steps": result.steps,
        "tokens": result.steps * options.batch * options.context, "perplexity": result.perplexity_matrix[-1][0],
    }  # fmt: skip
    if options.weights and name in options.save and seed == options.seeds[0]:
        save_weights(network, Path(options.weights), f"{name}-{ffn}", facts)
    began = time.perf_counter()
    analysis = analyze_network(network, *windows, batch=options.analysis_batch)
    took = time.perf_counter() - began
    return {
        **facts, "analyzed_perplexity": perplexity(mean(analysis["dense"])), "train_seconds": result.train_seconds,
        "run_seconds": trained, "analysis_seconds": took,
        "critical": [summarize(analysis, tolerance) for tolerance in TOLERANCES], "analysis": analysis,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def expected_seconds(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Time of a cell by those before it, in proportion to the weights where they were smaller; 0 for the first."""
    def weights(size: str) -> int:
        return 12 * SIZES[size].width ** 2 * SIZES[size].depth

    own = [row["seconds"] for row in rows if row["size"] == name]
    others = [row["seconds"] * max(1.0, weights(name) / weights(row["size"])) for row in rows[-1:]]
    return max(own) if own else max(others, default=0.0)


def print_row(row: dict[str, Any]) -> None:
    """One line for each cell."""
    roles = row["critical"][-1]["roles"]
    shown = "  ".join(
        f"{role} {100 * one['critical']:.1f} [{100 * one['low']:.1f}, {100 * one['high']:.1f}]" for role, one in roles.items()
    )
    print(
        f"{row['size']:>5} {row['ffn']:6} seed {row['seed']}  perplexity {row['perplexity']:7.2f}  "
        f"{row['seconds']:5.1f} s (analysis {row['analysis_seconds']:.1f})  {shown}", flush=True,
    )  # fmt: skip


def write_csv(rows: Sequence[dict[str, Any]], tolerances: Sequence[float], file: Path) -> None:
    """Write a line for each decoder, tolerance and role; shares, with the interval over texts."""
    names = ("size", "ffn", "seed", "parameters", "tokens", "perplexity")
    with file.open("w", encoding="utf-8", newline="") as opened:
        table = csv.writer(opened, lineterminator="\n")
        table.writerow([*names, "tolerance", "role", "critical", "low", "high", "gaussian"])
        order = sorted(rows, key=lambda row: (list(SIZES).index(row["size"]), FFNS.index(row["ffn"]), row["seed"]))
        for row in order:
            for tolerance in tolerances:
                for role, one in found_at(row, tolerance)["roles"].items():
                    shares = [f"{one[key]:.4f}" for key in ("critical", "low", "high", "gaussian")]
                    facts = [f"{row[name]:.3f}" if name == "perplexity" else row[name] for name in names]
                    table.writerow([*facts, tolerance, role, *shares])


def tables(rows: Sequence[dict[str, Any]], tolerances: Sequence[float]) -> None:
    """Print Markdown tables: means over seeds, standard deviations, and the order of the roles."""
    for tolerance in tolerances:
        print(f"\nperplexity at most {100 * tolerance:g} % above the dense one; critical sparsity in %, in brackets that of Gaussian vectors\n")
        print("| weights | FFN | seeds | perplexity | " + " | ".join(ROLES) + " | order in bootstrap samples |")
        print("|" + "---|" * (5 + len(ROLES)))
        for name in SIZES:
            for ffn in FFNS:
                own = [row for row in rows if (row["size"], row["ffn"]) == (name, ffn)]
                if own:
                    print(table_row(own, tolerance))
        print()
        for ffn in FFNS:
            print_differences([row for row in rows if row["ffn"] == ffn], ffn, tolerance)


def found_at(row: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """The summary of a row at a tolerance, computed where the file has none."""
    known = [one for one in row["critical"] if one["tolerance"] == tolerance]
    if not known:
        row["critical"].append(summarize(row["analysis"], tolerance))
    found: dict[str, Any] = known[0] if known else row["critical"][-1]
    return found


def table_row(own: Sequence[dict[str, Any]], tolerance: float) -> str:
    """One row of a table: the seeds of a size."""
    summaries = [found_at(row, tolerance) for row in own]
    columns = []
    for role in ROLES:
        found = [one["roles"][role] for one in summaries if role in one["roles"]]
        columns.append(f"{spread_of([100 * one['critical'] for one in found])} ({100 * mean([one['gaussian'] for one in found]):.1f})" if found else "")
    orders = "; ".join(
        f"{pair} {100 * mean([one['order'][pair] for one in summaries]):.0f} %" for pair in summaries[0]["order"]
    )
    parameters, seeds = own[0]["parameters"], len(own)
    return (
        f"| {parameters / 1e6:.1f} M | {own[0]['ffn']} | {seeds} | {spread_of([row['perplexity'] for row in own], digits=2)} | "
        + " | ".join(columns) + f" | {orders} |"
    )


def print_differences(rows: Sequence[dict[str, Any]], ffn: str, tolerance: float) -> None:
    """Differences between roles over cells, and the slope of each role over a decade of weights, with intervals."""
    by_cell = {at: (row, found_at(row, tolerance)["roles"]) for at, row in enumerate(rows)}
    for one, other in (("intermediate", "input"), ("input", "gate"), ("input", "up")):
        if by_cell and all(other in roles for _, roles in by_cell.values()):
            first = {at: roles[other]["critical"] for at, (_, roles) in by_cell.items()}
            second = {at: roles[one]["critical"] for at, (_, roles) in by_cell.items()}
            difference = paired(first, second)
            ahead = sum(second[at] > first[at] for at in first)
            print(f"- {ffn}, {one} minus {other}: {100 * difference.mean:+.1f} ± {100 * difference.half_width:.1f} "
                  f"points over {len(first)} decoders, positive in {ahead}")  # fmt: skip
    for role in ROLES:
        found = [(math.log10(row["parameters"]), roles[role]["critical"]) for row, roles in by_cell.values() if role in roles]
        if len({x for x, _ in found}) > 1:
            slope, half = regression(found)
            print(f"- {ffn}, {role}: {100 * slope:+.1f} ± {100 * half:.1f} points per factor 10 of weights")


def regression(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope of a straight line through points, and half of its 95 % interval (Student's t)."""
    from scipy.special import stdtrit

    x = torch.tensor([one for one, _ in pairs], dtype=torch.float64)
    y = torch.tensor([other for _, other in pairs], dtype=torch.float64)
    x0 = x - x.mean()
    slope = float((x0 * y).sum() / x0.square().sum())
    rest = y - y.mean() - slope * x0
    freedom = len(pairs) - 2
    if freedom < 1:
        return slope, math.nan
    error = math.sqrt(float(rest.square().sum()) / freedom / float(x0.square().sum()))
    return slope, float(stdtrit(freedom, 0.975)) * error


def main() -> None:
    """Train, analyze and print."""
    if "--table" in sys.argv:
        parser = argparse.ArgumentParser(description="tables of finished files")
        parser.add_argument("--table", nargs="+", required=True)
        parser.add_argument("--tolerance", nargs="+", type=float, default=list(TOLERANCES))
        parser.add_argument("--csv", help="file for all critical sparsities")
        found = parser.parse_args()
        rows = [row for file in found.table for row in json.loads(Path(file).read_text(encoding="utf-8"))["rows"]]
        tables(rows, found.tolerance)
        if found.csv:
            write_csv(rows, found.tolerance, Path(found.csv))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=[name for name in SIZES if name != "tiny"])
    parser.add_argument("--ffns", nargs="+", choices=FFNS, default=list(FFNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--windows", type=int, default=128, help="test windows of the analysis, of all domains")
    parser.add_argument("--analysis-batch", type=int, default=64, help="windows that are masked together")
    parser.add_argument("--weights", help="folder for the weights of the first seed")
    parser.add_argument("--save", nargs="+", default=["30M"], help="sizes whose weights are kept")
    options = parse(parser)
    torch.set_float32_matmul_precision("high")  # of the analysis, which is in float32
    began, rows = time.perf_counter(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        options.cache = options.cache or f"{folder}/cache"
        windows = spread(text(options), options.windows)
        masks = time_masks() if options.device == "cuda" else {}
        print(f"{len(windows[0])} test windows, masks {masks} ms, data ready after {time.perf_counter() - began:.1f} s", flush=True)
        for seed, name, ffn in cells(options):
            if time.perf_counter() - began + expected_seconds(rows, name) > options.seconds:
                print(f"{name} {ffn} seed {seed}: left out, it would end after --seconds", flush=True)
                continue
            try:
                rows.append(run_cell(options, seed, name, ffn, windows, Path(folder)))
            except Exception:  # the cells after it may still be measured
                print(f"{name} {ffn} seed {seed}: failed\n{traceback.format_exc()}", flush=True)
                continue
            print_row(rows[-1])
            content = {"options": vars(options), "device": device_name(options.device), "mask_ms": masks, "rows": rows}
            Path(options.json).write_text(json.dumps(content), encoding="utf-8")


def time_masks(tokens: int = 16384, neurons: int = 2048) -> dict[str, float]:
    """Milliseconds of a top-p mask on the GPU by the kernel, where it is used, and by sorting: medians of 10."""
    x = torch.randn(tokens, neurons, device="cuda")
    found = {}
    for name, run in (("keep", partial(keep, kind="top_p")), ("sorting", keep_by_sorting)):
        took = []
        for _ in range(12):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run(x, 0.9)
            torch.cuda.synchronize()
            took.append(1000 * (time.perf_counter() - start))
        found[name] = median(took[2:])
    return found


def device_name(device: str) -> str:
    """Name of the GPU, or cpu, with the version of torch."""
    return f"{torch.cuda.get_device_name() if device == 'cuda' else 'cpu'}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
