"""Latency of a trained run on its own test samples, exit by exit and under its exit policy.

Times are measured, not derived from MACs; MACs are reported next to them for comparison.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from math import inf
from pathlib import Path

import torch
from torch import Tensor, nn

from clframe.accounting import MacCounter, latency
from clframe.errors import ConfigError, RunFolderError
from clframe.exits import ExitPolicy
from clframe.exits.captured import CapturedNetwork
from clframe.exits.captured_segments import WARM
from clframe.exits.dynamic import AdjustLogits, DynamicNetwork
from clframe.files import require_writable
from clframe.options import convert_argument
from clframe.report.latency import Setting, Timed, Timings, write_timings
from clframe.seeding import generator_for
from clframe.targets.opening import open_target
from clframe.training.learner import Learner
from clframe.training.prediction_cost import policy_of

SAMPLES = 256
"""Number of test samples that the timed calls cycle through."""


def time_run(
    run: str | Path,
    *,
    batches: Sequence[int] = (1, 32),
    device: str = "cpu",
    warmup: int = 5,
    repeats: int = 30,
    overrides: Sequence[str] = (),
) -> Timings:
    """Measure the latency of a run's model, and write ``latency.json`` into its folder.

    Args:
        run: A run folder.
        batches: Batch sizes.
        device: cpu, cuda, cuda:N, mps or auto.
        warmup: Calls before the timed ones.
        repeats: Timed calls, each on the next samples; the samples of all experiences are mixed.
        overrides: Other locations of the data, such as ``benchmark.data_dir=DIR``.

    Raises:
        RunFolderError: No run, or a run that cannot be loaded.
        ConfigError: Batch sizes or numbers of calls below 1.
    """
    batches = convert_argument(batches, tuple[int, ...], where="latency: batches")
    for name, count in (("repeats", repeats), ("warmup", warmup)):
        convert_argument(count, int, where=f"latency: {name}")
    if not batches or min(batches) < 1 or repeats < 1 or warmup < 0:
        raise ConfigError(
            f"latency: found batches {list(batches)}, repeats {repeats}; give sizes and a number of calls of 1 or more"
        )
    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise RunFolderError(f"latency: {run} contains no config.yaml; give a run folder")
    require_writable(folder, where="latency", advice="make the run folder writable")
    target = open_target(str(run), device=device, overrides=overrides)
    assert target.run is not None
    x = _mix(torch.cat([_tensor(batch.inputs) for batch in target.batches("test", limit=max(SAMPLES, *batches))]))
    rows: list[Timed] = []
    for way, module in _variants(target.run.learner):
        rows += [
            Timed(way=way, batch=found.batch, p50=found.p50, p95=found.p95, throughput=found.throughput,
                  macs=_macs(module, x, found.batch))
            for found in latency(module, x, batches=batches, warmup=warmup, repeats=repeats)
        ]  # fmt: skip
    rows += _graph_rows(target.run.learner, x, batches=batches, warmup=warmup, repeats=repeats)
    setting = Setting(
        device=_device_name(x.device), processor=platform.machine(), threads=torch.get_num_threads(),
        torch=str(torch.__version__), dtype=str(x.dtype).removeprefix("torch."), warmup=warmup, repeats=repeats,
        samples=len(x),
    )  # fmt: skip
    timings = Timings(setting=setting, rows=tuple(rows))
    write_timings(timings, folder)
    return timings


def _variants(learner: Learner) -> Iterator[tuple[str, nn.Module]]:
    """Modules to time: the whole network, the network up to each exit, and the network under its exit policy."""
    network, policy = learner.network, policy_of(learner)
    yield "whole network", network
    adjust = _corrector(learner)
    last = len(network.heads) - 1
    if last:
        for exit, name in enumerate(network.exit_names):
            thresholds = tuple(0.0 if index == exit else inf for index in range(last))
            yield f"exit/{name}", DynamicNetwork(network, ExitPolicy(thresholds=thresholds), adjust=adjust)
    if policy is not None:
        yield "policy", DynamicNetwork(network, policy, adjust=adjust)


def _graph_rows(
    learner: Learner, x: Tensor, *, batches: Sequence[int], warmup: int, repeats: int
) -> Iterator[Timed]:
    """The exit policy by CUDA graphs, recorded for each batch size; nothing on other devices or without a policy."""
    policy = policy_of(learner)
    if x.device.type != "cuda" or policy is None:
        return
    dynamic = DynamicNetwork(learner.network, policy, adjust=_corrector(learner))
    for size in batches:
        graphs = CapturedNetwork(dynamic, batch=size)
        graphs.choose_removals(x[:size])
        for _ in range(WARM + 1):  # records every bucket that the samples lead to
            for part in x.split(size):
                graphs(part)
        if graphs.failure:
            return
        (found,) = latency(graphs, x, batches=[size], warmup=warmup, repeats=repeats)
        # Graphs run no operator of torch that could be counted, and the same stages, but for padding.
        yield Timed(way="policy, CUDA graphs", batch=size, p50=found.p50, p95=found.p95, throughput=found.throughput,
                    macs=_macs(dynamic, x, size))  # fmt: skip


def _corrector(learner: Learner) -> AdjustLogits | None:
    """Correction of each exit's logits.

    One of all exits together cannot be applied to one exit: times are then without it.
    """
    return None if learner.composition.acting_at("adjust_logits") else learner.exit_corrector()


def _macs(module: nn.Module, x: Tensor, size: int) -> float:
    """Mean MACs per sample of all samples, in batches of this size, counted during execution."""
    with torch.no_grad(), MacCounter() as counter:
        for part in x.split(size):  # the last one may be smaller: the mean is over the same samples for every size
            module(part)
    return counter.macs / len(x)


def _mix(x: Tensor) -> Tensor:
    """Samples in a random order, the same in every call: test data are in the order of experiences."""
    order_N = torch.randperm(len(x), generator=generator_for(0, "latency"))
    return x[order_N.to(x.device)]


def _tensor(inputs: object) -> Tensor:
    assert isinstance(inputs, Tensor)  # inputs of a run's network are one tensor
    return inputs


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)
