"""Extensions that are refused: one line that says why, and no folder is left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from extended_runs import digits_part_registered, more, part_of_digits, train, train_parent
from torch import Tensor

from clframe.api import extend
from clframe.data import Source, TensorSamples
from clframe.errors import ClframeError, DataError, RunFolderError, UnsupportedError
from clframe.results import Result


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    with digits_part_registered():
        yield


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return train_parent(tmp_path_factory.mktemp("parent"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "extend: found no new data; give them, such as benchmark=image_folder benchmark.path=new_photos"),
        ([*more(4), "backbone.width=8"], "backbone.width is part of what the run has learned and stays"),
        ([*more(4), "strategy=naive"], "strategy is part of what the run has learned and stays"),
        ([*more(4), "components.er.memory=3"], "components.er.memory is part of what the run has learned and stays"),
        ([*more(4), "seed=3"], "seed is part of what the run has learned and stays"),
        ([*more(4), "earlier=[]"], "earlier is part of what the run has learned and stays"),
        ([*more(4), "benchmark.protocol=task_incremental"], "benchmark.protocol: found task_incremental, but the stream"),
        ([*more(4), "benchmark.online=8"], "benchmark.online: found 8, but the stream of the run has None"),
        ([*more(4), "benchmark.validation=0.2"], "benchmark.validation: found 0.2, unlike the data before; give 0"),
        ([*more(4), "trainer.epoch=3"], "did you mean 'trainer.epochs'"),
        ([*more(4), "benchmark.experiences=2"], "benchmark.experiences: found 2 for 1 class; give at most 1"),
        ([*more(4), "benchmark.names=[' 3']"], "found the class ' 3', but the run knows '3'; name it '3' if"),
        (["benchmark=digits_part", "benchmark.only=[4]", "benchmark.names=['03']"], "found the class '03', but the run"),
    ],
)  # fmt: skip
def test_bad_overrides(tmp_path: Path, parent: Result, overrides: list[str], message: str) -> None:
    with pytest.raises(ClframeError) as refused:
        extend(parent.run_folder, overrides, output=tmp_path)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def other_inputs(x: Tensor, **inputs: Any) -> Source:
    source = part_of_digits(only=(4,))
    samples = TensorSamples(x, torch.zeros(len(x), dtype=torch.long))
    return replace(source, train=samples, test=samples, inputs=replace(source.inputs, **inputs))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (other_inputs(torch.zeros(4, 3, 8, 8, dtype=torch.uint8)), "found inputs of shape 3 x 8 x 8, but the run was"),
        (other_inputs(torch.zeros(4, 1, 8, 8)), "found inputs of type float32, but the run was trained on uint8"),
        (other_inputs(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), largest=255), "images with a largest value of 255"),
    ],
)
def test_inputs_that_mean_something_else(tmp_path: Path, parent: Result, source: Source, message: str) -> None:
    with pytest.raises(DataError) as refused:
        extend(parent.run_folder, source, output=tmp_path)
    assert message in str(refused.value)


def test_runs_that_cannot_be_extended(tmp_path: Path, parent: Result) -> None:
    import shutil

    with pytest.raises(RunFolderError, match=r"^extend: no folder "):
        extend(tmp_path / "nothing", more(4))
    copied = tmp_path / "copied"
    shutil.copytree(parent.run_folder, copied)
    (copied / "results.json").rename(copied / "kept.json")
    with pytest.raises(RunFolderError, match=r": is not finished; finish it first with clframe run --resume "):
        extend(copied, more(4))
    (copied / "kept.json").rename(copied / "results.json")
    (copied / "checkpoints" / "experience_002.ckpt").unlink()
    with pytest.raises(RunFolderError, match=r": its newest checkpoint is of experience 1 of 2; restore the last one"):
        extend(copied, more(4))
    (copied / "checkpoints" / "experience_001.ckpt").unlink()
    with pytest.raises(RunFolderError, match=r": has no checkpoint yet"):
        extend(copied, more(4))


def test_strategies_that_depend_on_the_end_of_the_stream(tmp_path: Path) -> None:
    run = train(tmp_path, "strategy=joint", "benchmark.classes=2", "benchmark.experiences=1")
    with pytest.raises(UnsupportedError, match=r"^extend: 'joint' trains at the end of a stream, which is now later"):
        extend(run.run_folder, more(4))


def test_an_extension_that_learns_nothing_leaves_no_folder(
    tmp_path: Path, parent: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise UnsupportedError("er: cannot train here; do something else")

    monkeypatch.setattr("clframe.training.session.Session._train", refuse)
    with pytest.raises(UnsupportedError, match=r"^er: cannot train here"):
        extend(parent.run_folder, more(4), output=tmp_path)
    assert not list(tmp_path.iterdir())
