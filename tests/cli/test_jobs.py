"""``clframe run --seeds A..B --jobs N``: how many at a time, and what happens to those that fail or are stopped.

Most tests replace the processes by ones that speak the same protocol and train nothing.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from dataclasses import replace

import pytest

from clframe.cli import processes
from clframe.cli.jobs import CONTEXT_BYTES, Memory, Plan, choose_jobs, parse_jobs
from clframe.cli.side_by_side import SeedsInterrupted, SideBySide
from clframe.errors import ClframeError, ConfigError

GIB = 2**30
SMALL = ["backbone=mlp", "backbone.width=4", "trainer.epochs=1", "benchmark.experiences=2", "trainer.figures=none"]

FAKE = """
import json, os, signal, sys, time
from pathlib import Path

request = json.loads(sys.stdin.readline())
seed = int(request["overrides"][-1].removeprefix("seed="))
here = Path(request["output"])

def send(kind, **values):
    print(json.dumps({"kind": kind, **values}), flush=True)

def wait_for(path):
    for _ in range(3000):
        if path.exists():
            return
        time.sleep(0.01)
    sys.exit("not written: " + path.name)

if sys.stdin.readline() != "begin\\n":
    sys.exit()
(here / f"began {seed}").touch()
"""


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Make each process run ``code`` after the one above; returns an object that starts them."""

    def faking(code):
        monkeypatch.setattr(processes, "_CODE", FAKE + code)
        return SideBySide("quickstart", ["a=1"], output=str(tmp_path), quiet=False, rest=["clframe", "run", "my file"])

    return faking


@pytest.fixture
def interrupts():
    """Python's own handler: a test in the background of a shell inherits an ignored SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def plan(jobs, *, threads=1):
    return Plan(jobs, threads, None, "")


def test_numbers_of_jobs():
    assert (parse_jobs("1"), parse_jobs("256"), parse_jobs("auto")) == (1, 256, None)
    for text in ("0", "257", "-1", "1.5", "", "many", "٣", "9" * 9):
        with pytest.raises(ConfigError, match=r"^--jobs: found '.*'; give a number from 1 to 256, or auto$"):
            parse_jobs(text)


@pytest.mark.parametrize(
    "seeds, jobs, cores, threads, expected",
    [(8, None, 4, None, (4, 1)), (8, None, 5, 2, (2, 2)), (2, None, 16, None, (2, 8)), (3, None, 2, 4, (1, 4)),
     (8, 3, 8, None, (3, 2)), (2, 8, 8, None, (2, 4)), (8, 4, 2, None, (4, 1)), (8, 2, 8, 1, (2, 1))],
)  # fmt: skip
def test_cores_are_divided(seeds, jobs, cores, threads, expected):
    found = choose_jobs(runs=seeds, jobs=jobs, cores=cores, threads=threads)
    assert (found.jobs, found.threads) == expected
    assert found.reason.endswith("more than the cores") == (expected[0] * expected[1] > cores)
    assert found.memory_share == (None if expected[0] == 1 else 0.9 / expected[0])


def test_memory_of_the_device_is_divided():
    """20 GiB free besides the context, 3 GiB a run with its context: 0.9 * 20 / 3 = 6 fit."""
    memory = Memory(peak=3 * GIB - CONTEXT_BYTES, free=20 * GIB - CONTEXT_BYTES, total=40 * GIB, captured=False)
    found = choose_jobs(runs=16, jobs=None, cores=16, threads=None, memory=memory)
    assert (found.jobs, found.threads) == (6, 2)
    assert found.memory_share == pytest.approx(0.9 * 20 / 40 / 6)
    assert "(auto)" in found.reason and "6 fit, at most 8 are used" in found.reason
    captured = Memory(peak=GIB, free=20 * GIB, total=20 * GIB, captured=True)
    found = choose_jobs(runs=16, jobs=None, cores=16, threads=None, memory=captured)
    assert found.jobs == 2 and "7 fit, at most 2 are used, since graphs fill the device" in found.reason
    assert int(0.9 * (20 * GIB + CONTEXT_BYTES) / (2 * GIB + CONTEXT_BYTES)) == 7
    assert choose_jobs(runs=1, jobs=None, cores=16, threads=None, memory=captured).jobs == 1
    small = Memory(peak=2**20, free=80 * GIB, total=80 * GIB, captured=False)
    assert choose_jobs(runs=99, jobs=None, cores=64, threads=None, memory=small).jobs == 8
    assert choose_jobs(runs=99, jobs=None, cores=4, threads=None, memory=small).jobs == 4
    large = Memory(peak=30 * GIB, free=20 * GIB, total=80 * GIB, captured=False)
    assert choose_jobs(runs=9, jobs=None, cores=64, threads=None, memory=large).jobs == 1


@pytest.mark.usefixtures("no_training")
def test_options_that_do_not_go_together(refused):
    refused(["run", "quickstart", "--jobs", "2"], "--jobs: found 2 without --seeds; add the seeds")
    refused(["run", "quickstart", "--jobs", "auto", "--seed", "1"], "--jobs: found auto without --seeds")
    refused(["run", "quickstart", "--jobs", "0", "--seeds", "0..1"], "--jobs: found '0'; give a number")
    refused(["run", "--resume", "a", "--jobs", "2"], "--resume: found --jobs as well; leave it out")
    refused(["run", "quickstart", "--folder", "a", "--jobs", "2", "--seeds", "0..1"], "--folder: found --seeds as well")
    refused(["run", "quickstart", "trainer.epoch=1", "--seeds", "0..1", "--jobs", "2"], "trainer.epoch")


def test_one_that_fails_leaves_the_others(fake, capsys, tmp_path):
    """Two at a time: seeds 0 and 1 wait for each other, and 2 begins where 1 has failed."""
    found = fake("""
