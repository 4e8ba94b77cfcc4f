"""Own code by dotted path: only from packages that the command line allows, recorded in the config of the run."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import clframe
from clframe.cli import main
from clframe.cli.run import _without_seeds
from clframe.config.load import load_config
from clframe.errors import ConfigError, Interrupted, UnknownNameError
from clframe.own_code import VARIABLE, allow_imports, import_options, load_own

CODE = '''
from dataclasses import dataclass
from typing import ClassVar
import torch
from torch import nn
from avalanche.core import SupervisedPlugin
from lightning.pytorch.callbacks import Callback
from clframe.core import Component
from clframe.metrics import Metric

SEEN = []

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, width, 3), nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return torch.relu(self.a(x) + self.b(x)).mean((2, 3))

def net(input_shape, *, width: int = 8):
    return Net(width)

class Signs(torch.optim.Optimizer):
    def __init__(self, params, lr: float = 0.1, flip: bool = False):
        super().__init__(params, {"lr": lr, "flip": flip})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad.sign())

class Count(Callback):
    def __init__(self, by: int = 1):
        self.by = by

    def on_train_batch_end(self, *_):
        SEEN.append(self.by)

class Plug(SupervisedPlugin):
    def __init__(self, factor: float = 1.0):
        super().__init__()
        self.factor = factor

    def after_training_exp(self, strategy, **_):
        SEEN.append(self.factor)

@dataclass(frozen=True, kw_only=True)
class Square(Component):
    """Square: a loss."""

    name: ClassVar[str] = "square"
    slots: ClassVar[frozenset[str]] = frozenset({"task_loss"})
    scale: float = 1.0

    def task_loss(self, step, state):
        SEEN.append("loss")
        target = torch.nn.functional.one_hot(step.batch.y, step.output.last.shape[1]).to(step.output.last)
        return torch.stack([self.scale * (logits.softmax(1) - target).square().mean() for logits in step.output.logits])

best = Metric(label="best experience", score=lambda found: 0.625)
'''
RUN = [
    "quickstart", "backbone=own_things.net", "backbone.width=5", "strategy=square + exits", "components.exits.at=[stem]",
    "components.square.scale=2.0", "imports=[own_things.Square, own_things.best]", "optimizer.name=own_things.Signs",
    "optimizer.lr=0.001", "trainer.fast_dev_run=1", "trainer.progress=false", "trainer.engine=trainer",
    "trainer.callbacks={own_things.Count: {by: 7}}", "components.avalanche.plugins=[{own_things.Plug: {factor: 2.5}}]",
    "trainer.loggers=[csv]",
]  # fmt: skip


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A module in the current folder, which is not on the path."""
    (tmp_path / "own_things.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_things", None)
    for registry, name in ((clframe.core.COMPONENTS, "square"), (clframe.metrics.METRICS, "best")):
        registry._entries.pop(name, None)


def test_a_run_with_own_code_needs_the_flag_and_so_does_loading_it(package, capsys):
    assert main(["run", *RUN, "output=runs"]) == 2
    errors = capsys.readouterr().err.splitlines()
    for key, name in (
        ("imports", "Square"), ("backbone.name", "net"), ("optimizer.name", "Signs"), ("trainer.callbacks", "Count"),
        ("components.avalanche.plugins[0]", "Plug"),
    ):  # fmt: skip
        refused = f"clframe: error: {key}: found 'own_things.{name}', code that is not allowed to be imported; "
        assert f"{refused}if you trust it, add --allow-imports own_things" in errors
    assert "own_things" not in sys.modules and not os.path.exists("runs")

    assert main(["run", *RUN, "output=runs", "--quiet", "--allow-imports", "own_things"]) == 0
    seen = sys.modules["own_things"].SEEN
    assert seen.count(7) == 2 and seen.count(2.5) == 1 and "loss" in seen
    assert VARIABLE not in os.environ and str(package) not in sys.path
    (folder,) = (package / "runs" / "quickstart").iterdir()
    text = (folder / "config.yaml").read_text()
    for name in ("Square", "best", "net", "Signs", "Count", "Plug"):
        assert f"own_things.{name}" in text
    with allow_imports(["own_things"]):
        config = load_config(str(folder / "config.yaml"))
    assert config.components["square"] == {"scale": 2.0} and config.backbone.options == {"width": 5}

    clframe.core.COMPONENTS._entries.pop("square")
    with pytest.raises(ConfigError, match="^imports: found 'own_things.Square', code that is not allowed"):
        clframe.load(folder)
    with allow_imports(["own_things"]):
        model = clframe.load(folder)
    assert model.network.backbone.names == ("stem", "output")
    assert model.network(torch.zeros(2, 1, 8, 8)).last.shape == (2, 2)


