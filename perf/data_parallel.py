"""One model on several devices: checks, and throughput against one device.

    python perf/data_parallel.py --json data_parallel.json                 # two GPUs, NCCL, at most 5 minutes
    python perf/data_parallel.py --cpu --tiny --json data_parallel.json    # two CPU processes, gloo, tiny networks
    python perf/data_parallel.py --only checks

Checks, each against one device with the same global batch, in float64: every sample is trained on once per epoch;
weights, replay buffers and other states are equal in all processes and those of one device to a tolerance; accuracies
are those of one device; a run that is stopped on two devices, continued on one and finished on two ends like one that
was not stopped. On GPUs also, in single precision: recorded steps on all devices end with the weights of eager ones.

Throughput, in new samples a second, with random images (``--data``: CIFAR-100) in the memory of each device: ResNet32
on 3x32x32 and ViT-B/16 on 3x224x224, for each strategy in its second experience, so that there are teachers and full
replay buffers.

one          one device; steps recorded as CUDA graphs where possible
same share   all devices, and as many samples for each as for one
same batch   all devices, and the global batch of one
..., eager   the same without recorded steps
average_ms   time of averaging gradients alone, without a backward pass next to it
eval         test samples a second of an evaluation

Measurements are in the order of their importance; those that the time does not allow are listed as skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import cache, cached_property, partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from clframe.core import parse
from clframe.data import Source, TensorSamples, class_incremental
from clframe.data.augmentation import AUGMENTATIONS
from clframe.nn import BACKBONES, Network
from clframe.seeding import torch_settings
from clframe.training.distributed import Group
from clframe.training.evaluation import Scores
from clframe.training.launch import _fabric, _joined_fabric
from clframe.training.module import ContinualModule
from clframe.training.rendezvous import join_group, open_store
from clframe.training.strategy import LightningStrategy

WARM = 10
"""Steps before the clock starts: the first ones run eagerly, then one is recorded."""
FIRST = 4
"""Steps of the experience before the one that is timed."""

CHECKED = ("naive", "er(memory=20)", "derpp(memory=20)", "lwf", "er(memory=20) + exits", "er(memory=20) + moe(samples=16)")
RECORDED = ("naive", "er(memory=20)", "derpp(memory=20)", "lwf", "er(memory=20) + exits")
STRATEGIES: dict[str, tuple[str, ...]] = {
    "vit_b_16": (
        "naive", "er(memory=100)", "lwf", "derpp(memory=100)", "er(memory=100) + exits(every=3)",
        "er(memory=100) + moe(samples=64, epochs=1)",
    ),
    "resnet32": (
        "naive", "er(memory=2000)", "lwf", "derpp(memory=2000)", "er(memory=2000) + exits",
    ),  # experts need feed-forward networks
}  # fmt: skip


class Settings:
    """Sizes of a measurement.

    Args:
        backbone: Its name.
        tiny: Whether to replace it by one that a CPU trains in milliseconds.
        batch: Samples of a batch.
        data: The file ``cifar100.npz`` for real images, enlarged where the backbone takes larger ones; none: random images.
    """

    def __init__(self, backbone: str, *, tiny: bool, batch: int, data: Path | None = None) -> None:
        self.backbone, self.batch, self.data = backbone, batch, data
        self.options: dict[str, Any] = {}
        side = 224 if backbone == "vit_b_16" else 32
        # Whole batches of every size that is measured, so that all steps of a setting are alike.
        self.images = 2_048 if backbone == "vit_b_16" else 4_864 if data else 5_120
        if tiny:
            side, self.images = 8, 64
            small = {"width": 8, "depth": 1, "patch": 4, "heads": 2}
            self.backbone, self.options = ("vit_tiny", small) if backbone == "vit_b_16" else ("small_cnn", {})
        self.shape = (3, side, side)

    @cached_property
    def backbone_made(self) -> Any:
        """The backbone, made once: its random weights take seconds."""
        return BACKBONES.get(self.backbone)(self.shape, **self.options)

    def make(self) -> Any:
        """Return a copy of the backbone."""
        return copy.deepcopy(self.backbone_made)

    @cached_property
    def benchmark(self) -> Any:
        """Two experiences of ten classes."""
        x, y = self._real_images() if self.data else self._random_images()
        scale = {"mean": (125.0,), "std": (63.0,)}
        augment = AUGMENTATIONS.get("cifar") if self.shape[1] == 32 else ()
        train = TensorSamples(x, y, augment=augment, **scale)
        test = TensorSamples(x[: self.images], y[: self.images], **scale)
        return class_incremental(Source("images", train, test, classes=20), experiences=2, order="sorted")

    def _random_images(self) -> tuple[torch.Tensor, torch.Tensor]:
        count = 2 * self.images
        x = torch.randint(256, (count, *self.shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        return x, torch.arange(count) % 20

    def _real_images(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images of the first 20 classes, each pixel repeated up to the size that the backbone takes."""
        with np.load(self.data) as file:
            x, y = torch.from_numpy(file["train_x"]), torch.from_numpy(file["train_y"])
        rows = torch.stack([(y // 10 == ten).nonzero()[: self.images, 0] for ten in range(2)]).T.flatten()
        times = self.shape[1] // x.shape[1]
        x = x[rows].permute(0, 3, 1, 2)
        return x.repeat_interleave(times, 2).repeat_interleave(times, 3).contiguous(), y[rows]


make_settings = cache(Settings)


def build(
    expression: str, data: Any, make: Callable[[], Any], *, device: torch.device, group: Group | None, precision: str,
    batch: int, epochs: int, capture: Any = False, plugins: Any = (), eval_batch: int = 256,
) -> LightningStrategy:  # fmt: skip
    """Return a strategy on one device, or on all of a group."""
    torch.manual_seed(0)
    fused = device.type == "cuda" and precision != "64-true"
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9, fused=fused)
    module = ContinualModule(Network(make()), parse(expression), optimizer=sgd, seed=0, on_nonfinite="warn")
    if group is None:
        fabric = _fabric(device.type, [device.index] if device.type == "cuda" else 1, precision)
    else:
        fabric = _joined_fabric(group, precision)
    return LightningStrategy(
        model=module, benchmark=data, fabric=fabric, group=group, train_mb_size=batch, train_epochs=epochs,
        eval_mb_size=eval_batch, evaluator=None, capture=capture, plugins=list(plugins),
        channels_last=device.type == "cuda" and precision != "64-true",
    )  # fmt: skip


# --- checks -----------------------------------------------------------------------------------------


def check_strategy(expression: str, *, device: torch.device, group: Group) -> dict[str, Any]:
    """Compare a run of all devices with one of one device; every process returns the same."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(6).repeat(13)
    samples = TensorSamples(torch.randn(len(y), 3, 8, 8, generator=generator) + y.reshape(-1, 1, 1, 1), y)
    data = class_incremental(Source("blobs", samples, samples, classes=6), experiences=3, order="sorted")
    make = partial(BACKBONES.get("vit_tiny"), data.input_shape, patch=4, width=8, depth=2, heads=2)
    found, seen = {}, {}
    for name, each in (("all", group), ("one", None)):
        scores, rows = Scores(data), []
        loop = build(
            expression, data, make, device=device, group=each, precision="64-true", batch=8, epochs=2,
            plugins=[scores], eval_batch=7,
        )  # fmt: skip
        hook = loop.model.network.register_forward_pre_hook(_notes_rows(loop, rows))
        accuracies = []
        for experience in data.avalanche.train_stream:
            loop.train(experience)
            loop.eval(data.evaluation_stream)
            accuracies.append(scores.tally.as_tree())
        hook.remove()
        states = [t.detach().double().cpu() for t in (*loop.model.state_dict().values(), *_tensors(loop.learner.state))]
        found[name], seen[name] = (states, accuracies), rows
    digest = hashlib.blake2b(b"".join(t.numpy().tobytes() for t in found["all"][0])).hexdigest()
    everyone: list[Any] = [None] * group.size
    dist.all_gather_object(everyone, (digest, found["all"][1], seen["all"]))
    largest = max(
        float(((a - b).abs() / b.abs().clamp_min(1)).nan_to_num(0).max())
        for a, b in zip(found["all"][0], found["one"][0], strict=True) if a.numel()
    )  # fmt: skip
    return {
        "check": expression,
        "equal_in_all_processes": len({each[0] for each in everyone}) == 1,
        "largest_difference_from_one_device": largest,
        "equal_to_one_device": largest < 1e-6,
        "accuracies_equal": all(each[1] == found["one"][1] for each in everyone),
        "new_samples_once_per_epoch": _once(seen["one"], [row for each in everyone for row in each[2]])
        if expression in ("naive", "lwf") else None,
    }  # fmt: skip


def check_recorded(expression: str, *, device: torch.device, group: Group) -> dict[str, Any]:
    """Compare weights after recorded steps on all devices with those after eager ones."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(6).repeat(40)
    # Of a scale at which no strategy diverges: weights that are not finite are not compared.
    samples = TensorSamples(torch.randn(len(y), 3, 8, 8, generator=generator) + y.reshape(-1, 1, 1, 1) / 5, y)
    data = class_incremental(Source("blobs", samples, samples, classes=6), experiences=3, order="sorted")
    make = partial(BACKBONES.get("small_cnn"), data.input_shape)
    weights, graphs = [], []
    for capture in (False, True):
        loop = build(
            expression, data, make, device=device, group=group, precision="32-true", batch=8, epochs=8, capture=capture
        )  # fmt: skip
        graphs.append(0)
        for experience in data.avalanche.train_stream:
            loop.train(experience)
            graphs[-1] += 0 if loop.step_capture is None else loop.step_capture.recorded
        weights.append([value.detach().double().cpu() for value in loop.learner.network.state_dict().values()])
    largest = max(float(((a - b).abs() / b.abs().clamp_min(1)).max()) for a, b in zip(*weights, strict=True) if a.numel())
    return {"check": f"recorded {expression}", "graphs": graphs, "largest_difference_from_eager": largest,
            "equal": largest == 0.0 and graphs[0] == 0 and graphs[1] > 0}  # fmt: skip


def _notes_rows(loop: Any, rows: list[Any]) -> Callable[[Any, Any], None]:
    """Return a hook, a function since teachers are deep copies, that lists the samples that a process trains on."""

    def note(network: Any, inputs: Any) -> None:
        computes = loop.group is None or loop._share is not None or loop.group.is_first
        if network.training and torch.is_grad_enabled() and computes:
            epoch = int(loop.clock.train_exp_counter), int(loop.clock.train_exp_epochs)
            rows.extend((*epoch, value) for value in inputs[0].flatten(1)[:, 0].tolist())

    return note


def _once(one: list[Any], shares: list[Any]) -> bool:
    return sorted(one) == sorted(shares) and len(set(one)) == len(one)


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, torch.nn.Module):
        yield from state.state_dict().values()
    elif isinstance(state, dict):
        for key in sorted(state, key=str):
            yield from _tensors(state[key])
    elif isinstance(state, (list, tuple)):
        for part in state:
            yield from _tensors(part)


def check_resumption(*, cuda: bool, devices: int) -> dict[str, Any]:
    """Stop a run on all devices, continue it on one, finish it on all; compare with one that was not stopped."""

    import clframe

    with tempfile.TemporaryDirectory() as place:
        generator = np.random.default_rng(0)
        y = np.arange(8).repeat(20)
        x = (generator.normal(size=(160, 3, 8, 8)) + y[:, None, None, None]).astype("float32")
        np.savez(Path(place) / "data.npz", x_train=x, y_train=y, x_test=x[::2], y_test=y[::2])
        options = [
            "benchmark=npz", f"benchmark.path={place}/data.npz", "benchmark.experiences=4", "backbone=mlp",
            "backbone.width=16", "strategy=er(memory=40) + lwf", "trainer.epochs=2", "trainer.batch_size=16",
            "trainer.precision=64-true", "trainer.figures=none", "trainer.loggers=[]", "trainer.progress=false",
            f"trainer.accelerator={'cuda' if cuda else 'cpu'}", "trainer.deterministic=true", "optimizer.fused=false",
        ]  # fmt: skip

        def stop_after(count: int) -> Callable[[Any], None]:
            def stop(progress: Any) -> None:
                if progress.finished == count:
                    raise KeyboardInterrupt

            return stop

        stopped, whole = Path(place) / "stopped", Path(place) / "whole"
        for number, count in ((devices, 1), (1, 2)):
            with contextlib.suppress(KeyboardInterrupt):
                clframe.run("quickstart", [*options, f"trainer.devices={number}"], folder=stopped,
                            on_evaluated=stop_after(count))  # fmt: skip
        result = clframe.run(None, [f"trainer.devices={devices}"], resume=stopped)  # type: ignore[arg-type]
        reference = clframe.run("quickstart", options, folder=whole)
        one, other = (clframe.load(folder).network.state_dict() for folder in (stopped, whole))
        largest = max(float((one[name].double() - other[name].double()).abs().max()) for name in one)
        return {
            "check": f"resume {devices} -> 1 -> {devices}",
            "largest_difference_of_weights": largest,
            "accuracies_equal": result.accuracy_matrix == reference.accuracy_matrix,
            "fine": largest < 1e-6,
        }


# --- throughput -------------------------------------------------------------------------------------


class Clock:
    """Times the steps of a strategy after the first ones, and ends the experience.

    Args:
        seconds: How long to time.
        group: The processes; all take equally many steps.
    """

    def __init__(self, seconds: float, group: Group | None) -> None:
        self._seconds, self._group = seconds, group
        self._step, self._last, self._new = 0, -1, 0
        self._start = self._timed = 0.0
        self.rate = self.step_ms = 0.0

    def watch(self, loop: Any, *, batch: int) -> None:
        """Time the next experience of a strategy."""
        self._device, self._batch = loop.device, batch
        loop.on_step = self._after_step

    def _after_step(self, loop: Any) -> None:
        self._step += 1
        if self._step == WARM:
            self._start = self._now()
        elif self._step == WARM + 3:
            each = max((self._now() - self._start) / 3, 1e-4)
            more = {"steps": float(min(max(3, round(self._seconds / each)), 400))}
            self._last = self._step + int((more if self._group is None else self._group.agree(more))["steps"])
            self._timed = self._now()
        elif self._step == self._last:
            passed = self._now() - self._timed
            steps = self._last - WARM - 3
            self.rate, self.step_ms = steps * self._batch / passed, 1e3 * passed / steps
            if self._group is not None:
                self.average_ms = self._time_average(loop)
            loop.stop_training()

    average_ms = 0.0

    def _time_average(self, loop: Any) -> float:
        start = self._now()
        for _ in range(5):
            loop.average_gradients()
        return 1e3 * (self._now() - start) / 5

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def throughput(
    expression: str, settings: Settings, *, batch: int, device: torch.device, group: Group | None, capture: Any,
    precision: str, seconds: float, evaluates: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Train an experience briefly, then time steps of the next one."""
    data = settings.benchmark
    loop = build(
        expression, data, settings.make, device=device, group=group, precision=precision, batch=batch, epochs=200,
        capture=capture if device.type == "cuda" else False,
    )  # fmt: skip
    first, second = data.avalanche.train_stream
    loop.limit_batches = FIRST
    loop.train_epochs = 1
    loop.train(first)
    loop.limit_batches, loop.train_epochs = None, 200
    clock = Clock(seconds, group)
    clock.watch(loop, batch=batch)
    loop.train(second)
    found = {"rate": round(clock.rate, 1), "step_ms": round(clock.step_ms, 3), "average_ms": round(clock.average_ms, 3)}
    if loop.step_capture is not None:
        found["graphs"] = loop.step_capture.recorded
    if device.type == "cuda":
        found["memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        torch.cuda.reset_peak_memory_stats(device)
    if evaluates:
        loop.eval(data.evaluation_stream[:1])
        start = clock._now()
        for _ in range(2):
            loop.eval(data.evaluation_stream)
        found["eval"] = round(2 * settings.images / (clock._now() - start), 1)
    return found


# --- processes --------------------------------------------------------------------------------------


class Writer:
    """Appends rows to a file and prints them; in the first process only."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        self._path, self._writes = path, writes

    def add(self, row: dict[str, Any]) -> None:
        """Add a row."""
        if self._writes:
            print(json.dumps(row), flush=True)
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def work(options: argparse.Namespace, rank: int, port: int, size: int) -> None:
    """Check and measure, together with the other processes."""
    cuda = not options.cpu
    devices = [torch.device("cuda", index) if cuda else torch.device("cpu") for index in range(size)]
    group = join_group(open_store(port, size=size, first=rank == 0), rank=rank, devices=devices)
    writer, device = Writer(options.rows, writes=rank == 0), devices[rank]
    end = options.started + 60 * options.minutes - 15

    def is_late() -> bool:
        return bool(group.agree({"late": float(time.time() > end)})["late"])

    def attempt(row: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if is_late():
            row = {**row, "skipped": "no time left"}
        else:
            start = time.perf_counter()
            try:
                row = {**row, **measure()}
            except Exception as error:  # one that fails must not hide the others
                traceback.print_exc()
                row = {**row, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            row["seconds"] = round(time.perf_counter() - start, 1)
        writer.add(row)
        return row

    if options.only in ("all", "checks"):
        with torch_settings(threads=1, deterministic=False, cuda=cuda):
            for expression in CHECKED:
                attempt({"check": expression}, lambda e=expression: check_strategy(e, device=device, group=group))
        with torch_settings(threads=1, deterministic=True, cuda=cuda):
            for expression in RECORDED if cuda else ():
                attempt({"check": f"recorded {expression}"}, lambda e=expression: check_recorded(e, device=device, group=group))
    if options.only in ("all", "throughput"):
        with torch_settings(threads=1 if options.cpu else 4, deterministic=False, cuda=cuda):
            rows = zip_longest(*([(b, s) for s in STRATEGIES[b]] for b in options.backbones))
            order = [
                (backbone, expression.replace("every=3", "every=1") if options.tiny else expression)
                for backbone, expression in filter(None, chain.from_iterable(rows))
            ]
            for backbone, expression in order:
                _measure_row(options, backbone, expression, device, group, attempt)
    group.barrier()
    group.close()


def _measure_row(
    options: argparse.Namespace, backbone: str, expression: str, device: torch.device, group: Group, attempt: Any
) -> None:
    batch = options.batch[backbone]
    settings = make_settings(backbone, tiny=options.tiny, batch=batch, data=options.data)
    precision = "32-true" if options.cpu or backbone == "resnet32" else options.precision
    base = {"backbone": backbone, "strategy": expression, "precision": precision}
    settings_of: list[tuple[str, int, Any]] = [
        ("one", batch, "auto"), ("same share", batch * group.size, "auto"), ("same batch", batch, "auto"),
        ("one, eager", batch, False), ("same share, eager", batch * group.size, False),
    ]  # fmt: skip
    if options.cpu:
        settings_of = settings_of[:3]
    for name, size, capture in settings_of:
        each = None if name.startswith("one") else group

        def measure(each: Any = each, size: int = size, capture: Any = capture) -> dict[str, Any]:
            # A process that measures alone runs on every device, so that all have the same work.
            return throughput(
                expression, settings, batch=size, device=device, group=each, capture=capture, precision=precision,
                seconds=options.seconds, evaluates=expression == "naive",
            )  # fmt: skip

        attempt({**base, "setting": name, "global_batch": size, "devices": 1 if each is None else group.size}, measure)


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the speed-ups over one device."""
    table = []
    for key in dict.fromkeys((r["backbone"], r["strategy"]) for r in rows if "setting" in r and "rate" in r):
        mine = {r["setting"]: r for r in rows if (r.get("backbone"), r.get("strategy")) == key and "rate" in r}
        one = mine.get("one")
        if one is None:
            continue
        line: dict[str, Any] = {"backbone": key[0], "strategy": key[1], "one": one["rate"]}
        for name, row in mine.items():
            if name != "one":
                line[f"{name} / one"] = round(row["rate"] / one["rate"], 2)
            if "eval" in row and "eval" in one:
                line[f"eval, {name} / one"] = round(row["eval"] / one["eval"], 2)
        table.append(line)
    return table


def main() -> None:
    """Start the processes and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="CPU processes with gloo")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and images")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=5.0, help="time for all of it")
    parser.add_argument("--seconds", type=float, default=1.5, help="time of each measurement")
    parser.add_argument("--only", choices=("all", "checks", "throughput"), default="all")
    parser.add_argument("--backbones", nargs="+", default=["vit_b_16", "resnet32"], choices=sorted(STRATEGIES))
    parser.add_argument("--vit-batch", type=int, default=64)
    parser.add_argument("--resnet-batch", type=int, default=128)
    parser.add_argument("--precision", default="bf16-mixed", help="of vit_b_16")
    parser.add_argument("--data", type=Path, help="cifar100.npz: throughput on real images, not on random ones")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)  # rank, port, file of rows, time of the start
    options = parser.parse_args()
    options.batch = {"vit_b_16": options.vit_batch, "resnet32": options.resnet_batch}
    if options.tiny:
        options.batch = {"vit_b_16": 8, "resnet32": 8}
    warnings.filterwarnings("ignore")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products on CUDA
    logging.getLogger("clframe").setLevel(logging.WARNING)
    if options.worker:
        rank, port, rows, started = options.worker
        options.rows, options.started = Path(rows), float(started)
        work(options, int(rank), int(port), options.devices)
        return
    started, rows = time.time(), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.touch()
        if options.only in ("all", "checks"):
            try:
                rows.append(check_resumption(cuda=not options.cpu, devices=options.devices))
            except Exception as error:
                traceback.print_exc()
                rows.append({"check": "resume", "failed": f"{type(error).__name__}: {error}"})
            rows[-1]["seconds"] = round(time.time() - started, 1)
            print(json.dumps(rows[-1]), flush=True)
        port = _free_port()
        command = [sys.executable, __file__, *sys.argv[1:]]
        workers = [
            subprocess.Popen([*command, "--worker", str(rank), str(port), str(path), str(started)], env=dict(os.environ))
            for rank in range(options.devices)
        ]
        try:
            while any(worker.poll() is None for worker in workers):
                late = time.time() > started + 60 * options.minutes + 30
                if late or any(worker.poll() not in (None, 0) for worker in workers):
                    print("a process has failed or has no time left; the others are ended", file=sys.stderr)
                    break
                time.sleep(0.5)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        rows += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    table = summarize(rows)
    for line in table:
        print(json.dumps(line))
    if options.json:
        report = {
            "command": sys.argv, "torch": str(torch.__version__), "minutes": (time.time() - started) / 60, "rows": rows,
            "speedups": table, "device": "cpu" if options.cpu else torch.cuda.get_device_name(),
        }  # fmt: skip
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
