"""``precision: 16-mixed`` on a CUDA device: gradient scaling with clipping, and steps that the scaler skips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from power_cuts import TINY, assert_same_run, cut_run, without_pictures

import clframe
from clframe.errors import UnsupportedError

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
    too_large(monkeypatch, 2.0**40)
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


def too_large(monkeypatch, scale):
    """Begin with a scale that overflows until it has been halved often enough."""
    scaler = torch.amp.GradScaler.__init__
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", lambda self, *a, **k: scaler(self, *a, **{**k, "init_scale": scale}))


def test_both_engines_skip_count_and_scale_alike(tmp_path, monkeypatch):
    """The scale lasts for the run, so that only the first experience has skipped updates."""
    too_large(monkeypatch, 2.0**30)
    found = {}
    for engine in ("fabric", "trainer"):
        options = [*QUICK, "strategy=er + si", f"trainer.engine={engine}", "trainer.precision=16-mixed", "trainer.deterministic=true"]
        result = clframe.run("quickstart", options, output=tmp_path / engine)
        content = weights(result)
        found[engine] = content["network"], content["precision"]["scale"], tuple(result.skipped_updates)
        first, second = result.skipped_updates
        assert first > 3 and second == 0 and 2.0**30 / content["precision"]["scale"] == 2.0**first
        log = (Path(result.run_folder) / "log.txt").read_text()
        assert f"{first} of " in log and "updates skipped as not finite" in log
    one, other = found["fabric"], found["trainer"]
    assert one[1:] == other[1:]
    assert all(torch.equal(value, other[0][name]) for name, value in one[0].items())


@pytest.mark.parametrize("engine", ["fabric", "trainer"])
def test_accumulated_and_clipped_gradients_are_those_of_full_precision(engine, tmp_path):
    networks = []
    for precision in ("32-true", "16-mixed"):
        options = [*QUICK, "strategy=er", "trainer.accumulate=2", "trainer.gradient_clip=0.5", f"trainer.engine={engine}",
                   "optimizer={name: sgd, lr: 0.05}", f"trainer.precision={precision}"]  # fmt: skip
        networks.append(weights(clframe.run("quickstart", options, output=tmp_path / precision))["network"])
    for name, value in networks[0].items():
        torch.testing.assert_close(networks[1][name].cpu(), value.cpu(), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("engine", ["fabric", "trainer"])
def test_a_run_stopped_at_any_instant_ends_as_if_it_had_not_been(engine, tmp_path, monkeypatch):
    too_large(monkeypatch, 2.0**28)
    patch = without_pictures()
    options = [*TINY, "strategy=er(memory=20) + si", "trainer.precision=16-mixed", f"trainer.engine={engine}",
               "trainer.accelerator=gpu", "trainer.deterministic=true"]  # fmt: skip
    try:
        whole, copies = cut_run(options, tmp_path, cuts=4, seed=engine)
        for _, folder in copies:
            clframe.run(resume=folder)
            assert_same_run(whole, folder, sizes=False)
    finally:
        patch.undo()


def test_steps_with_a_scaler_are_not_recorded(tmp_path, caplog):
    options = [*QUICK, "strategy=naive", "benchmark.experiences=1", "trainer.precision=16-mixed"]
    with caplog.at_level("INFO", logger="clframe"):
        clframe.run("quickstart", options, output=tmp_path)
    assert "one kernel at a time: the loss scaler of 16-mixed decides on the host" in caplog.text
    with pytest.raises(UnsupportedError, match="trainer.capture: found true, but the loss scaler of 16-mixed decides on the host"):
        clframe.run("quickstart", [*options, "trainer.capture=true"], output=tmp_path)
