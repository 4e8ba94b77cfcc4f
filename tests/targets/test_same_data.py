"""Runs recognize their data: what was changed is refused by evaluation, targets, extension and resumption."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from earlier_versions import remove_digests
from PIL import Image
from power_cuts import TINY

import clframe
from clframe.api import extend
from clframe.data import SOURCES, Source, TensorSamples, digits
from clframe.errors import Interrupted, RunFolderError
from clframe.targets import open_target
from clframe.targets.evaluation import evaluate
from clframe.training.monitor import Monitor
from clframe.training.trained import load_newest, recorded_digest

FAST = [*TINY, "trainer.epochs=1", "trainer.threads=1", "trainer.accelerator=cpu", "strategy=er(memory=8)"]


def edited_digits(*, path: str = "") -> Source:
    """Digits, edited as the file at ``path`` says: lines with a part, a class and a number to add to its inputs."""
    whole, changes = digits(), Path(path).read_text().split("\n")
    parts = {"train": whole.train, "test": whole.test}
    for part, c, amount in (line.split() for line in changes if line):
        samples = parts[part]
        assert isinstance(samples, TensorSamples)
        x = samples.x.clone()
        x[samples.y == int(c), 0, 0, 0] += int(amount)
        parts[part] = replace(samples, x=x)
    return replace(whole, train=parts["train"], test=parts["test"])


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    SOURCES.register("edited_digits")(edited_digits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clframe.execution.write_figures", lambda *_: None)
        yield
    del SOURCES._entries["edited_digits"]


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file with edits, without any."""
    file = tmp_path_factory.mktemp("edits") / "edits"
    file.write_text("")
    return file


@pytest.fixture(autouse=True)
def _unedited(edits: Path) -> Iterator[None]:
    yield
    edits.write_text("")


def own(edits: Path) -> list[str]:
    return [*FAST, "benchmark=edited_digits", f"benchmark.path={edits}", "benchmark.class_order=sorted"]


