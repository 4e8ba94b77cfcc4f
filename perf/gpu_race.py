"""The GPU race: training steps of clframe, captured as CUDA graphs and eager, against loops written by hand.

    python perf/gpu_race.py                       # ResNet32 on 3x32x32, batch 128, both precisions, every strategy
    python perf/gpu_race.py --only er "er + exits"
    python perf/gpu_race.py --json race.json

One experience of 5,000 uint8 images that stay on the GPU, with random crops and mirrors; rates are of the second
experience, so that there are teachers, penalties and a full memory. Columns, in new samples a second:

graph       the recorded step alone, replayed on one batch: network, all losses, backward, update
captured    whole steps with ``trainer.capture: auto``, from loading to the update, after the first two epochs
eager       the same with ``trainer.capture: false``

All three of a row are measured in one process after each other, three times; the medians are printed. The loops by hand
train the same network with the same optimizer, without replay, augmentation or logs.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from clframe.core import parse
from clframe.data import Source, TensorSamples, class_incremental
from clframe.data.augmentation import AUGMENTATIONS
from clframe.nn import BACKBONES, Network
from clframe.seeding import torch_settings
from clframe.training.launch import _fabric
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy

IMAGES, CLASSES, BATCH = 5_000, 10, 128
MEAN, STD = (125.0,), (63.0,)
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9, fused=True)
ER = "er(memory=2000)"
STRATEGIES = (
    "naive", ER, f"{ER} + exits", f"{ER} + lwf", f"{ER} + exits + lwf", "derpp(memory=2000)", "der(memory=2000)", "ewc",
    "si", "mas", f"{ER} + er_ace", f"{ER} + ssil", f"{ER} + exits + sparsity", f"{ER} + lode", "bic(memory=2000)",
    f"{ER} + icarl", f"{ER} + podnet", f"{ER} + lucir", f"{ER} + ancl", f"{ER} + label_smoothing",
)  # fmt: skip


def benchmark(experiences: int = 2) -> Any:
    """Random images of as many classes an experience."""
    generator = torch.Generator().manual_seed(0)
    count, classes = IMAGES * experiences, CLASSES * experiences
    x = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    y = torch.arange(count) % classes
    train = TensorSamples(x, y, mean=MEAN, std=STD, augment=AUGMENTATIONS.get("cifar"))
    test = TensorSamples(x[:200], y[:200], mean=MEAN, std=STD)
    return class_incremental(Source("noise", train, test, classes=classes), experiences=experiences, order="sorted")


class Clock:
    """Times whole steps from the third epoch on, and the recorded step alone at the end."""

    def __init__(self, epochs: int) -> None:
        self.epochs, self.rate, self.graph, self.batches = epochs, 0.0, 0.0, 0.0
        self.recorded, self.seconds = 0, 0.0
        self._start, self._new, self._preparing = 0.0, 0, 0.0

    def watch(self, strategy: Any) -> None:
        """Follow the steps of the strategy's next experience."""
        strategy.on_step = self._after_step
        make = strategy.learner.make_batch

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            batch = make(*args, **kwargs)
            self._preparing += time.perf_counter() - start
            self._new += len(args[1])
            return batch

        strategy.learner.make_batch = timed

    def _after_step(self, strategy: Any) -> None:
        clock, batches = strategy.clock, strategy._count_batches()
        epoch, number = int(clock.train_exp_epochs), int(clock.train_epoch_iterations)
        if epoch == 2 and number == 1:
            torch.cuda.synchronize()
            self._start, self._new, self._preparing, self._steps = time.perf_counter(), 0, 0.0, 0
            return
        if epoch < 2:
            return
        self._steps += 1
        if epoch + 1 == self.epochs and number == batches:
            torch.cuda.synchronize()
            self.rate = self._new / (time.perf_counter() - self._start)
            self.batches = 1e3 * self._preparing / self._steps
            self._time_graph(strategy, self._new / self._steps)

    def _time_graph(self, strategy: Any, new: float) -> None:
        recordings = list(strategy.step_capture._recordings.values()) if strategy.step_capture is not None else []
        if recordings:
            largest = max(recordings, key=lambda recording: len(recording.batch.y))
            full = BATCH / 2 if new < 0.6 * BATCH else BATCH
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                largest.replay()
            torch.cuda.synchronize()
            self.graph = 100 * full / (time.perf_counter() - start)


def rate_of(expression: str, *, precision: str, capture: Any, epochs: int, backbone: str) -> Clock:
    """Train two experiences; the rates of the second one."""
    data = benchmark()
    torch.manual_seed(0)
    module = ContinualModule(
        Network(BACKBONES.get(backbone)(data.input_shape)), parse(expression), optimizer=SGD, seed=0,
        on_nonfinite="warn",
    )  # fmt: skip
    strategy = LightningStrategy(
        model=module, benchmark=data, fabric=_fabric("cuda", 1, precision), channels_last=True, capture=capture,
        train_mb_size=BATCH, train_epochs=epochs, eval_mb_size=512, evaluator=None,
    )  # fmt: skip
    clock = Clock(epochs)
    first, second = data.avalanche.train_stream
    strategy.train(first)
    clock.watch(strategy)
    strategy.train(second)
    if strategy.step_capture is not None:
        clock.recorded, clock.seconds = strategy.step_capture.recorded, strategy.step_capture.seconds
    return clock


