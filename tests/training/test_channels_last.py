"""``trainer.channels_last``: the same numbers from another layout of memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sampled import sampled

import clframe
from clframe.data.avalanche import import_avalanche
from clframe.errors import UnsupportedError

import_avalanche()

from clframe.training.strategy import LightningStrategy


@pytest.fixture
def arguments(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (48, 3, 8, 8), dtype=np.uint8), np.arange(48) % 4
    x[np.arange(48), y % 3, :, :4] //= 8  # something to learn
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    return [
        "benchmark=npz", f"benchmark.path={tmp_path / 'mine.npz'}", "benchmark.experiences=2", "backbone=resnet20",
        "backbone.width=8", "strategy=er(memory=8) + lwf", "optimizer.name=sgd", "optimizer.lr=0.01", "trainer.epochs=2", "trainer.batch_size=7",
        "trainer.loggers=[csv]", "trainer.progress=false",
    ]  # fmt: skip


def weights(run_folder):
    file = Path(run_folder) / "checkpoints" / "experience_002.ckpt"
    return torch.load(file, weights_only=True)["network"]


# 28 steps amplify the rounding of bfloat16 (0.004): 0.01 with AVX2 kernels, 0.03 with those for SSE.
@pytest.mark.parametrize(
    "engine, precision, tolerance", sampled(["fabric", "trainer"], [("32-true", 1e-4), ("bf16-mixed", 0.06)])
)
def test_steps_and_evaluations_have_channels_last_and_end_the_same(
    arguments, tmp_path, monkeypatch, engine, precision, tolerance
):
    seen = []
    forward = LightningStrategy.forward

    def watched(self, **kwargs):
        convolutions = [m.weight for m in self.module.modules() if isinstance(m, torch.nn.Conv2d)]
        last = {x.is_contiguous(memory_format=torch.channels_last) for x in [self.mb_x, *convolutions]}
        seen.append((self.is_training, last))
        return forward(self, **kwargs)

    monkeypatch.setattr(LightningStrategy, "forward", watched)
    options = [*arguments, f"trainer.engine={engine}", f"trainer.precision={precision}"]
    first = clframe.run("quickstart", [*options, "trainer.channels_last=true"], output=tmp_path / "last")
    assert {training for training, _ in seen} == {True, False}
    assert all(last == {True} for _, last in seen)
    seen.clear()
    second = clframe.run("quickstart", options, output=tmp_path / "first")
    assert all(False in last for _, last in seen)
    one, other = weights(first.run_folder), weights(second.run_folder)
    for name, value in one.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance)


def test_a_run_that_broke_off_ends_bit_identical(arguments, tmp_path):
    class Killed(BaseException):
        pass

    def kill(progress):
        raise Killed

    options = [*arguments, "trainer.channels_last=true"]
    whole = clframe.run("quickstart", options, output=tmp_path / "whole")
    with pytest.raises(Killed):
        clframe.run("quickstart", options, output=tmp_path / "broken", on_evaluated=kill)
    (folder,) = (tmp_path / "broken").glob("quickstart/*")
    resumed = weights(clframe.run(resume=folder).run_folder)
    for name, value in weights(whole.run_folder).items():
        assert torch.equal(value, resumed[name]), name


def test_vectors_have_no_channels_to_put_last(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "v.npz", x=rng.normal(size=(24, 5)).astype(np.float32), y=np.arange(24) % 4)
    options = [
        "benchmark=npz", f"benchmark.path={tmp_path / 'v.npz'}", "benchmark.experiences=2", "backbone=mlp",
        "backbone.width=4", "trainer.epochs=1", "trainer.loggers=[csv]", "trainer.progress=false",
    ]  # fmt: skip
    plain = clframe.run("quickstart", options, output=tmp_path / "a")
    last = clframe.run("quickstart", [*options, "trainer.channels_last=true"], output=tmp_path / "b")
    for name, value in weights(plain.run_folder).items():
        assert torch.equal(value, weights(last.run_folder)[name])


def test_a_convolution_that_crashes_on_a_cpu_is_refused(arguments, tmp_path):
    """oneDNN corrupts memory in the gradient of a strided 1x1 convolution with fewer than 8 input channels."""
    options = [*arguments, "backbone.width=4", "trainer.channels_last=true"]
    with pytest.raises(UnsupportedError, match=r"channels_last: found the strided 1x1 convolution .* 4 input channels"):
        clframe.run("quickstart", options, output=tmp_path)