@pytest.fixture(scope="module")
def run(edits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experiences of two digits."""
    return Path(clframe.run("quickstart", own(edits), output=tmp_path_factory.mktemp("run")).run_folder)


@pytest.fixture
def begun(run: Path, tmp_path: Path) -> Path:
    """The run after its first experience."""
    folder = shutil.copytree(run, tmp_path / "begun")
    (folder / "checkpoints" / "experience_002.ckpt").unlink()
    (folder / "results.json").unlink()
    return folder


def test_the_same_data_are_recognized(run: Path, begun: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    matrix = json.loads((run / "results.json").read_text())["accuracy_matrix"]
    found = evaluate(run)
    assert [correct / samples for samples, correct in found.experiences] == pytest.approx(matrix[-1])
    assert len(open_target(str(run)).experiences) == 2
    assert clframe.run(resume=begun).accuracy_matrix == tuple(map(tuple, matrix))
    child = extend(run, ["benchmark=digits", "benchmark.classes=1", "benchmark.experiences=1"], output=tmp_path)
    assert len(child.accuracy_matrix) == 3
    recorded = [recorded_digest(load_newest(Path(one), device=torch.device("cpu"))) for one in (run, child.run_folder)]
    assert recorded[0] is not None and recorded[1] is not None
    assert recorded[1].train[:2] == recorded[0].train and recorded[1].test[:2] == recorded[0].test
    assert not [message for message in caplog.messages if "digest" in message or "read its data" in message]


def test_changed_training_inputs_are_refused(edits: Path, run: Path, begun: Path, tmp_path: Path) -> None:
    edits.write_text("train 1 1")
    what = "experience 1 has other training samples ({}, as many) than when the run read its data; restore"
    what = what.format(len(edited_digits(path=str(edits)).first_classes(2).train))
    for verb in (evaluate, lambda folder: open_target(str(folder))):
        with pytest.raises(RunFolderError) as refused:
            verb(run)
        assert str(refused.value) == (
            f"{run}: {what} the data, undo the overrides, or add benchmark=edited_digits to clframe evaluate to measure "
            f"it on other data"
        )
    with pytest.raises(RunFolderError) as refused:
        extend(run, ["benchmark=digits", "benchmark.classes=1"], output=tmp_path / "child")
    assert str(refused.value) == f"earlier data: {what} them, and put new samples into a separate folder"
    assert not (tmp_path / "child").exists()
    before = sorted(begun.rglob("*"))
    with pytest.raises(RunFolderError) as refused:
        clframe.run(resume=begun)
    assert str(refused.value) == f"{begun}: {what} the data to continue it, or start a new run"
    assert sorted(path for path in begun.rglob("*") if path.name != "lock") == before


def test_training_samples_that_were_not_used_yet_may_change(
    edits: Path, begun: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edits.write_text("test 3 1")
    with pytest.raises(RunFolderError, match=r"experience 2 has other test samples .* restore the data to continue it"):
        clframe.run(resume=begun)
    edits.write_text("train 3 1")
    assert len(clframe.run(resume=begun).accuracy_matrix) == 2
    (message,) = [message for message in caplog.messages if "read its data" in message]
    assert message.endswith("than when the run read its data for the first time; it is trained on those of now")
    evaluate(begun)  # its last checkpoint is of the data that it was trained on
    edits.write_text("")
    with pytest.raises(RunFolderError, match="experience 2 has other training samples"):
        evaluate(begun)


def test_a_checkpoint_inside_an_experience_knows_its_data(edits: Path, tmp_path: Path) -> None:
    calls = iter(range(100))

    def interrupt(*_: object) -> None:
        if next(calls) == 6:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as stopped:
        patch.setattr(Monitor, "on_step", interrupt)
        clframe.run("quickstart", own(edits), output=tmp_path)
    folder = stopped.value.folder
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["inside_001_step_000004.ckpt"]
    edits.write_text("train 1 1")
    with pytest.raises(RunFolderError, match="experience 1 has other training samples .* restore the data to continue"):
        clframe.run(resume=folder)
    edits.write_text("train 3 1")
    assert len(clframe.run(resume=folder).accuracy_matrix) == 2


def test_runs_of_earlier_versions_are_noted(
    edits: Path, begun: Path, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="clframe.data")
    old = shutil.copytree(run, tmp_path / "old")
    remove_digests(old)
    remove_digests(begun)
    edits.write_text("train 1 1")
    for act, where in (
        (lambda: evaluate(old), old), (lambda: clframe.run(resume=begun), begun),
        (lambda: extend(old, ["benchmark=digits", "benchmark.classes=1"], output=tmp_path / "child"), "earlier data"),
    ):  # fmt: skip
        caplog.clear()
        act()
        assert [message for message in caplog.messages if "digest" in message] == [
            f"{where}: has no digest of its data, which only newer runs record; they are assumed to be the same"
        ]


def test_an_added_photo_in_each_class_folder_is_refused(tmp_path: Path) -> None:
    """The split into training and test data changes, and the number of test images does not."""
    draw = np.random.default_rng(0)

    def add(name: str) -> None:
        for c in "abcd":
            (tmp_path / "photos" / c).mkdir(parents=True, exist_ok=True)
            pixels = draw.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / c / f"{name}.png")

    for i in range(10):
        add(str(i))
    photos = ["benchmark=image_folder", f"benchmark.path={tmp_path / 'photos'}"]
    run = clframe.run("quickstart", [*FAST, *photos], output=tmp_path / "runs").run_folder
    found = evaluate(run)
    assert found.samples == 8
    add("z")
    with pytest.raises(RunFolderError, match="experience 1 has 18 training samples, but had 16 when the run read its data"):
        evaluate(run)
    moved = (tmp_path / "photos").rename(tmp_path / "moved")
    for c in "abcd":
        (moved / c / "z.png").unlink()
    assert evaluate(run, [f"benchmark.path={moved}"]).correct == found.correct
