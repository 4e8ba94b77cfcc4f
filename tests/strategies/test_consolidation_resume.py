"""Strategies that hold weights or rows go on from a checkpoint with the same weights, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import clframe

SMALL = ["backbone=mlp", "backbone.width=12", "trainer.epochs=1", "trainer.progress=false", "trainer.batch_size=64",
         "benchmark.classes=6", "benchmark.experiences=3"]  # fmt: skip
STRATEGIES = [
    pytest.param("ewc(samples=40) + exits", marks=pytest.mark.slow),
    "ewc(mode='online', labels='sampled', samples=40) + si + mas(samples=40)",
    "ancl(lr=0.01) + cwr",
    "er + freeze + lwf + wa",
]


class Killed(BaseException):
    """Stands for a power cut: nothing catches it."""


def final_weights(folder: Path):
    (run,) = folder.glob("quickstart/*")
    return run, torch.load(run / "checkpoints" / "experience_003.ckpt", weights_only=True)["network"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resume_after_two_experiences(strategy, tmp_path):
    options = [*SMALL, f"strategy={strategy}"]
    clframe.run("quickstart", options, output=tmp_path / "whole")

    def kill(progress):
        if progress.finished == 2:
            raise Killed

    with pytest.raises(Killed):
        clframe.run("quickstart", options, output=tmp_path / "broken", on_evaluated=kill)
    (run,) = (tmp_path / "broken").glob("quickstart/*")
    clframe.run(resume=run)
    _, whole = final_weights(tmp_path / "whole")
    _, resumed = final_weights(tmp_path / "broken")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