def by_hand(*, precision: str, captured: bool, backbone: str, steps: int = 200) -> float:
    """New samples a second of a loop over one batch: forward, cross-entropy, backward, fused SGD."""
    device = torch.device("cuda")
    network = Network(BACKBONES.get(backbone)((3, 32, 32)))
    network.grow(range(CLASSES))
    network.to(device).to(memory_format=torch.channels_last)
    optimizer = SGD(network.parameters())
    x = torch.randn(BATCH, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(CLASSES, (BATCH,), device=device)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision.startswith("bf16")):
            logits = network(x).last
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(5):
            optimizer.zero_grad()
            step()
    torch.cuda.current_stream().wait_stream(side)
    run = step
    if captured:
        graph = torch.cuda.CUDAGraph()
        optimizer.zero_grad()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        if not captured:
            optimizer.zero_grad()
        run()
    torch.cuda.synchronize()
    return steps * BATCH / (time.perf_counter() - start)


def avalanche(backbone: str, *, epochs: int = 4) -> float:
    """New samples a second of Avalanche's Naive with 8 workers on images in memory."""
    from avalanche.benchmarks import nc_benchmark
    from avalanche.training import Naive
    from torch.utils.data import TensorDataset
    from torchvision import transforms

    data = benchmark(1).train[0]
    images = TensorDataset(data.x, data.y)
    images.targets = data.y.tolist()  # type: ignore[attr-defined]
    augment = transforms.Compose([
        transforms.ToPILImage(), transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3),
    ])  # fmt: skip
    stream = nc_benchmark(images, images, 1, task_labels=False, train_transform=augment, eval_transform=augment)
    network = Network(BACKBONES.get(backbone)((3, 32, 32)))
    network.grow(range(CLASSES))

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x).last  # type: ignore[no-any-return]

    model = Plain().cuda()
    loop = Naive(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        criterion=torch.nn.CrossEntropyLoss(), train_mb_size=BATCH, train_epochs=epochs, device="cuda", evaluator=None,
    )  # fmt: skip
    start = time.perf_counter()
    loop.train(stream.train_stream[0], num_workers=8)
    torch.cuda.synchronize()
    return epochs * IMAGES / (time.perf_counter() - start)


def main() -> None:
    """Race, and print a table as each row ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=STRATEGIES, help="strategies to race")
    parser.add_argument("--precision", nargs="+", default=["32-true", "bf16-mixed"])
    parser.add_argument("--backbone", default="resnet32")
    parser.add_argument("--epochs", type=int, default=6, help="of each experience, at least 4")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peers", action="store_true", help="race the loops by hand and Avalanche too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("clframe").setLevel(logging.INFO)
    logging.basicConfig(format="  %(message)s")
    rows: list[dict[str, Any]] = []
    with torch_settings(threads=4, deterministic=False, cuda=True):
        for precision in options.precision:
            if options.peers:
                for captured in (False, True):
                    rate = statistics.median(
                        by_hand(precision=precision, captured=captured, backbone=options.backbone)
                        for _ in range(options.repeat)
                    )
                    name = f"by hand, {'captured' if captured else 'eager'}"
                    rows.append({"strategy": name, "precision": precision, "rate": round(rate)})
                    print(f"{name:60} {precision:10} {rate:10,.0f}", flush=True)
            for expression in options.only:
                found: dict[str, list[float]] = {"graph": [], "captured": [], "eager": [], "prepare_ms": []}
                graphs = seconds = 0.0
                try:
                    for _ in range(options.repeat):
                        for name, capture in (("captured", "auto"), ("eager", False)):
                            clock = rate_of(expression, precision=precision, capture=capture, epochs=options.epochs,
                                            backbone=options.backbone)  # fmt: skip
                            found[name].append(clock.rate)
                            if name == "captured":
                                found["graph"].append(clock.graph)
                                found["prepare_ms"].append(clock.batches)
                                graphs, seconds = clock.recorded, clock.seconds
                except Exception as error:  # one strategy that fails must not hide the others
                    print(f"{expression:60} {precision:10} failed: {type(error).__name__}: {error}", flush=True)
                    continue
                row: dict[str, Any] = {name: statistics.median(values) for name, values in found.items()}
                rows.append({"strategy": expression, "precision": precision, "graphs": graphs, "record_s": seconds, **row})
                print(
                    f"{expression:60} {precision:10} graph {row['graph']:8,.0f} captured {row['captured']:8,.0f} eager "
                    f"{row['eager']:8,.0f}  of graph {row['captured'] / max(row['graph'], 1):.2f}  of eager "
                    f"{row['captured'] / row['eager']:.2f}  batch {row['prepare_ms']:.2f} ms  {graphs} graphs {seconds:.2f} s",
                    flush=True,
                )
        if options.peers:
            rate = statistics.median(avalanche(options.backbone) for _ in range(2))
            rows.append({"strategy": "Avalanche Naive, 8 workers", "precision": "32-true", "rate": round(rate)})
            print(f"Avalanche Naive, 8 workers {rate:,.0f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
