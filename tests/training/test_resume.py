"""A run resumes from the last finished experience and ends bit-identical; signals end it after saving."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from power_cuts import TINY, assert_same_run, without_pictures

import clframe
from clframe.errors import Interrupted, RunFolderError
from clframe.training.monitor import Monitor

LATE = [*TINY, "trainer.checkpoint.every=1h"]
"""Without a checkpoint inside an experience, unless a signal asks for one."""


@pytest.fixture(scope="module", autouse=True)
def fast():
    patch = without_pictures()
    yield
    patch.undo()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished run of replay and a teacher."""
    output = tmp_path_factory.mktemp("whole")
    return Path(clframe.run("quickstart", [*LATE, "strategy=er(memory=20) + lwf"], output=output).run_folder)


@pytest.fixture
def finished(whole, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def only_run(output: Path) -> Path:
    (path,) = output.glob("quickstart/*")
    return path


class Killed(BaseException):
    """Stands for a power cut: nothing catches it."""


@pytest.fixture
def at_step(monkeypatch):
    """Call a function once, after this many training steps."""

    def arm(step: int, call: Any) -> None:
        original, count = Monitor.on_step, iter(range(1, 10_000))

        def on_step(self, strategy):
            original(self, strategy)
            if next(count) == step:
                call()

        monkeypatch.setattr(Monitor, "on_step", on_step)

    return arm


def kill() -> None:
    raise Killed


@pytest.mark.parametrize(("strategy", "step"), [("naive", 1), ("cumulative", 25), ("joint", 30)])
def test_without_a_checkpoint_inside_it_restarts_the_experience(strategy, step, tmp_path, at_step):
    options = [*TINY, "trainer.checkpoint.every=null", f"strategy={strategy}"]
    whole = clframe.run("quickstart", options, output=tmp_path / "a").run_folder
    at_step(step, kill)
    with pytest.raises(Killed):
        clframe.run("quickstart", options, output=tmp_path / "b")
    folder = only_run(tmp_path / "b")
    assert not (folder / "results.json").exists()
    assert not list(folder.glob("checkpoints/inside*"))
    torch.rand(17)  # what the new process draws before does not matter
    assert clframe.run(resume=folder).run_folder == str(folder)
    assert_same_run(Path(str(whole)), folder)


def test_resuming_a_finished_run_trains_nothing(finished):
    before = json.loads((finished / "results.json").read_text())
    again = clframe.run(resume=finished)
    assert [list(row) for row in again.accuracy_matrix] == before["accuracy_matrix"]
    assert again.steps == before["steps"]


def test_the_last_two_checkpoints_stay_and_nothing_else(tmp_path):
    options = [*TINY, "benchmark.classes=6", "benchmark.experiences=3", "trainer.epochs=1"]
    folder = Path(clframe.run("quickstart", options, output=tmp_path).run_folder)
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["experience_002.ckpt", "experience_003.ckpt"]
    assert not list(folder.rglob("*.tmp"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(finished, whole, caplog):
    newest = finished / "checkpoints" / "experience_002.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with caplog.at_level("WARNING", logger="clframe"):
        clframe.run(resume=finished)
    assert any(f"{newest}: is damaged" in record.message for record in caplog.records)
    assert_same_run(whole, finished)


def test_a_checkpoint_of_another_config_is_refused(finished):
    config = finished / "config.yaml"
    config.write_text(config.read_text().replace("lr: ", "lr: 1"))
    with pytest.raises(RunFolderError, match="another config"):
        clframe.run(resume=finished)


def test_a_checkpoint_cannot_run_code(finished, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'pwned'}",))

    (finished / "checkpoints" / "experience_001.ckpt").unlink()
    torch.save({"format": 1, "evil": Evil()}, finished / "checkpoints" / "experience_002.ckpt")
    with pytest.raises(RunFolderError, match="is damaged or no checkpoint"):
        clframe.run(resume=finished)
    torch.save({"format": 3, "evil": Evil()}, finished / "checkpoints" / "inside_001_step_000003.ckpt")
    (finished / "checkpoints" / "experience_002.ckpt").unlink()
    clframe.run(resume=finished)
    assert not (tmp_path / "pwned").exists()


# --- signals --------------------------------------------------------------------------------------


@pytest.fixture
def default_handlers():
    """Python's own handlers: a test in the background of a shell inherits an ignored SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
@pytest.mark.parametrize(
    ("name", "engine", "accumulate", "saved"),
    [
        ("SIGINT", "fabric", 1, 5),
        ("SIGTERM", "trainer", 1, 5),
        ("SIGHUP", "fabric", 3, 6),
        ("SIGUSR1", "trainer", 1, 5),
    ],
)
def test_a_signal_finishes_the_update_and_saves(name, engine, accumulate, saved, tmp_path, at_step, default_handlers):
    options = [*LATE, "strategy=er(memory=20) + lwf", f"trainer.engine={engine}", f"trainer.accumulate={accumulate}"]
    whole = Path(str(clframe.run("quickstart", options, output=tmp_path / "a").run_folder))
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)]
    at_step(23, lambda: os.kill(os.getpid(), getattr(signal, name)))
    with pytest.raises(Interrupted, match="resume with clframe run --resume"):
        clframe.run("quickstart", options, output=tmp_path / "b")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)] == handlers
    folder = only_run(tmp_path / "b")
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["experience_001.ckpt", f"inside_002_step_{saved:06d}.ckpt"]
    clframe.run(resume=folder)
    assert_same_run(whole, folder)


def test_a_second_interrupt_stops_before_saving(tmp_path, at_step, default_handlers):
    def interrupt_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(5, interrupt_twice)
    with pytest.raises(Interrupted):
        clframe.run("quickstart", LATE, output=tmp_path)
    assert not list((only_run(tmp_path) / "checkpoints").iterdir())


def test_a_signal_during_consolidation_acts_immediately(tmp_path, monkeypatch, default_handlers):
    from clframe.training.learner import Learner

    def end(self: Learner) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        raise AssertionError("the signal was deferred")

    monkeypatch.setattr(Learner, "end", end)
    with pytest.raises(Interrupted):
        clframe.run("quickstart", LATE, output=tmp_path)


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "clframe", "run", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder,
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 300
    while not list(folder.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def finish(arguments: list[str], folder: Path) -> None:
    process = start(arguments, folder)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()  # closes the pipe


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_the_command_line_saves_on_sigterm(tmp_path, monkeypatch):
    options = [*TINY, "trainer.epochs=15", "trainer.checkpoint.every=10", "strategy=er(memory=20) + lwf"]
    process = start(["quickstart", *options, "--output", "b"], tmp_path)
    wait_for(process, tmp_path, "b/quickstart/*/checkpoints/inside_001*")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    folder = only_run(tmp_path / "b")
    assert "saved at experience 1, epoch " in said and "Traceback" not in said
    assert said.endswith(f"clframe: interrupted; resume with clframe run --resume {folder.relative_to(tmp_path)}\n")
    assert not (folder / "lock").exists() and not list(folder.rglob("*.tmp"))
    clframe.run(resume=folder)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    whole = clframe.run("quickstart", options, output="b").run_folder
    assert_same_run(Path(str(whole)), folder)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("engine", ["fabric", "trainer"])
def test_real_kills_one_after_the_other(engine, tmp_path):
    """Each in a separate process: the ledger has the size of checkpoints, which hold the peak of a process's memory."""
    options = [*TINY, "trainer.epochs=20", "strategy=er(memory=20) + lwf", f"trainer.engine={engine}"]
    process = start(["quickstart", *options, "--output", "b"], tmp_path)
    wait_for(process, tmp_path, "b/quickstart/*/checkpoints/inside_001*")
    for pattern in ("experience_001.ckpt", "inside_002*"):
        end(process)
        folder = only_run(tmp_path / "b")
        process = start(["--resume", str(folder)], tmp_path)
        wait_for(process, folder, f"checkpoints/{pattern}")
    end(process)
    finish(["--resume", str(folder)], tmp_path)
    (tmp_path / "other").mkdir()
    finish(["quickstart", *options, "--output", "b"], tmp_path / "other")
    assert_same_run(only_run(tmp_path / "other/b"), folder)
