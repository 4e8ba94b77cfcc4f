"""Checkpoints: verified before they are read, ordered by number."""

from __future__ import annotations

import logging
import random
import shutil
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from power_cuts import TINY

import clframe
from clframe.core import COMPONENTS, Component
from clframe.errors import RunFolderError
from clframe.training.checkpoint import checkpoint_files, load_inside, load_latest, save_checkpoint, save_inside

CPU = torch.device("cpu")


def content(value: float) -> dict:
    return {"network": {"weight": torch.full((64, 64), value)}, "steps": 3}


def test_the_thousandth_comes_after_the_nine_hundred_and_ninety_ninth(tmp_path):
    for finished in (998, 999, 1000, 1001):
        save_checkpoint(tmp_path, content(float(finished)), finished=finished)
    assert [path.name for path in checkpoint_files(tmp_path)] == ["experience_1000.ckpt", "experience_1001.ckpt"]
    assert load_latest(tmp_path, device=CPU)["finished"] == 1001


def test_no_flipped_bit_loads_as_other_weights(tmp_path):
    save_checkpoint(tmp_path, content(0.5), finished=1)
    path = save_checkpoint(tmp_path, content(0.25), finished=2)
    original, draw = path.read_bytes(), random.Random(0)
    fell_back = 0
    for _ in range(200):
        damaged = bytearray(original)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        weight = load_latest(tmp_path, device=CPU)["network"]["weight"]
        assert (weight == weight[0, 0]).all() and weight[0, 0] in (0.25, 0.5)
        fell_back += weight[0, 0] == 0.5
    assert fell_back > 150  # the rest hit bytes that no reader uses


def test_the_damaged_file_is_named_and_the_one_before_it_used(tmp_path, caplog):
    save_checkpoint(tmp_path, content(0.5), finished=1)
    path = save_checkpoint(tmp_path, content(0.25), finished=2)
    path.write_bytes(path.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING, logger="clframe"):
        assert load_latest(tmp_path, device=CPU)["finished"] == 1
    assert [record.message for record in caplog.records] == [
        f"{path}: is damaged or no checkpoint of clframe; the one before it is used"
    ]


def test_all_damaged_files_are_named_and_no_other_is_announced(tmp_path, caplog):
    save_inside(tmp_path, content(0.0), finished=0, step=1).write_bytes(b"")
    save_inside(tmp_path, content(0.0), finished=2, step=8)
    for finished in (1, 2):
        save_checkpoint(tmp_path, content(0.5), finished=finished).write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="clframe"):
        with pytest.raises(RunFolderError) as refused:
            load_latest(tmp_path, device=CPU)
        assert not caplog.records
        assert str(refused.value) == (
            f"{tmp_path}/experience_001.ckpt, experience_002.ckpt, inside_001_step_000001.ckpt: are damaged or no "
            f"checkpoint of clframe, and no intact one is left; restore one of an experience from a copy, or start a "
            f"new run"
        )
        assert load_inside(tmp_path, finished=0, device=CPU) is None
    assert caplog.messages == [
        f"{tmp_path}/inside_001_step_000001.ckpt: is damaged or no checkpoint of clframe; experience 1 starts again"
    ]


def test_the_intact_one_is_named_where_several_after_it_are_damaged(tmp_path, caplog):
    for finished in (1, 2, 3):
        path = save_checkpoint(tmp_path, content(0.5), finished=finished, keep=3)
        if finished > 1:
            path.write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="clframe"):
        assert load_latest(tmp_path, device=CPU)["finished"] == 1
    assert [message.split("; ")[1] for message in caplog.messages] == [
        "the one before it is used", "experience_001.ckpt is used"
    ]  # fmt: skip


def test_a_file_that_contradicts_its_name_is_refused(tmp_path):
    save_checkpoint(tmp_path, content(0.5), finished=1).rename(tmp_path / "experience_007.ckpt")
    with pytest.raises(RunFolderError, match=r"experience_007\.ckpt: finished=1 contradicts the file's name"):
        load_latest(tmp_path, device=CPU)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, to be copied."""
    small = ["backbone=mlp", "backbone.width=8", "trainer.epochs=1", "benchmark.experiences=2", "trainer.progress=false"]
    return clframe.run("quickstart", small, output=tmp_path_factory.mktemp("finished")).run_folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "x"}, "steps='x'"),
        ({"steps": -1}, "steps=-1"),
        ({"tallies": []}, "tallies has 0 entries after 2 experiences"),
        ({"train_seconds": None}, "train_seconds=None"),
    ],
)
def test_fields_that_make_no_sense_are_refused(finished, tmp_path, change, message):
    folder = shutil.copytree(finished, tmp_path / "copy")
    path = folder / "checkpoints" / "experience_002.ckpt"
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    with pytest.raises(RunFolderError, match=message):
        clframe.run(resume=folder)
    torch.save({**torch.load(path, weights_only=True), "finished": 77}, path.with_name("experience_077.ckpt"))
    with pytest.raises(RunFolderError, match="finished=77 of 2 experiences"):
        clframe.run(resume=folder)


def test_scalars_of_numpy_that_are_numbers_and_texts_of_python_are_stored_as_these(tmp_path):
    kept = {"loss": np.float64(0.1), "list": [np.float64(0.2), 1], "name": np.str_("fast"), "best": np.int64(3),
            "single": np.float32(0.1), "seen": np.bool_(True)}  # fmt: skip
    save_checkpoint(tmp_path, {"components": {"own": kept}}, finished=1)
    found = load_latest(tmp_path, device=CPU)["components"]["own"]
    assert found == kept and type(found["list"][0]) is float
    assert [type(found[key]) for key in ("loss", "name", "best", "single", "seen")] == [float, str, int, float, bool]


class Mode(IntEnum):
    FAST = 1


class Pair(NamedTuple):
    first: int
    second: int


@pytest.mark.parametrize(
    "value, kind",
    [(Mode.FAST, "Mode"), (Pair(1, 2), "Pair"), (np.complex64(3), "numpy.complex64"), ({1}, "a set"),
     (torch.eye(3).to_sparse(), "sparse tensor")],
)  # fmt: skip
def test_what_no_reader_restores_is_refused_when_it_is_written_and_named_with_its_component(value, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(COMPONENTS, "_entries", dict(COMPONENTS._entries))

    @clframe.register
    @dataclass(frozen=True, kw_only=True)
    class Stateful(Component):
        name: ClassVar[str] = "stateful"

        def after_experience(self, network, context, state):
            return {"kept": [value]}

    with pytest.raises(RunFolderError, match=rf"component 'stateful': checkpoint: component state holds .*{kind}"):
        clframe.run("quickstart", [*TINY, "strategy=stateful"], output=tmp_path)