send("built")
if seed < 2:
    wait_for(here / f"began {1 - seed}")
print("a notice about data", file=sys.stderr)
if seed == 0:
    wait_for(here / "began 3")
if seed == 1:
    send("failed", reason="data: is odd; repair it")
elif seed == 2:
    os.kill(os.getpid(), signal.SIGKILL)
else:
    send("experience", line="experience 1/1:  50.0 %")
    send("finished", folder=str(here / f"run {seed}"))
""").run([0, 1, 2, 3], plan(2))
    assert found == {0: tmp_path / "run 0", 1: None, 2: None, 3: tmp_path / "run 3"}
    out, err = capsys.readouterr()
    expected = [f"seed {seed}: {text}" for seed in (0, 3)
                for text in ("experience 1/1:  50.0 %", f"finished, {tmp_path / f'run {seed}'}")]  # fmt: skip
    assert sorted(out.splitlines()) == sorted(expected)
    assert err.count("a notice about data\n") == 1
    assert "clframe: error: seed 1: data: is odd; repair it\n" in err
    assert (
        "clframe: error: seed 2: its process ended by SIGKILL, perhaps for want of memory; see the lines above\n" in err
    )


def test_never_more_at_a_time_than_asked_for(fake, tmp_path):
    fake("""
send("built")
(here / f"here {seed}").touch()
time.sleep(0.05)
(here / f"most {seed}").write_text(str(len(list(here.glob("here *")))))
(here / f"here {seed}").unlink()
send("finished", folder="x")
""").run(range(6), plan(2))
    most = [int(path.read_text()) for path in tmp_path.glob("most *")]
    assert len(most) == 6 and max(most) <= 2


def test_what_every_run_would_refuse_is_said_once(fake, tmp_path, capsys):
    runs = fake('send("failed", reason="benchmark.path: no such folder; give another")')
    with pytest.raises(ClframeError, match=r"^benchmark\.path: no such folder; give another$"):
        runs.run([4, 5, 6], plan(3))
    assert [path.name for path in tmp_path.iterdir()] == ["began 4"]
    assert capsys.readouterr() == ("", "")


def test_shares_of_threads_and_memory(fake, tmp_path, monkeypatch):
    code = """
send("built")
(here / f"found {seed}").write_text(os.environ["OMP_NUM_THREADS"] + " " + str(request["memory_share"]))
send("finished", folder="x")
"""
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    fake(code).run([0], Plan(2, 3, 0.45, ""))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # fewer than the share: kept
    fake(code).run([1], Plan(2, 3, None, ""))
    assert [(tmp_path / f"found {seed}").read_text() for seed in (0, 1)] == ["3 0.45", "1 None"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of another kind")
@pytest.mark.usefixtures("interrupts")
def test_an_interruption_stops_all(fake, tmp_path):
    """Seed 0 has a run folder, seed 1 has none, 2 was not started; the interruption comes once both have begun."""
    runs = fake("""
send("built")
if seed == 0:
    wait_for(here / "began 1")
    os.kill(os.getppid(), signal.SIGINT)
assert sys.stdin.read() == ""  # until it is closed
(here / f"saved {seed}").touch()
send("interrupted", advice="resume with clframe run --resume a/b" if seed == 0 else None)
""")
    with pytest.raises(SeedsInterrupted) as stop:
        runs.run([0, 1, 2], plan(2))
    assert {path.name for path in tmp_path.glob("saved *")} == {"saved 0", "saved 1"}
    assert stop.value.advice == ("continue with\n  clframe run --resume a/b\n  clframe run 'my file' --seeds 1,2")


def test_a_measurement(fake, tmp_path):
    code = FAKE.replace('request["overrides"][-1]', 'request["overrides"][1]')
    runs = fake("")
    processes._CODE = (
        code
        + """
