"""Notices about the data reach the terminal: plain lines on stderr, before training."""

from __future__ import annotations

import logging

import numpy as np
import pytest

import clframe.api
import clframe.execution
from clframe.cli import main

DEVELOPMENT = (
    "development run: {} experience(s), one epoch of 2 batches each, evaluation on 2 batches per experience; its "
    "results are not those of the config\n"
)
UNEVEN = "digits: 10 classes in 3 experiences = 4 + 3 + 3\n"
DATA = logging.getLogger("clframe.data")


@pytest.fixture
def mine(here):
    """Overrides for arrays of which two test samples are trained on as well; 0.000002 GB."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (32, 8, 8), dtype=np.uint8), np.arange(32) % 4
    np.savez("mine.npz", x_train=x[:26], y_train=y[:26], x_test=x[24:], y_test=y[24:])
    return ["benchmark=npz", "benchmark.path=mine.npz", "benchmark.experiences=2", "backbone.width=2"]


KEPT = "mine: 0.000 GB of inputs, limit 4 GB: stored in memory\n"
TWICE = "mine.npz: 2 of 8 test samples are also in the training data; accuracy will be overestimated\n"


def test_explain_says_it_beside_what_it_prints(call, mine):
    code, out, err = call("explain", "quickstart", "benchmark.experiences=3")
    assert (code, err) == (0, UNEVEN) and out.startswith("config\n")
    code, out, err = call("explain", "quickstart", *mine)
    assert (code, err) == (0, KEPT + TWICE) and "stored in memory" not in out


def test_run_says_it_before_training_once_for_all_seeds(call, monkeypatch, capsys):
    before = []

    def session(*_, **__):
        before.append(capsys.readouterr().err)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(clframe.execution, "new_session", session)
        assert call("run", "quickstart", "benchmark.experiences=3").code == 130
    assert before == [UNEVEN]
    tiny = ("benchmark.experiences=3", "trainer.fast_dev_run=3", "backbone.width=2")
    code, out, err = call("run", "quickstart", *tiny, "--seeds", "0..1")
    assert (code, err) == (0, UNEVEN + DEVELOPMENT.format(3)) and "experience 3/3" in out


def test_a_resumed_run_says_it_too(call, here):
    call("run", "quickstart", "benchmark.experiences=3", "trainer.fast_dev_run=2", "backbone.width=2")
    (folder,) = here.glob("runs/quickstart/*")
    said = f"{UNEVEN}{folder}: is finished; nothing to train\n{DEVELOPMENT.format(2)}"
    assert call("run", "--resume", str(folder)).err == said


def test_quiet_leaves_warnings_only(call, mine):
    code, out, err = call("run", "quickstart", *mine, "trainer.fast_dev_run=true", "--quiet")
    assert (code, err) == (0, TWICE) and out.count("\n") == 1


def test_a_refused_call_leaves_its_error_only(refused, call, mine):
    np.savez("odd.npz", x=np.random.default_rng(1).integers(0, 256, (9, 2, 2), dtype=np.uint8), y=np.arange(9) % 3)
    refused(["run", "quickstart", "benchmark=npz", "benchmark.path=odd.npz", "benchmark.experiences=4"],
            "benchmark.experiences: found 4 for 3 classes")  # fmt: skip
    code, out, err = call("explain", "quickstart", *mine, "benchmark.experiences=9")
    assert (code, out) == (2, "")
    assert err == TWICE + "clframe: error: benchmark.experiences: found 9 for 4 classes; give at most 4\n"


def test_workers_for_data_in_memory_are_named(call):
    code, _, err = call("explain", "quickstart", "benchmark.workers=2")
    assert (code, err) == (0, "benchmark.workers: found 2, but digits is in memory and needs none\n")
    assert call("explain", "quickstart", "benchmark.workers=0").err == ""


@pytest.mark.parametrize("what", ["strategies", "benchmarks", "configs"])
def test_lists_say_nothing(call, what):
    assert call("list", what).err == ""


def test_the_log_is_left_as_it_was(call, mine):
    before = (DATA.level, list(DATA.handlers), DATA.propagate, list(logging.getLogger().handlers))
    assert main(["explain", "quickstart", *mine]) == 0
    assert main(["explain", "quickstart", *mine, "benchmark.experiences=9"]) == 2
    assert (DATA.level, list(DATA.handlers), DATA.propagate, list(logging.getLogger().handlers)) == before


def test_from_python_nothing_is_printed(mine, capsys):
    clframe.api.explain("quickstart", ["benchmark.experiences=3"])
    clframe.api.explain("quickstart", mine[:-1])
    captured = capsys.readouterr()
    assert captured.out == "" and UNEVEN not in captured.err and KEPT not in captured.err
