"""Training steps with compiled stages, alone and inside of CUDA graphs, against uncompiled ones.

    python perf/compiled_stages.py --json compiled.json                   # on CUDA: ResNet32 and a ViT, both precisions
    python perf/compiled_stages.py --backbones small_cnn --images 640     # on a CPU

Two experiences of random images (3x32x32, batches of 128) that stay in memory; rates are of the second one after its first epoch, in
new samples a second. "compile" is the seconds that compiling took, and the graphs of each experience: none in the second.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clframe.core import parse
from clframe.data import Source, TensorSamples, class_incremental
from clframe.nn import BACKBONES, Network
from clframe.seeding import torch_settings
from clframe.training.launch import _fabric
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy

BATCH, CLASSES = 128, 10
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9, fused=True)
OPTIONS: dict[str, dict[str, Any]] = {"vit_tiny": {"patch": 4, "width": 192, "depth": 6, "heads": 3}}


def benchmark(images: int) -> Any:
    """Random images of two experiences."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (2 * images, 3, 32, 32), generator=generator, dtype=torch.uint8)
    y = torch.arange(2 * images) % (2 * CLASSES)
    train, test = (TensorSamples(part, y[: len(part)], mean=(125.0,), std=(63.0,)) for part in (x, x[:200]))
    return class_incremental(Source("random", train, test, classes=2 * CLASSES), experiences=2, order="sorted")


def measure(expression: str, backbone: str, *, precision: str, compile: bool, capture: bool, images: int, epochs: int) -> dict[str, Any]:
    """Train two experiences; rate of the second one, and what was compiled."""
    cuda = torch.cuda.is_available()
    data = benchmark(images)
    torch.manual_seed(0)
    torch._dynamo.reset()
    network = Network(BACKBONES.get(backbone)(data.input_shape, **OPTIONS.get(backbone, {})))
    module = ContinualModule(network, parse(expression), optimizer=SGD, seed=0, on_nonfinite="warn")
    loop = LightningStrategy(
        model=module, benchmark=data, fabric=_fabric("cuda" if cuda else "cpu", 1, precision), channels_last=cuda, train_mb_size=BATCH,
        train_epochs=epochs, eval_mb_size=512, evaluator=None, compile=compile, capture="auto" if capture else False,
    )  # fmt: skip
    graphs, seconds, start, new = [], 0.0, 0.0, 0
    wait: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None

    def count(strategy: Any) -> None:
        nonlocal start, new
        epoch, number = int(strategy.clock.train_exp_epochs), int(strategy.clock.train_epoch_iterations)
        if epoch == 1 and number == 1:
            wait()
            start, new = time.perf_counter(), 0
        elif epoch >= 1:
            new += min(BATCH, images - BATCH * (number - 1))

    for index, experience in enumerate(data.avalanche.train_stream):
        loop.on_step = count if index else None
        loop.train(experience)
        if index:
            wait()
            rate = new / (time.perf_counter() - start)
        found = (0, 0.0) if loop.stages is None else loop.stages.take()
        graphs.append(found[0])
        seconds += found[1]
    recorded = 0 if loop.step_capture is None else loop.step_capture.recorded
    return {"rate": rate, "graphs": graphs, "compile_seconds": seconds, "recorded": recorded}


def main() -> None:
    """Print one line for each backbone, precision and mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["resnet32", "vit_tiny"])
    parser.add_argument("--precisions", nargs="+", default=["32-true", "bf16-mixed"])
    parser.add_argument("--strategy", default="er(memory=2000) + lwf")
    parser.add_argument("--images", type=int, default=5120, help="of an experience")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further measurement after this time")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    cuda, begun, rows = torch.cuda.is_available(), time.perf_counter(), []
    modes = [(False, False), (True, False), *([(False, True), (True, True)] if cuda else [])]
    for backbone in given.backbones:
        for precision in given.precisions:
            for compile, capture in modes:
                if time.perf_counter() - begun > given.seconds:
                    break
                with torch_settings(deterministic=False, cuda=cuda):
                    found = measure(given.strategy, backbone, precision=precision, compile=compile, capture=capture,
                                    images=given.images, epochs=given.epochs)  # fmt: skip
                rows.append({"backbone": backbone, "precision": precision, "compile": compile, "capture": capture, **found})
                name = " + ".join(word for word, used in (("compiled", compile), ("captured", capture)) if used) or "eager"
                print(f"{backbone:10} {precision:10} {name:20} {found['rate']:9,.0f} samples/s  compile {found['compile_seconds']:.1f} s "
                      f"{found['graphs']}  recorded {found['recorded']}", flush=True)  # fmt: skip
                if given.json is not None:
                    given.json.write_text(json.dumps({"torch": str(torch.__version__), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