short = ["trainer.fast_dev_run=2", "trainer.figures=none", "trainer.loggers=[]"]
assert request["overrides"] == ["a=1", "seed=3", *short] and request["measure"]
send("measured", peak=5, free=7, total=9, device=0)
"""
    )
    assert runs.measure(3, captured=True) == Memory(peak=5, free=7, total=9, captured=True)
    assert not list(tmp_path.iterdir())
    processes._CODE = code + 'send("measured", peak=None)'  # not on CUDA
    assert runs.measure(3, captured=True) is None
    processes._CODE = code + 'send("failed", reason="a: b; c")'
    with pytest.raises(ClframeError, match="^a: b; c$"):
        runs.measure(3, captured=True)


def test_memory_is_measured_and_bounded_on_cuda_only(monkeypatch):
    import torch

    import clframe
    from clframe.build import build
    from clframe.cli.child import _prepare_device
    from clframe.cli.side_by_side import plan_runs

    bounds = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *values: bounds.append(values))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9 + device))
    setup = build(clframe.load_config("quickstart", SMALL))
    assert _prepare_device(setup, share=0.5) == {} and bounds == []

    class Measured:
        def measure(self, seed, *, captured):
            assert (seed, captured) == (4, True)
            return Memory(peak=GIB, free=10 * GIB, total=10 * GIB, captured=captured)

    monkeypatch.setattr("clframe.cli.side_by_side.available_cores", lambda: 16.0)
    on_cpu = plan_runs(Measured(), setup.config, seeds=range(4, 24), jobs=None)
    assert (on_cpu.jobs, on_cpu.threads) == (16, 1)  # quickstart trains on the CPU with one thread
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = clframe.load_config("quickstart", [*SMALL, "trainer.accelerator=cuda", "trainer.devices=[1]"])
    found = plan_runs(Measured(), config, seeds=range(4, 24), jobs=None)
    assert found.jobs == 2

    class Eager(Measured):
        def measure(self, seed, *, captured):
            assert not captured
            return Memory(peak=GIB, free=10 * GIB, total=10 * GIB, captured=captured)

    for changes in (["strategy=agem"], ["trainer.capture=false"], ["trainer.engine=trainer"]):
        eager = clframe.load_config("quickstart", [*SMALL, "trainer.accelerator=cuda", *changes])
        assert plan_runs(Eager(), eager, seeds=range(4, 24), jobs=None).jobs == 6
    assert plan_runs(None, config, seeds=range(4, 24), jobs=5).memory_share == 0.9 / 5  # given: nothing is measured
    on_cuda = replace(setup, config=replace(setup.config, trainer=config.trainer))
    assert _prepare_device(on_cuda, share=0.25) == {"device": 1, "free": 7, "total": 10}
    assert bounds == [(0.25, 1)]


@pytest.mark.gpu
def test_on_a_gpu(call, here):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    code, out, err = call("run", "quickstart", *SMALL, "trainer.accelerator=cuda", "--seeds", "0..2", "--jobs", "auto")
    assert code == 0, err
    assert re.match(r"\d runs? at a time \(auto\): .*; a short run reserved 0\.\d of ", out)
    assert len(list(here.glob("runs/quickstart/*/results.json"))) == 3


def run(*arguments, cwd, **options):
    import subprocess

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "clframe", "run", "quickstart", *SMALL, *arguments]
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True, **options)  # fmt: skip


@pytest.mark.slow
def test_runs_side_by_side_are_those_of_one_after_the_other(call, here):
    import json

    import torch

    options = ("run", "quickstart", *SMALL, "--seeds", "0..1")
    one = call(*options, "--output", "one")
    two = call(*options, "--output", "two", "--jobs", "2")
    assert one.code == two.code == 0
    assert two.out.startswith("2 runs at a time: ")
    summaries = [out[out.index("Mean ± sample") :] for out in (one.out, two.out)]
    assert summaries[0] == summaries[1]
    for seed in (0, 1):
        (first,) = here.glob(f"one/quickstart/er+lwf-seed{seed}-*")
        (second,) = here.glob(f"two/quickstart/er+lwf-seed{seed}-*")
        names = [sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if "events" not in path.name)
                 for folder in (first, second)]  # fmt: skip
        assert names[0] == names[1]
        assert (first / "config.yaml").read_text().replace("output: one", "output: two") == (
            second / "config.yaml"
        ).read_text()
        states = [torch.load(f / "checkpoints" / "experience_002.ckpt", weights_only=True) for f in (first, second)]
        weights = [state["network"] for state in states]
        assert weights[0].keys() == weights[1].keys() and len(weights[0]) > 2
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items()
                   if isinstance(value, torch.Tensor))  # fmt: skip
        results = [json.loads((folder / "results.json").read_text()) for folder in (first, second)]
        assert results[0]["accuracy_matrix"] == results[1]["accuracy_matrix"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of another kind")
def test_ctrl_c_saves_every_run(here):
    process = run("trainer.epochs=1000", "--seeds", "0..2", "--jobs", "2", "--output", "out", cwd=here)
    import time

    try:
        for _ in range(1200):
            if len(list(here.glob("out/quickstart/*/log.txt"))) == 2:
                break
            time.sleep(0.1)
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    commands = [shlex.split(line) for line in err.splitlines() if line.startswith("  clframe run ")]
    assert len(commands) == 3 and commands[2][-2:] == ["--seeds", "2"]
    for command in commands[:2]:
        folder = here / command[command.index("--resume") + 1]
        assert list((folder / "checkpoints").glob("inside_001_step_*.ckpt"))
        assert re.search(r"  saved at experience 1, epoch \d+, step \d+\n", (folder / "log.txt").read_text())
