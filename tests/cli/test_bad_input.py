"""Invalid calls: one line with the option, what was found and what to do.

Nothing here reaches training: whatever can be checked is checked before a run folder is made.
"""

from __future__ import annotations

import os

import pytest
import torch

import clframe.execution
from clframe.cli import main
from clframe.errors import UnsupportedError

pytestmark = pytest.mark.usefixtures("no_training")

COMMAND_LINES = [
    (["rn", "quickstart"], "unknown verb 'rn'; did you mean 'run'?"),
    (
        ["zzz"],
        "unknown verb 'zzz'; nothing is close to it (known: analyze, card, check, evaluate, exits, explain, export, extend, latency, list, moefy, predict, report, reproduce, run, runs, sweep)",
    ),
    (["--bogus"], "unknown option '--bogus'; did you mean '--debug'?"),
    (["run"], "run: found no config; begin with one, such as clframe run quickstart"),
    (["run", ""], "run: found no config; begin with one"),
    (["explain"], "explain: found no config; begin with one, such as clframe explain quickstart"),
    (["run", "seed=3"], "run: found 'seed=3' instead of a config; begin with one"),
    (["run", "quickstart", "--sed", "3"], "run: unknown option '--sed'; did you mean '--seed'?"),
    (["run", "quickstart", "--out=x"], "run: unknown option '--out'; did you mean '--output'?"),
    (["run", "quickstart", "-x"], "run: unknown option '-x'; options are --allow-imports, --debug, --deterministic, --device"),
    (["explain", "quickstart", "--output", "x"], "explain: unknown option '--output'; options are"),
    (["run", "quickstart", "--seeds"], "run: argument --seeds: expected one argument; see clframe run"),
    (["run", "quickstart", "--quiet=3"], "run: argument --quiet:", "'3'; see clframe run --help"),
    (["run", "quickstart", "--seed", "x"], "--seed: found 'x'; give a whole number from 0"),
    (["run", "quickstart", "--seed", "-1"], "--seed: found '-1'; give a whole number from 0"),
    (["run", "quickstart", "--seed", "1.5"], "--seed: found '1.5'; give a whole number from 0"),
    (["run", "quickstart", "--seed", "9" * 19], "seed: found 9999999999999999999; give a number that"),
    (["run", "quickstart", "--seed", "3", "--seeds", "0..1"], "--seeds: found 0..1 together with --seed"),
    (["run", "quickstart", "seed=3", "--seeds", "1..2"], "--seeds: found 1..2 together with seed=3; give one of them"),
    (["explain", "quickstart", "seed=3", "--seed", "4"], "--seed: found 4 together with seed=3; give one of them"),
    (["run", "quickstart", "name=a", "--name", "b"], "--name: found b together with name=a; give one of them"),
    (["run", "quickstart", "--name", ""], "name: found '' (text); give a short name that can be a folder name"),
    (["run", "quickstart", "output=a", "--output", "b"], "--output: found b together with output=a; give one of them"),
    (["run", "quickstart", "trainer.deterministic=false", "--deterministic"], "--deterministic: found it together with trainer.deterministic=false; give one of them"),
    (["run", "quickstart", "trainer.accelerator=cuda", "--device", "cpu"], "--device: found cpu together with trainer.accelerator=cuda; give one of them"),
    (["explain", "quickstart", "trainer.devices=2", "--device", "cuda:1"], "--device: found cuda:1 together with trainer.devices; give one of them"),
    (["extend", "x", "benchmark=digits", "trainer.accelerator=cuda", "--device", "cpu"], "--device: found cpu together with trainer.accelerator=cuda; give one of them"),
    (["extend", "x", "benchmark=digits", "output=a", "--output", "b"], "--output: found b together with output=a; give one of them"),
    (["sweep", "quickstart", "trainer.accelerator=cuda,cpu", "--device", "cpu", "--folder", "x"], "--device: found cpu together with trainer.accelerator=cuda,cpu; give one of them"),
    (["run", "quickstart", "--seeds", "a"], "--seeds: found 'a'; give a range such as 0..4"),
    (["run", "quickstart", "--seeds", "3..1"], "--seeds: found '3..1', which counts down; write 1..3"),
    (["run", "quickstart", "--seeds", "0,2,0"], "--seeds: found '0,2,0'", "a seed twice; give each"),
    (["run", "quickstart", "--seeds=-1..1"], "--seeds: found '-1..1'; give a range"),
    (["run", "quickstart", "--seeds", "0..1,x"], "--seeds: found '0..1,x'; give a range such as 0..4 or a list such as 0,3,7"),
    (["run", "quickstart", "--seeds", "0..99999999999"], "--seeds: found '0..99999999999'; give at most"),
    (["run", "quickstart", "--device", "cud"], "--device: found 'cud'; did you mean 'cuda'?"),
    (["run", "quickstart", "--device", "cuda:x"], "--device: found 'cuda:x'; give cpu, cuda, cuda:N, mps"),
    (["run", "quickstart", "--device", "cpu:1"], "--device: found 'cpu:1'; give cpu, cuda, cuda:N, mps or"),
    (["explain", "quickstart", "--device", ""], "--device: found ''; give cpu"),
    (["run", "quickstart", "--output", ""], "--output: found ''; give a folder"),
    (["run", "quickstart", "--output", "a\0b"], "output: found 'a\\x00b', which no path can be; give another"),
    (["run", "quickstart", "imports=null"], "imports: found null; give a list"),
    (["explain", "quickstart", "imports=[3]"], "imports[0]: found 3; give text, in quotes"),
    (["run", "quickstart", "explain"], "override 'explain': is not key=value; write it like trainer.epochs=3"),
    (["run", "quickstart", "=3"], "override '=3': is not key=value; write it like"),
    (["run", "quickstart", "trainer..epochs=3"], "override 'trainer..epochs=3': is not key=value; write it"),
    (["report", "x", "--output", ""], "--output: found ''; give a folder"),
    (["analyse", "sparsity", "x", "--output", ""], "--output: found ''; give a folder"),
    (["list"], "list: found no kind to list; give one of strategies, benchmarks, backbones, metrics, exit-metrics, confidence-measures, configs"),
    (["list", "strategis"], "list: unknown kind 'strategis'; did you mean 'strategies'?"),
    (["list", "strategies", "zzz"], "list strategies: nothing contains 'zzz'; leave the filter out"),
    (["list", "configs", "mlp", "er"], "list: found 'er' after the filter 'mlp'; give one filter"),
    (["list", "configs", "--seed", "3"], "list: unknown option '--seed'; options are --allow-imports, --debug, --help"),
    (["run", "quikstart"], "config: unknown config 'quikstart'; did you mean 'quickstart'?"),
    (["run", "experiment/quikstart"], "config: unknown config 'experiment/quikstart'; did you mean"),
    (["run", "mlp"], "config: 'mlp' is not an experiment; did you mean 'backbone/mlp'?"),
    (["run", "nowhere.yaml"], "config: no file 'nowhere.yaml'; give a file, or a name from clframe list"),
    (["run", "quickstart.yaml"], "config: no file 'quickstart.yaml'; did you mean 'experiment/quickstart'?"),
    (["run", "backbone/mlp"], "config: has no benchmark; set benchmark=NAME, or put benchmark/NAME"),
    (["run", "benchmark/digits"], "config: has no backbone; set backbone=NAME, or put backbone/NAME"),
    (["run", "--resume", ""], "--resume: found ''; give the run folder that a run printed"),
    (["run", "--resume", "nowhere"], "resume: no folder nowhere; give the run folder that a run"),
    (["run", "quickstart", "--resume", "x"], "--resume: found quickstart as well; leave it out"),
    (["run", "--resume", "x", "trainer.epochs=3"], "--resume: found trainer.epochs=3 as well; leave it"),
    (["run", "--resume", "x", "--seed", "3"], "--resume: found --seed as well; leave it out"),
    (["run", "--resume", "x", "--seeds", "0..1"], "--resume: found --seeds as well; leave it out"),
    (["run", "--resume", "x", "--output", "y"], "--resume: found --output as well; leave it out"),
    (["run", "--resume", "x", "--device", "cpu"], "--resume: found --device as well; leave it out"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, messages", [(a, messages) for a, *messages in COMMAND_LINES], ids=lambda v: " ".join(v)[:60])
def test_command_line(arguments, messages, refused, here):
    refused(arguments, *messages)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [["--device", "cuda"], ["--device", "cuda:1"], ["trainer.accelerator=gpu"]])
def test_no_gpu(arguments, refused, here):
    refused(["run", "quickstart", *arguments], "trainer.accelerator: found ",
            "but torch sees no GPU here; use cpu or auto")  # fmt: skip


@pytest.mark.parametrize("output", ["taken", "taken/below"])
def test_a_file_in_the_way_of_the_output(output, refused, here):
    (here / "taken").write_text("mine")
    refused(["run", "quickstart", "--output", output],
            f"output: {output}/quickstart cannot be written (Not a directory); choose another")  # fmt: skip


def test_the_folder_of_a_run_as_a_config(refused, here):
    (here / "done").mkdir()
    (here / "done" / "config.yaml").write_text("seed: 0\n")
    refused(["run", "done"], "config: done is the folder of a run; continue it with --resume done, or run its config again: done/config.yaml")


def test_a_file_in_the_way_of_the_name(refused, here):
    (here / "out").mkdir()
    (here / "out" / "quickstart").write_text("mine")
    refused(["run", "quickstart", "--output", "out"], "output: out/quickstart cannot be written")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_rights(refused, here):
    (here / "out").mkdir(mode=0o500)
    refused(["run", "quickstart", "--output", "out"],
            "output: out/quickstart cannot be written (Permission denied); choose another")  # fmt: skip


def test_a_folder_name_that_is_too_long_leaves_no_folder_above_it(refused, here):
    refused(["run", "quickstart", "--output", "deep/" + "n" * 300],
            "cannot be written (File name too long); choose another")  # fmt: skip


def test_a_full_disk_leaves_nothing(refused, here, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clframe.run_folder.write_atomically", full)
    refused(["run", "quickstart"], "output: runs/quickstart cannot be written (No space left")


def test_a_session_that_cannot_begin_leaves_nothing(refused, here, monkeypatch):
    def refusing(*_, **__):
        raise UnsupportedError("trainer: found something; choose others")

    monkeypatch.setattr(clframe.execution, "new_session", refusing)
    refused(["run", "quickstart"], "trainer: found something; choose others")
    (here / "runs").mkdir()  # a folder that was there stays
    refused(["run", "quickstart"], "trainer: found something; choose others")


def test_debug_shows_where_it_came_from(call):
    code, _, err = call("run", "quickstart", "seed=-1", "--debug")
    assert code == 2
    assert "Traceback (most recent call last)" in err and "checks.py" in err
    assert err.splitlines()[-1] == "clframe: error: seed: found -1; give a whole number from 0 to 2**63 - 1"
    assert "Traceback" in call("--debug", "list", "strategis").err


def test_every_verb_survives_nonsense(here, capsys):
    """Any words: exit code 0 or 2, never a traceback."""
    for verb in ("run", "explain", "list"):
        for word in ("", " ", "-", "--", "=", "a=b", "\n", "é", "../..", "/", "~", "x" * 5000):
            assert main([verb, word]) == 2
            assert capsys.readouterr().err.startswith("clframe: error: ")
