"""Dynamic inference at batch 1 as programs of AOTInductor, one for each segment, on one CPU thread (docs/performance.md).

    OMP_NUM_THREADS=1 python perf/staged_aot.py --model resnet32 mlp

Every segment (stages, head, confidence and comparison) is exported by ``torch.export`` and compiled to machine code, as is
the bare backbone; Python only asks whether the sample stops. Exits are at 25, 50 and 75 % of the MACs. Milliseconds of
processor time a sample, contestants in turns, medians; ratios are taken within a repetition. Needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from exit_race import CLASSES, MODELS, macs
from torch import Tensor, nn

from clframe.accounting.macs import stage_macs
from clframe.exits.active_samples import ActiveSamples
from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.fusion import fuse_batch_norm
from clframe.exits.head_kinds import make_head
from clframe.exits.placement import at_cost
from clframe.exits.policies import ExitPolicy
from clframe.exits.segments import Segment, divide, run_segment
from clframe.nn import Network

SAMPLES, REPEATS = 48, 9


class SegmentProgram(nn.Module):
    """A segment as a function of tensors: ``tap -> (tap, scores_BC, stops_B)``."""

    def __init__(self, dynamic: DynamicNetwork, segment: Segment) -> None:
        super().__init__()
        self.dynamic, self.segment = dynamic, segment

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = ActiveSamples(value)
        run_segment(self.dynamic, self.segment, rows)
        assert isinstance(rows.value, Tensor) and rows.scores_nC is not None
        stops = torch.ones(len(value), dtype=torch.bool) if rows.done_n is None else rows.done_n
        return rows.value, rows.scores_nC, stops


def compiled(program: nn.Module, example: Tensor, folder: Path) -> Callable[[Tensor], Any]:
    """A program as machine code."""
    exported = torch.export.export(program.eval(), (example,))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / f"{time.time_ns()}.pt2"))
    return torch._inductor.aoti_load_package(package)


def build(model: str) -> Network:
    torch.manual_seed(0)
    backbone = MODELS[model]((3, 32, 32))
    taps = at_cost(stage_macs(Network(backbone)), (0.25, 0.5, 0.75)).taps
    network = Network(backbone, exits=[(tap, make_head("auto", backbone.tap_shapes[tap])) for tap in taps])
    network.grow(range(CLASSES))
    return fuse_batch_norm(network, memory_format="channels_last")


def staged(programs: list[Callable[[Tensor], Any]]) -> Callable[[Tensor], int]:
    def run(x: Tensor) -> int:
        for exit, program in enumerate(programs):
            x, _, stops = program(x)
            if bool(stops):
                return exit
        return len(programs)

    return run


@torch.no_grad()
def race(model: str, folder: Path) -> None:
    network = build(model)
    torch.manual_seed(1)
    x = torch.randn(SAMPLES, 3, 32, 32).to(memory_format=torch.channels_last)
    scores = network(x).logits
    work = macs(network)
    # A third of the samples stops at each of the first two exits, half of the others at the third.
    limits, staying = [], torch.ones(SAMPLES, dtype=torch.bool)
    for scores_NC, share in zip(scores[:-1], (1 / 3, 1 / 2, 1 / 2), strict=True):
        confidence_N = scores_NC.softmax(1).amax(1)
        limits.append(float(confidence_N[staying].quantile(1 - share)))
        staying &= confidence_N < limits[-1]
    dynamic = DynamicNetwork(network, ExitPolicy(thresholds=tuple(limits)))
    never = DynamicNetwork(network, ExitPolicy(thresholds=2.0))
    (whole,) = divide(never)
    start = time.perf_counter()
    programs, value = [], x[:1]
    for segment in divide(dynamic):
        program = SegmentProgram(dynamic, segment)
        programs.append(compiled(program, value, folder))
        value = program(value)[0]
    bare = compiled(SegmentProgram(never, whole), x[:1], folder)
    seconds = time.perf_counter() - start
    samples = list(x.split(1))
    exit_N = torch.tensor([int(dynamic(sample).exit_B) for sample in samples])
    found = [staged(programs)(sample) for sample in samples]
    cost = sum(work.of_exit(exit, dynamic.computed_exits) for exit in exit_N.tolist()) / SAMPLES / work.bare
    runs: dict[str, Callable[[Tensor], Any]] = {
        "bare": never, "dynamic": dynamic, "bare compiled": bare, "segments compiled": staged(programs),
    }  # fmt: skip
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for lap in range(REPEATS + 1):
        for name in runs if lap % 2 else reversed(runs):
            begin = time.process_time()
            for sample in samples:
                runs[name](sample)
            if lap:
                taken[name].append(1e3 * (time.process_time() - begin) / SAMPLES)
    agree = sum(a == b for a, b in zip(found, exit_N.tolist(), strict=True)) / SAMPLES

    def ratio(a: str, b: str) -> float:
        return median(x / y for x, y in zip(taken[a], taken[b], strict=True))

    print(
        f"{model}: MACs {cost:.3f} of the backbone; "
        + ", ".join(f"{name} {median(times):.3f} ms" for name, times in taken.items())
        + f"; time of dynamic {ratio('dynamic', 'bare'):.3f} of bare, compiled {ratio('segments compiled', 'bare compiled'):.3f}"
        f"; compiling took {seconds:.0f} s; same exits {agree:.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=["mlp", "resnet32"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for model in options.model:
            race(model, Path(folder))


if __name__ == "__main__":
    main()