def test_a_backbone_that_fails_is_refused_in_one_line(package, capsys):
    (package / "own_things_broken.py").write_text(
        "from torch import nn\n\ndef net(input_shape):\n    return nn.Sequential(nn.Flatten(), nn.Linear(5, 3))\n"
    )
    assert main(["run", "quickstart", "backbone=own_things_broken.net", "--allow-imports", "own_things_broken"]) == 2
    assert capsys.readouterr().err.replace("addmm: ", "") == (  # which torch 2.6 does not say
        "clframe: error: backbone: stage '1' fails on inputs of shape (64,) (mat1 and mat2 shapes cannot be "
        "multiplied (2x64 and 5x3)); give stages that accept each other's outputs\n"
    )


def test_what_is_allowed_is_a_package_and_nothing_next_to_it(package):
    (package / "own_things_too.py").write_text("value = 1")
    with allow_imports(["own_things"]):
        with pytest.raises(ConfigError, match="^backbone.name: found 'own_things_too.value', code that is not allowed"):
            load_own("own_things_too.value", where="backbone.name")
        with pytest.raises(UnknownNameError, match=r"^optimizer.name: own_things has no 'Sgns'; did you mean 'own_things.Sig"):
            load_own("own_things.Sgns", where="optimizer.name")
        with pytest.raises(ConfigError, match=r"^imports: found 'own_things.Net', which is neither a component nor a metric"):
            clframe.explain("quickstart", ["imports=[own_things.Net]"])
        with pytest.raises(ConfigError, match=r"^optimizer.name: found 'own_things.Net', which is not a subclass of Opti"):
            clframe.explain("quickstart", ["optimizer.name=own_things.Net"])
        with pytest.raises(ConfigError, match=r"^optimizer.flp: found true, but own_things.Signs has no such option; did"):
            clframe.explain("quickstart", ["optimizer.name=own_things.Signs", "optimizer.flp=true", "optimizer.betas=null"])
    (package / "broken.py").write_text("raise ValueError('no such device')")
    with allow_imports(["broken"]), pytest.raises(ConfigError, match=r"^x: broken cannot be imported \(no such device\)"):
        load_own("broken.net", where="x")
    with pytest.raises(ConfigError, match="^--allow-imports: found 'os;x'; give the name of a package"), allow_imports(["os;x"]):
        pass
    assert clframe.explain("quickstart", [])  # nothing of it is needed elsewhere


def test_the_commands_that_continue_a_run_allow_the_same_packages():
    options = Namespace(jobs="2", output=None, quiet=True, tensorboard=False)
    with allow_imports(["own_a,own_b"]):
        allowed = "--allow-imports own_a --allow-imports own_b"
        assert " ".join(_without_seeds(options, "quickstart", ["a=1"])) == f"clframe run quickstart a=1 --jobs 2 {allowed} --quiet"
        stopped = Interrupted(Path("runs/a b"), options=import_options())
        assert stopped.advice == f"resume with clframe run --resume 'runs/a b' {allowed}"
    assert import_options() == [] and Interrupted(Path("a")).advice == "resume with clframe run --resume a"
