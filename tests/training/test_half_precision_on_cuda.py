"""``precision: 16-mixed`` on a CUDA device: gradient scaling with clipping, and steps that the scaler skips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import clframe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

QUICK = [
    "benchmark.experiences=2", "trainer.epochs=3", "trainer.accelerator=gpu", "trainer.loggers=[]", "trainer.progress=false",
    "backbone=mlp",
]  # fmt: skip


def weights(result):
    return torch.load(sorted((Path(result.run_folder) / "checkpoints").glob("*.ckpt"))[-1], weights_only=True)


def test_clipping_acts_on_gradients_without_the_loss_scale(tmp_path):
    """Clipped while still multiplied by 65,536, weights would hardly move: 20.9 instead of 98.2 % on digits."""
    options = [*QUICK, "strategy=naive", "benchmark.experiences=1", "optimizer={name: sgd, lr: 0.1}", "trainer.gradient_clip=1.0"]
    networks = {}
    for engine in ("fabric", "trainer"):
        for precision in ("32-true", "16-mixed"):
            given = [*options, f"trainer.engine={engine}", f"trainer.precision={precision}"]
            result = clframe.run("quickstart", given, output=tmp_path / engine / precision)
            networks[engine, precision] = weights(result)["network"]
            assert result.metrics["final_average_accuracy"] > 0.8
    for name, expected in networks["fabric", "32-true"].items():
        for network in networks.values():
            torch.testing.assert_close(network[name].cpu(), expected.cpu(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("strategy", ["si", "ewc", "mas", "agem", "er + exits + lwf", "er + sparsity"])
@pytest.mark.parametrize("engine", ["fabric", "trainer"])
def test_steps_that_the_scaler_skips_leave_states_finite(strategy, engine, tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler.__init__

    def too_large(self, *args, **kwargs):
        scaler(self, *args, **{**kwargs, "init_scale": 2.0**40})  # overflows until it has been halved often enough

    monkeypatch.setattr(torch.amp.GradScaler, "__init__", too_large)
    options = [*QUICK, f"strategy={strategy}", f"trainer.engine={engine}", "trainer.precision=16-mixed"]
    result = clframe.run("quickstart", options, output=tmp_path)
    assert result.metrics["final_average_accuracy"] > 0.2

    def check(value):
        if isinstance(value, dict):
            for item in value.values():
                check(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                check(item)
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            assert torch.isfinite(value).all()

    content = weights(result)
    check(content["network"])
    check(content["components"])
