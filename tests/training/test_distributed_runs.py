"""Runs on two devices as a user starts them: two processes on CPUs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import clframe
from clframe.errors import ConfigError

TINY = [
    "backbone=mlp", "backbone.width=16", "benchmark.experiences=3", "benchmark.classes=6", "trainer.epochs=1",
    "trainer.batch_size=64", "trainer.precision=64-true", "trainer.figures=none", "trainer.loggers=[csv]",
    "strategy=er(memory=24) + lwf",
]  # fmt: skip
LONG = [*TINY, "trainer.epochs=100", "trainer.checkpoint.every=2"]


def stop_after(count):
    """A callback that interrupts a run after some experiences."""

    def stop(progress):
        if progress.finished == count:
            raise KeyboardInterrupt

    return stop


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return clframe.load(folder).network.state_dict()


def assert_same(one: Path, other: Path) -> None:
    """Equal weights to rounding, and equal accuracies and costs."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert max(float((a[name].double() - b[name].double()).abs().max()) for name in a) < 1e-7
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, other)]
    assert results[0]["accuracy_matrix"] == results[1]["accuracy_matrix"]
    costs = [json.loads((folder / "ledger.json").read_text())["totals"] for folder in (one, other)]
    for key in ("macs", "by_phase", "by_component", "samples", "replayed_samples"):
        assert costs[0][key] == costs[1][key], key


@pytest.mark.slow
def test_a_run_on_two_devices_goes_on_on_one(here: Path) -> None:
    whole, stopped = here / "whole", here / "stopped"
    clframe.run("quickstart", TINY, folder=whole)
    with pytest.raises(KeyboardInterrupt):
        clframe.run("quickstart", [*TINY, "trainer.devices=2"], folder=stopped, on_evaluated=stop_after(2))
    assert not torch.distributed.is_initialized()
    log = (stopped / "log.txt").read_text()
    assert len(re.findall("started", log)) == 1 and len(re.findall(r"experience [12]/3 \(", log)) == 2  # one writer
    assert not (stopped / "lock").exists()
    clframe.run(resume=stopped, overrides=["trainer.devices=1"])
    assert "devices: 1" in (stopped / "config.yaml").read_text()
    assert_same(whole, stopped)


def test_only_the_devices_of_a_resumed_run_may_change(here: Path) -> None:
    with pytest.raises(ConfigError, match="resume: found trainer.epochs=2; leave it out"):
        clframe.run(resume=here, overrides=["trainer.epochs=2"])


@pytest.mark.slow
def test_from_one_device_to_two_and_back(here: Path) -> None:
    whole, stopped = here / "whole", here / "stopped"
    clframe.run("quickstart", TINY, folder=whole)
    for devices, count in ((1, 1), (2, 2)):
        with pytest.raises(KeyboardInterrupt):
            clframe.run("quickstart", [*TINY, f"trainer.devices={devices}"], folder=stopped, on_evaluated=stop_after(count))
    clframe.run(resume=stopped, overrides=["trainer.devices=1"])
    assert_same(whole, stopped)


def start(folder: Path) -> tuple[subprocess.Popen[str], int]:
    """A run on two devices that has saved inside its first experience, and the id of its second process."""
    command = "import sys; from clframe.cli import main; sys.exit(main())"
    words = ["run", "quickstart", *LONG, "trainer.devices=2", "--folder", str(folder), "--quiet"]
    run = subprocess.Popen(
        [sys.executable, "-c", command, *words], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    end = time.monotonic() + 240
    while not list(folder.glob("checkpoints/inside_*")):
        assert run.poll() is None and time.monotonic() < end, run.communicate()
        time.sleep(0.1)
    children = subprocess.run(["ps", "--ppid", str(run.pid), "-o", "pid="], capture_output=True, text=True, check=True)
    return run, next(int(word) for word in children.stdout.split())


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


@pytest.mark.slow
def test_the_loss_of_a_process_ends_the_run_with_one_line(here: Path) -> None:
    run, other = start(here / "run")
    os.kill(other, signal.SIGKILL)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 2
    lines = [line for line in errors.splitlines() if "error" in line.lower()]
    assert lines == [
        f"clframe: error: trainer.devices: process 2 of 2: ended by SIGKILL; resume with clframe run --resume {here}/run"
    ]
    assert "Traceback" not in errors and not is_running(other)
    assert "failed: trainer.devices: process 2 of 2" in (here / "run" / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("which", ["first", "second"])
def test_a_signal_to_either_process_saves_and_stops_the_run(here: Path, which: str) -> None:
    run, other = start(here / "run")
    os.kill(run.pid if which == "first" else other, signal.SIGTERM)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGTERM
    assert f"clframe: interrupted; resume with clframe run --resume {here}/run" in errors and "Traceback" not in errors
    assert not is_running(other)
    saved = re.findall("saved at experience 1, epoch [0-9]+, step [0-9]+", (here / "run" / "log.txt").read_text())
    assert len(saved) == 1


@pytest.mark.slow
def test_the_other_process_ends_with_the_first(here: Path) -> None:
    run, other = start(here / "run")
    run.kill()
    run.communicate()
    end = time.monotonic() + 60
    while is_running(other):
        assert time.monotonic() < end
        time.sleep(0.1)
