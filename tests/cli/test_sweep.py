"""``clframe sweep`` and ``clframe reproduce``."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import yaml
from fake_cells import SMALL, Recorder, finish

from clframe.cli import local, sweep, sweep_status
from clframe.cli.jobs import choose_jobs
from clframe.errors import ClframeError, ConfigError
from clframe.sweep.cells import read_cell, record_attempt
from clframe.sweep.locks import claim
from clframe.sweep.plan import plan_cells
from clframe.sweep.space import Space

WORDS = [f"{key}={values[0]}" for key, values in SMALL.items()]


@pytest.fixture
def launched(monkeypatch):
    """Replace the processes of a sweep by results of accuracy 0.5, or of ``launcher.accuracy``."""
    launcher = Recorder()
    monkeypatch.setattr("clframe.cli.local.LocalLauncher", lambda **options: launcher)
    return launcher


def test_what_is_refused(refused, here):
    (here / "s.yaml").write_text("config: quickstart\nlist: [{strategy: er}]\nseeds: 0..1\n")
    for words, message in [
        ([], "sweep: found no --folder; give the folder of the sweep"),
        (["--folder", "s"], "sweep: found no config; begin with one, such as clframe sweep quickstart"),
        (["optimizer.lr=1,2", "--folder", "s"], "sweep: found 'optimizer.lr=1,2' instead of a config; begin with one"),
        (["quickstartt", "--folder", "s"], "config: unknown config 'quickstartt'; did you mean 'quickstart'?"),
        (["quickstart", "er", "--folder", "s"], "sweep: found 'er', not key=values; write it"),
        (["quickstart", "seed=0", "--seed", "1", "--folder", "s"], "--seed: found 1 together with seed="),
        (["quickstart", "--folder", "s", "--launcher", "rai"], "--launcher: unknown launcher 'rai'; did you mean 'ray'?"),
        (["quickstart", "--folder", "s", "--launcher-option", "cpus=1"], "--launcher-option: found cpus with the launcher local"),
        (["quickstart", "--folder", "s", "--launcher-option", "cpus"], "--launcher-option: found 'cpus'; give each option once"),
        (["quickstart", "--folder", "s", "--jobs", "2", "--launcher", "ray"], "--jobs: found 2 with the launcher ray"),
        (["quickstart", "--folder", "s", "--per-device", "2", "--launcher", "ray"], "--per-device: found 2 with the launcher ray"),
        (["quickstart", "--folder", "s", "--per-device", "0"], "--per-device: found '0'; give a number from 1"),
        (["s.yaml", "strategy=lwf", "--folder", "s"], "strategy: is in the list of s.yaml as well; leave it out"),
        (["--status"], "--status: found 0 folders; give that of one sweep"),
        (["--status", "none"], "none: no such folder; give the folder of clframe sweep --folder"),
    ]:  # fmt: skip
        refused(["sweep", *words], message)
    refused(["sweep", "quickstart", "optimizer.lr=0.1,fast", "strategy=er,er+joint", "--folder", "s"],
            "optimizer.lr: found 'fast'", "strategy: 'er' and 'joint' both own the slot 'batch'", lines=2)  # fmt: skip


def test_per_device_needs_a_device(small_cells):
    launcher = local.LocalLauncher(quiet=True, jobs=None, per_device=2)
    with pytest.raises(ConfigError, match=r"^--per-device: found 2, but no cell trains on CUDA here; leave it out"):
        launcher.launch(small_cells)


@pytest.fixture
def small_cells(tmp_path):
    return plan_cells(tmp_path / "sweep", Space(config="quickstart", grid=SMALL, seeds=(0, 1)))


def test_processes_are_assigned_to_devices_in_turn(small_cells, monkeypatch):
    plan = choose_jobs(runs=9, jobs=None, cores=16, threads=1, devices=("3", "5"), per_device=2)
    assert plan.jobs == 4 and plan.devices == ("3", "5") and plan.memory_share == 0.9 / 2
    used: list = []
    for _ in range(4):
        used.append(plan.next_device(used))
    assert used == ["3", "5", "3", "5"]
    assert plan.next_device(["3", "5", "5"]) == "3"  # where a process has ended
    assert choose_jobs(runs=9, jobs=1, cores=4, threads=1, devices=("0",)).next_device([]) is None
    with pytest.raises(ConfigError, match=r"^--jobs: found 5, but 2 devices with --per-device 2 take 4; leave one"):
        choose_jobs(runs=9, jobs=5, cores=16, threads=1, devices=("3", "5"), per_device=2)
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5")
    assert local._cuda_devices(small_cells) == ()  # the quickstart trains on the CPU
    space = Space(config="quickstart", grid={**SMALL, "trainer.accelerator": ("cuda",)})
    on_cuda = plan_cells(small_cells[0].sweep, space)
    assert local._cuda_devices(on_cuda) == ("3", "GPU-5")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert local._cuda_devices(on_cuda) == ("0", "1")


def test_a_sweep_its_continuation_and_its_failures(call, launched):
    def accuracy(cell):
        if cell.seed == 1 and cell.config.strategy == "er":
            raise ClframeError("data: is odd; repair it")
        return 0.25 if cell.seed else 0.5

    launched.accuracy = accuracy
    command = ["sweep", "quickstart", *WORDS, "strategy=naive,er", "seed=0..1", "--folder", "s"]
    code, out, err = call(*command)
    assert code == 2 and "4 cells, 0 of them finished\n" in out
    failures = (
        "clframe: error: er, seed 1: data: is odd; repair it\n"
        "clframe: 1 of 4 cells failed; try them again with --retry\n"
    )
    assert err == failures
    assert re.search(r"^naive +2 +37\.5 ± 17\.7$", out, re.MULTILINE) and re.search(r"^er +1 +50\.0$", out, re.MULTILINE)
    launched.launched.clear()
    code, out, err = call(*command)
    assert code == 2 and err == failures and not launched.launched
    assert "4 cells, 3 of them finished, 1 failed before and left out (--retry trains it again)\n" in out
    launched.accuracy = lambda cell: 0.5
    code, out, err = call(*command, "--retry")
    assert code == 0 and [cell.seed for cell in launched.launched] == [1] and not err
    assert "4 cells, 3 of them finished\n" in out
    out = call("sweep", "--status", "s").out
    assert out.startswith("4 cells: 4 done, 0 running, 0 failed\n")


def test_a_failure_is_printed_once(call, monkeypatch):
    """When it happens; by the command that does not try the cell again, at the end."""

    def run(pool, tasks, plan, *, on_ended):
        for task in tasks:
            on_ended(SimpleNamespace(task=task, reason="data: is odd; repair it", locked=False, folder=None))

    monkeypatch.setattr(local.Pool, "run", run)
    command = ["sweep", "quickstart", *WORDS, "seed=0..1", "--folder", "s", "--jobs", "1"]
    failures = (
        "clframe: error: er + lwf, seed 0: data: is odd; repair it\n"
        "clframe: error: er + lwf, seed 1: data: is odd; repair it\n"
        "clframe: 2 of 2 cells failed; try them again with --retry\n"
    )
    for again in ([], [], ["--retry"]):
        code, _, err = call(*command, *again)
        assert (code, err) == (2, failures)


def test_the_status_of_every_kind_of_cell(call, here):
    grid = {**SMALL, "strategy": ("naive", "er")}
    cells = plan_cells(here / "s", Space(config="quickstart", grid=grid, seeds=(0, 1, 2)))
    finish(cells[0], 0.5, seconds=100.0)
    finish(cells[1], 0.7, seconds=300.0)
    record_attempt(here / "s", cells[3].key, seconds=1.0, failed="loss: is NaN; lower it")
    with claim(here / "s", cells[4].key):
        out = call("sweep", "--status", "s").out
        states = sweep_status._read(here / "s", {})
    # Two finished cells took 200 s each, three are left, one at a time: 600 s.
    assert out.splitlines()[0] == "6 cells: 2 done, 1 running, 1 failed, 2 waiting; about 10 min left"
    assert re.search(r"^er +0 +1 +1 +0 +1 +-$", out, re.MULTILINE)
    assert re.search(r"^naive +2 +0 +0 +0 +1 +60\.0 ± 14\.1$", out, re.MULTILINE)
    assert "failed: er, seed 0: loss: is NaN; lower it\n" in out
    assert sweep_status.time_left(states) == 600.0
    pytest.importorskip("rich")
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(sweep_status._rich_table(states))
    text = console.export_text()
    assert "about 10 min left" in text and "60.0 ± 14.1" in text and "failed: er, seed 0: loss: is NaN" in text


def test_a_sweep_file_with_words(here):
    (here / "s.yaml").write_text(yaml.safe_dump({
        "config": "quickstart", "grid": {"strategy": ["er", "lwf"], "trainer.epochs": 3}, "seeds": "0..4",
    }))  # fmt: skip
    parser = __import__("argparse").ArgumentParser()
    parser.add_argument("words", nargs="*")
    sweep.add_options(parser)
    options = parser.parse_args(["s.yaml", "strategy=naive", "optimizer.lr=0.1,0.2", "--seed", "7", "--device", "cuda:1"])
    space = sweep.read_space(options)
    assert space.grid == {
        "strategy": ("naive",), "trainer.epochs": ("3",), "optimizer.lr": ("0.1", "0.2"),
        "trainer.accelerator": ("cuda",), "trainer.devices": ("[1]",),
    }  # fmt: skip
    assert space.seeds == (7,)


TABLE = """
config: quickstart
grid: {strategy: [naive, er], SMALL}
seeds: 0..1
expected:
  source: a paper
  tolerance: {final_average_accuracy: 0.02, forgetting: 0.02}
  rows:
    first: {set: {strategy: naive}, final_average_accuracy: 0.51, forgetting: 0.0}
    second: {set: {strategy: er}, final_average_accuracy: 0.60}
