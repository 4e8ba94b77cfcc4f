"""A run that was stopped goes on from the last finished experience and ends bit-identical."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import clframe
from clframe.errors import RunFolderError
from clframe.training.monitor import Monitor

SMALL = [
    "backbone=mlp",
    "backbone.width=16",
    "trainer.epochs=2",
    "trainer.log_every=7",
    "trainer.progress=false",
]
TIMES = {"train_seconds", "run_folder"}


def overrides(strategy, seed=1):
    return [*SMALL, f"strategy={strategy}", f"seed={seed}"]


def only_run(output: Path) -> Path:
    (path,) = output.glob("quickstart/*")
    return path


def comparable(folder: Path):
    result = json.loads((folder / "results.json").read_text())
    rows = list(csv.reader((folder / "metrics.csv").read_text().splitlines()))
    checkpoint = torch.load(folder / "checkpoints" / "experience_005.ckpt", weights_only=True)
    return {k: v for k, v in result.items() if k not in TIMES}, rows, checkpoint


def assert_same(a: Path, b: Path):
    (result_a, rows_a, ckpt_a), (result_b, rows_b, ckpt_b) = comparable(a), comparable(b)
    assert result_a == result_b
    assert rows_a == rows_b and len(rows_a) > 10
    assert ckpt_a["network"].keys() == ckpt_b["network"].keys()
    for name, tensor in ckpt_a["network"].items():
        assert torch.equal(tensor, ckpt_b["network"][name]), name


class Killed(BaseException):
    """Stands for a power cut: nothing catches it."""


@pytest.fixture
def kill_after(monkeypatch):
    """Break off after this many training steps."""

    def arm(steps: int) -> None:
        original, count = Monitor.on_step, iter(range(1, 10_000))

        def on_step(self, strategy):
            original(self, strategy)
            if next(count) == steps:
                raise Killed

        monkeypatch.setattr(Monitor, "on_step", on_step)

    yield arm


@pytest.mark.parametrize("strategy", ["naive", "er(memory=20) + lwf", "cumulative", "joint"])
@pytest.mark.parametrize("steps", [1, 25, 60])
def test_resume_after_a_break_inside_an_experience(strategy, steps, tmp_path, kill_after, monkeypatch):
    clframe.run("quickstart", overrides(strategy), output=tmp_path / "whole")
    with monkeypatch.context():
        kill_after(steps)
        with pytest.raises(Killed):
            clframe.run("quickstart", overrides(strategy), output=tmp_path / "broken")
        monkeypatch.undo()
    folder = only_run(tmp_path / "broken")
    assert not (folder / "results.json").exists()
    torch.rand(17)  # whatever the new process did before has no say
    result = clframe.run(resume=folder)
    assert_same(only_run(tmp_path / "whole"), folder)
    assert result.run_folder == str(folder)


def test_resume_of_a_finished_run_trains_nothing_and_says_the_same(tmp_path):
    first = clframe.run("quickstart", overrides("er(memory=20)"), output=tmp_path)
    again = clframe.run(resume=first.run_folder)
    assert again.accuracy_matrix == first.accuracy_matrix and again.steps == first.steps


def test_the_last_two_checkpoints_stay_and_nothing_half_written(tmp_path):
    result = clframe.run("quickstart", overrides("naive"), output=tmp_path)
    folder = Path(result.run_folder)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [
        "experience_004.ckpt",
        "experience_005.ckpt",
    ]
    assert not list(folder.rglob("*.tmp"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(tmp_path, caplog):
    folder = Path(clframe.run("quickstart", overrides("er(memory=20) + lwf"), output=tmp_path).run_folder)
    whole = comparable(folder)
    newest = folder / "checkpoints" / "experience_005.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with caplog.at_level("WARNING", logger="clframe"):
        clframe.run(resume=folder)
    assert any(f"{newest}: is damaged" in record.message for record in caplog.records)
    assert comparable(folder)[0] == whole[0]


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    folder = Path(clframe.run("quickstart", overrides("naive"), output=tmp_path).run_folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("lr: ", "lr: 1"))
    with pytest.raises(RunFolderError, match="another config"):
        clframe.run(resume=folder)


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'pwned'}",))

    folder = Path(clframe.run("quickstart", overrides("naive"), output=tmp_path / "runs").run_folder)
    (folder / "checkpoints" / "experience_004.ckpt").unlink()
    torch.save({"format": 1, "evil": Evil()}, folder / "checkpoints" / "experience_005.ckpt")
    with pytest.raises(RunFolderError, match="is damaged or no checkpoint"):
        clframe.run(resume=folder)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_resume_after_a_real_kill(tmp_path):
    """A process killed with SIGKILL at an arbitrary moment after the second experience."""
    arguments = [*overrides("er(memory=20) + lwf"), "trainer.epochs=6"]
    command = [
        sys.executable,
        "-m",
        "clframe",
        "run",
        "quickstart",
        *arguments,
        "--output",
        str(tmp_path / "killed"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("killed/quickstart/*/checkpoints/experience_002.ckpt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    folder = only_run(tmp_path / "killed")
    clframe.run(resume=folder)
    clframe.run("quickstart", arguments, output=tmp_path / "whole")
    assert_same(only_run(tmp_path / "whole"), folder)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
@pytest.mark.parametrize("engine", ["fabric", "trainer"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_names_the_folder_to_resume(tmp_path, number, engine):
    arguments = [*overrides("naive"), "trainer.epochs=30", f"trainer.engine={engine}"]
    command = [sys.executable, "-m", "clframe", "run", "quickstart", *arguments, "--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        # A test that runs in the background of a shell inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("out/quickstart/*/checkpoints/experience_001.ckpt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"clframe run --resume {os.path.relpath(only_run(tmp_path / 'out'), tmp_path)}" in said or (
        f"clframe run --resume {only_run(tmp_path / 'out')}" in said
    )
    assert "Traceback" not in said
    assert not (only_run(tmp_path / "out") / "lock").exists()
