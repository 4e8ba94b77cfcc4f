"""Whole runs of the replay family: they resume bit-identically, and their presets are what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import clframe
from clframe.config.load import load_config
from clframe.core import parse
from clframe.training.monitor import Monitor

SMALL = ["backbone=mlp", "backbone.width=8", "trainer.epochs=1", "trainer.progress=false", "trainer.loggers=[csv]",
         "benchmark.classes=6", "benchmark.experiences=3", "benchmark.test_fraction=0.6"]  # fmt: skip

EXITS = "exits(at=['layer1'])"


class Killed(BaseException):
    """Stands for a power cut: nothing catches it."""


@pytest.mark.parametrize(
    "strategy",
    [
        f"derpp(memory=40) + {EXITS}",
        "er(memory=40, replay='concatenate') + er_ace",
        # The states of these round-trip in tests/conformance, and tests/training/test_resume_inside.py resumes der.
        *(pytest.param(strategy, marks=pytest.mark.slow) for strategy in (
            "gdumb(memory=40)", "mir(memory=40)", "der(memory=40, selection='herding')", f"agem(memory=40, sample=8) + {EXITS}",
            f"der(memory=40, update='step') + {EXITS}", "gss(memory=40)",
        )),
    ],
)
def test_a_broken_run_ends_as_a_whole_one(strategy, tmp_path, monkeypatch):
    options = [*SMALL, f"strategy={strategy}", "seed=1"]
    whole = clframe.run("quickstart", options, output=tmp_path / "whole")
    original, limit = Monitor.on_step, iter(range(1, 10_000))
    stop = int(whole.steps * 0.7)

    def on_step(self, learner):
        original(self, learner)
        if next(limit) == stop:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "on_step", on_step)
        with pytest.raises(Killed):
            clframe.run("quickstart", options, output=tmp_path / "broken")
    (folder,) = (tmp_path / "broken").glob("quickstart/*")
    torch.rand(3)
    resumed = clframe.run(resume=folder)
    assert resumed.accuracy_matrix == whole.accuracy_matrix and resumed.loss_terms == whole.loss_terms
    saved = [torch.load(Path(r.run_folder) / "checkpoints" / "experience_003.ckpt") for r in (whole, resumed)]
    a, b = (content["network"] for content in saved)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "preset, name, options",
    [
        ("ft_memory", "er", {"memory": 2000, "selection": "random", "replay": "concatenate"}),
        ("er", "er", {"memory": 2000, "selection": "balanced", "replay": "half"}),
        ("er_paper", "er", {"memory": 2000, "selection": "random", "replay": "half"}),
        ("gdumb", "gdumb", {"memory": 2000, "restart": "every"}),
        ("gdumb_paper", "gdumb", {"memory": 2000, "restart": "never"}),
        ("der", "der", {"alpha": 0.3, "columns": "padded", "selection": "reservoir"}),
        ("derpp", "derpp", {"alpha": 0.2, "beta": 0.5, "draws": "two", "selection": "reservoir"}),
        ("derpp_paper", "derpp", {"alpha": 0.5, "beta": 0.5, "draws": "two", "memory": 2000, "selection": "random"}),
        ("er_ace", "er_ace", {"over": "batch", "rehearse": "all"}),
        ("agem", "agem", {"memory": 2000, "sample": 256}),
    ],
)
def test_presets(preset, name, options):
    config = load_config("quickstart", [f"strategy=strategy/{preset}"])
    composition = parse(config.strategy, config.components)
    composition.check_needs()
    (component,) = (c for c in composition if c.name == name)
    assert {option: getattr(component, option) for option in options} == options