""".replace("SMALL", ", ".join(f"{key}: {values[0]}" for key, values in SMALL.items()))


def test_numbers_are_compared_within_their_tolerance(call, here, launched):
    (here / "t.yaml").write_text(TABLE)
    launched.accuracy = lambda cell: 0.5 if cell.config.strategy == "naive" else 0.57
    code, out, _ = call("reproduce", "t.yaml:first")
    assert code == 0 and {cell.config.strategy for cell in launched.launched} == {"naive"}
    assert "Compared with a paper\n" in out
    assert re.search(r"^first +final average accuracy +51\.0 +50\.0 +-1\.0 +2\.0 +reproduced$", out, re.MULTILINE)
    assert re.search(r"^first +forgetting +0\.0 +0\.0 +\+0\.0 +2\.0 +reproduced$", out, re.MULTILINE)
    code, out, _ = call("reproduce", "t.yaml")
    assert code == 1 and len(launched.launched) == 4  # those of the first row are not trained again
    assert re.search(r"^second +final average accuracy +60\.0 +57\.0 +-3\.0 +2\.0 +not reproduced$", out, re.MULTILINE)
    assert len(list(here.glob("reproduced/t/*/results.json"))) == 4


@pytest.mark.slow
def test_a_published_row_is_reproduced(call):
    """Three runs of the quickstart with ``er``, as in docs/results.md."""
    code, out, err = call("reproduce", "digits:er")
    assert code == 0, err
    assert re.search(r"^er +final average accuracy +97\.9 +[\d.]+ +[+-][\d.]+ +3\.0 +reproduced$", out, re.MULTILINE)


def test_tables_that_cannot_be_compared(refused, here):
    (here / "t.yaml").write_text(TABLE)
    (here / "n.yaml").write_text("config: quickstart\n")
    (here / "w.yaml").write_text(TABLE.replace("set: {strategy: er}", "set: {strategy: lwf}"))
    (here / "l.yaml").write_text(TABLE.replace(", forgetting: 0.02", ""))
    for words, message in [
        ([], "reproduce: found no table; give one"),
        (["digit"], "reproduce: unknown table 'digit'; did you mean 'digits'?"),
        (["t.yaml:fist"], "reproduce: unknown row 'fist'; did you mean 'first'? (known: first, second)"),
        (["n.yaml"], "n.yaml: expected: has no stored numbers; give a sweep file"),
        (["w.yaml"], "expected: found a row with strategy=lwf, which no cell of the sweep has; correct its values"),
        (["l.yaml"], "l.yaml: expected.rows.first: found forgetting without a tolerance; add it to tolerance"),
        (["t.yaml", "seed=3"], "seed: found seeds, but stored numbers are means over those of the table; leave it out"),
    ]:  # fmt: skip
        refused(["reproduce", *words], message)


def small_sweep(*arguments, cwd, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    given = {word.partition("=")[0] for word in arguments}
    fast = [word for word in WORDS if word.partition("=")[0] not in given] + ["trainer.figures=none", "trainer.loggers=[]"]
    command = [sys.executable, "-m", "clframe", "sweep", "quickstart", *fast, "--folder", "s", *arguments]
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True, **options)  # fmt: skip


def attempts(here):
    return {path.stem: json.loads(path.read_text())["count"] for path in here.glob("s/.sweep/state/*.json")}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of another kind")
def test_a_killed_sweep_continues(here):
    """SIGKILL once one cell is finished and another one trains: that one saves, and is continued from there."""
    words = ("strategy=naive,er", "trainer.epochs=20", "benchmark.experiences=5", "--jobs", "1")
    process = small_sweep(*words, cwd=here)
    try:
        for _ in range(3000):
            trains = any(not (path.parents[1] / "results.json").exists() for path in here.glob("s/*/checkpoints/experience_001.ckpt"))
            if (len(list(here.glob("s/*/results.json"))) == 1 and trains) or process.poll() is not None:
                break
            time.sleep(0.1)
        assert process.poll() is None, process.communicate()
        (first,) = here.glob("s/*/results.json")
        stamp = first.stat().st_mtime_ns
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    for _ in range(1200):  # its child notices, and saves
        if not list(here.glob("s/.sweep/locks/*.lock")):
            break
        time.sleep(0.1)
    assert len(list(here.glob("s/*/results.json"))) == 1
    again = small_sweep(*words, cwd=here)
    out, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    assert "2 cells, 1 of them finished\n" in out and first.stat().st_mtime_ns == stamp
    logs = {path.parent.name.split("-")[0]: path.read_text() for path in here.glob("s/*/log.txt")}
    assert "resumed after" in logs["er"] and "resumed after" not in logs["naive"]
    assert attempts(here) == {read_cell(here / "s", key).key: 1 for key in attempts(here)}


@pytest.mark.slow
def test_two_sweeps_on_one_folder_train_each_cell_once(here):
    processes = [small_sweep("strategy=naive,er,lwf", "--jobs", "1", cwd=here) for _ in range(2)]
    outputs = [process.communicate(timeout=900) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted(attempts(here).values()) == [1, 1, 1]
    assert all("resumed" not in path.read_text() for path in here.glob("s/*/log.txt"))
    tables = [out[out.index("Mean ±") :] for out, _ in outputs]
    assert tables[0] == tables[1]


def test_a_device_leaves_the_number_of_devices_to_its_axis() -> None:
    from clframe.cli.sweep import device_axes

    options = argparse.Namespace(device="cpu")
    assert device_axes(options, given={}) == {"trainer.accelerator": ("cpu",), "trainer.devices": ("1",)}
    assert device_axes(options, given={"trainer.devices": ("1", "2")}) == {"trainer.accelerator": ("cpu",)}
