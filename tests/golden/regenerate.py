"""Golden curves: loss and gradient norm of ten training steps and the logits after them, for every component, in float64.

    python tests/golden/regenerate.py               # write the missing files, leave the others unchanged
    python tests/golden/regenerate.py er lwf        # rewrite these, because their numbers were meant to change
    python tests/golden/regenerate.py --all         # rewrite all of them

A refactor changes no file; a change of numbers that is meant comes with the new files and a reason. The numbers agree to
rounding on every machine and every release of torch that clframe supports: everything is drawn and computed in float64,
and nothing is drawn by functions whose algorithm differs between releases (``trunc_normal_``, ``dropout``,
``multinomial`` without replacement, ``randint`` over 2**28 values or more).

A file contains, for one exit and for three: ``losses``, the total loss of each step, five in each of two experiences (ten
in the first where the second trains nothing); ``gradients``, the norm of the gradient that each of these steps applies;
``answers``, the logits of each exit for one test sample at the end; and ``scores``, those that the prediction uses.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from avalanche.core import SupervisedPlugin
from lightning import Fabric
from torch import Tensor, nn

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

TOKENS = {"l2p", "lora", "moe"}
"""Components that refuse a small MLP, or an exit on the first layer of two."""

MEMORY = 8
"""Buffer size: less than the ten samples of the first experience, so that samples have to be selected."""

OPTIONS: dict[str, dict[str, Any]] = {
    "early_exit": {"rule": "mean"},
    "exits": {"distill": 0.5, "cascade": True},
    "ranpac": {"projection": 16, "ridges": (1.0,), "train_first": True},  # well conditioned on so few samples
    "simplecil": {"train_first": True},
    "slda": {"shrinkage": 0.1, "train_first": True},
}
"""Options other than the defaults, which would train nothing, change nothing here, or amplify rounding."""


def golden(name: str) -> dict[str, Any]:
    """Compute the contents of a component's file with the current code."""
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
    return {
        "losses": _ten_steps(recorder.losses),
        "gradients": _ten_steps(recorder.gradients),
        "answers": [logits_BC[0].tolist() for logits_BC in answers.logits],
        "scores": scores,
    }


def _ten_steps(experiences: list[list[float]]) -> list[float]:
    """Return the first five values of both experiences, or ten of the first if the second has none."""
    first, second = experiences[0], experiences[1][:STEPS]
    return first[: 2 * STEPS - len(second)] + second


def _stream() -> Benchmark:
    """Two experiences of two classes, made by arithmetic: five samples per class, of 4x4 pixels."""
    y = torch.arange(4).repeat(5)
    pixel = torch.arange(len(y) * 16).reshape(len(y), 1, 4, 4)
    x = ((pixel * 37) % 101).float() / 64 + y.reshape(-1, 1, 1, 1)
    data = _Float64Samples(x, y)
    return class_incremental(Source("arithmetic", data, data, classes=4), experiences=2, order="sorted")


def _network(name: str, stream: Benchmark, *, exits: int) -> Network:
    if name in TOKENS:
        backbone = BACKBONES.get("vit_tiny")(stream.input_shape, patch=2, width=12, depth=2, heads=2)
        _draw_with_numpy(backbone)
        heads = [("encoder.0", make_head("token", backbone.tap_shapes["encoder.0"])) for _ in range(exits - 1)]
    else:
        backbone = BACKBONES.get("mlp")(stream.input_shape, width=12)
        heads = [("layer1", GrowingLinear(12)) for _ in range(exits - 1)]
    return Network(backbone, exits=heads)


def _draw_with_numpy(module: nn.Module) -> None:
    """Replace the initial weights by draws of numpy's frozen generator, in the range of torch's defaults.

    ``trunc_normal_``, which initializes the patch embedding, draws other numbers in other releases of torch.
    """
    generator = np.random.RandomState(1)
    with torch.no_grad():
        for _, value in sorted(module.named_parameters()):
            if value.ndim > 1:
                bound = value[0].numel() ** -0.5
                value.copy_(torch.from_numpy(generator.uniform(-bound, bound, size=tuple(value.shape))))


def _strategy(name: str) -> Composition:
    """Compose the component, with a buffer if it needs another component's."""
    kind = COMPONENTS.get(name)
    options = {"memory": MEMORY} if kind.keeps_memory else {}
    memory = COMPONENTS.get("er")(memory=MEMORY)
    component = kind(**{**options, **OPTIONS.get(name, {})})
    return component + memory if kind.needs_memory else compose(component)


class _Float64Samples(TensorSamples):
    """Samples whose inputs are float64."""

    def prepare(self, raw: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Convert to float64, which is exact."""
        return super().prepare(raw, generator=generator).double()


class _Recorder(SupervisedPlugin):
    """Records the loss and the norm of the gradient of every step, by experience."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[list[float]] = []
        self.gradients: list[list[float]] = []

    def begin(self) -> None:
        """Start a new experience."""
        self.losses.append([])
        self.gradients.append([])

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Avalanche's callback."""
        self.losses[-1].append(float(strategy.loss.detach()))

    def before_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Avalanche's callback, after components have modified the gradient."""
        squares = [value.grad.square().sum() for value in strategy.model.parameters() if value.grad is not None]
        self.gradients[-1].append(float(torch.stack(squares).sum().sqrt()))


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
    parser.add_argument("names", nargs="*", metavar="NAME", help="components whose files are rewritten")
    parser.add_argument("--all", action="store_true", help="rewrite every file")
    options = parser.parse_args()
    for name in options.names or NAMES:
        if options.names or options.all or not path_of(name).exists():
            path_of(name).write_text(json.dumps(golden(name), indent=1, allow_nan=False) + "\n", encoding="utf-8")
            print(path_of(name))


if __name__ == "__main__":
    main()
