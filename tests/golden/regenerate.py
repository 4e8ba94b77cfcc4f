"""Golden curves: the loss of ten training steps and the answers after them, for every component, in float64.

    python tests/golden/regenerate.py               # make the missing files, leave the others as they are
    python tests/golden/regenerate.py er lwf        # make these anew, because their numbers were meant to change
    python tests/golden/regenerate.py --all         # make all of them anew

A refactor changes no file; whoever changes numbers on purpose commits the new files and says why. They are the
same on every machine to within rounding, because nothing here is drawn or computed in less than float64.

A file holds, for one exit and for three: ``losses``, the total loss of each step, five in each of two experiences
(ten in the first where the second trains nothing); ``answers``, what each exit answers to one test sample in the
end, one score a class; and ``scores``, those by which the strategy decides.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from lightning import Fabric
from torch import Tensor

import strategies
from clframe.core import COMPONENTS, Composition, compose
from clframe.data import Benchmark, Source, TensorSamples, class_incremental
from clframe.exits import make_head
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(component.name for component in strategies.COMPONENTS))
EXITS = (1, 3)
STEPS = 5
"""Steps of each experience that are kept."""

TOKENS = {"l2p", "moe"}
"""Components that take a vision transformer only, or no exit on the first layer of two."""

MEMORY = 8
"""Samples that whoever keeps a memory keeps of the first experience's ten, so that it has to choose."""

OPTIONS: dict[str, dict[str, Any]] = {
    "early_exit": {"rule": "mean"},
    "exits": {"distill": 0.5, "cascade": True},
    "ranpac": {"projection": 16, "ridges": (1.0,), "train_first": True},  # well conditioned on so few samples
    "simplecil": {"train_first": True},
    "slda": {"shrinkage": 0.1, "train_first": True},
}
"""Where defaults would train nothing, change nothing here, or make numbers that rounding decides."""


def golden(name: str) -> dict[str, Any]:
    """What the file of a component holds, as the code is now: by number of exits, losses and answers."""
    return {str(exits): _curve(name, exits=exits) for exits in EXITS}


def path_of(name: str) -> Path:
    """The file of a component."""
    return FOLDER / f"{name}.json"


def _curve(name: str, *, exits: int) -> dict[str, Any]:
    with _float64():
        torch.manual_seed(1)
        stream = _stream()
        module = ContinualModule(
            _network(name, stream, exits=exits), _strategy(name), optimizer=partial(torch.optim.SGD, lr=0.05), seed=1
        )
        recorder = _Recorder()
        loop = LightningStrategy(
            model=module, benchmark=stream, train_mb_size=4, train_epochs=4, eval_mb_size=4, evaluator=None,
            plugins=[recorder], fabric=Fabric(accelerator="cpu", devices=1, precision="64-true"),
        )  # fmt: skip
        for experience in stream.avalanche.train_stream:
            recorder.begin()
            loop.train(experience)
        module.eval()
        with torch.no_grad():
            x = stream.test[0].prepare(stream.test[0].raw(torch.tensor([0])))
            answers = module.learner.adjust_logits(module.network(x, taps=module.learner.taps))
            scores = module.learner.predict(answers)[0].tolist()
    first, second = recorder.losses
    second = second[:STEPS]
    losses = first[: 2 * STEPS - len(second)] + second
    return {"losses": losses, "answers": [logits_BC[0].tolist() for logits_BC in answers.logits], "scores": scores}


def _stream() -> Benchmark:
    """Two experiences of two classes, made by arithmetic: five samples a class, of 4x4 pixels."""
    y = torch.arange(4).repeat(5)
    pixel = torch.arange(len(y) * 16).reshape(len(y), 1, 4, 4)
    x = ((pixel * 37) % 101).float() / 64 + y.reshape(-1, 1, 1, 1)
    data = _Float64Samples(x, y)
    return class_incremental(Source("arithmetic", data, data, classes=4), experiences=2, order="sorted")


def _network(name: str, stream: Benchmark, *, exits: int) -> Network:
    if name in TOKENS:
        backbone = BACKBONES.get("vit_tiny")(stream.input_shape, patch=2, width=12, depth=2, heads=2)
        heads = [("encoder.0", make_head("token", backbone.tap_shapes["encoder.0"])) for _ in range(exits - 1)]
    else:
        backbone = BACKBONES.get("mlp")(stream.input_shape, width=12)
        heads = [("layer1", GrowingLinear(12)) for _ in range(exits - 1)]
    return Network(backbone, exits=heads)


def _strategy(name: str) -> Composition:
    """The component, with a memory beside it where it needs one."""
    kind = COMPONENTS.get(name)
    options = {"memory": MEMORY} if kind.keeps_memory else {}
    memory = COMPONENTS.get("er")(memory=MEMORY)
    component = kind(**{**options, **OPTIONS.get(name, {})})
    return component + memory if kind.needs_memory else compose(component)


class _Float64Samples(TensorSamples):
    """Samples as a network of float64 takes them."""

    def prepare(self, raw: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The same numbers in float64, which hold them exactly."""
        return super().prepare(raw, generator=generator).double()


class _Recorder(SupervisedPlugin):
    """Keeps the loss of every step, experience by experience."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[list[float]] = []

    def begin(self) -> None:
        """A new experience."""
        self.losses.append([])

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Avalanche's callback."""
        self.losses[-1].append(float(strategy.loss.detach()))


@contextmanager
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def main() -> None:
    """Write the files that are missing or asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="components to make anew")
    parser.add_argument("--all", action="store_true", help="make every file anew")
    options = parser.parse_args()
    for name in options.names or NAMES:
        if options.names or options.all or not path_of(name).exists():
            path_of(name).write_text(json.dumps(golden(name), indent=1, allow_nan=False) + "\n", encoding="utf-8")
            print(path_of(name))


if __name__ == "__main__":
    main()
