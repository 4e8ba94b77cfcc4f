"""``clframe run --tensorboard``: a real TensorBoard, asked over HTTP, gone when the command is."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

import clframe.execution
from clframe.cli.board import Board
from clframe.config.load import load_config
from clframe.errors import ConfigError, UnsupportedError

TINY = ("quickstart", "trainer.fast_dev_run=2", "benchmark.experiences=2", "backbone=mlp", "backbone.width=4")
LINE = re.compile(r"^TensorBoard: (http://localhost:\d+/)\?smoothing=0#custom_scalars&_smoothingWeight=0$", re.MULTILINE)


def get(url, path=""):
    with urllib.request.urlopen(f"{url}{path}", timeout=20) as answer:
        return answer.read().decode()


def eventually(ask, *, within=60.0):
    """The first true value of ``ask``: TensorBoard reads files asynchronously."""
    end = time.monotonic() + within
    while not (found := ask()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


def closed(url):
    port = int(url.rstrip("/").rsplit(":", 1)[1])
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) != 0


@pytest.fixture
def asked(monkeypatch):
    """Tags that a page open during the first run can read after the last experience."""
    seen, original = {}, clframe.execution._finish

    def finishing(*arguments):
        result = original(*arguments)
        if "url" not in seen or "tags" in seen:
            return result
        url = seen["url"]
        folder = Path(result.run_folder)
        seen["tags"] = eventually(lambda: json.loads(get(url, "data/plugin/scalars/tags")).get(f"{folder.name}/tensorboard"))
        seen["page"] = get(url)
        return result

    original_start = Board.start

    def start(self, folder):
        original_start(self, folder)
        seen["url"], seen["starts"] = self.url, seen.get("starts", 0) + 1

    monkeypatch.setattr(clframe.execution, "_finish", finishing)
    monkeypatch.setattr(Board, "start", start)
    return seen


@pytest.mark.slow
def test_a_run_can_be_watched_and_nothing_stays(call, asked):
    code, out, _ = call("run", *TINY, "--tensorboard")
    assert code == 0
    assert LINE.findall(out) == [asked["url"]]
    assert {"1_progress/accuracy", "1_progress/macs_per_prediction", "loss/task/ce"} <= set(asked["tags"])
    assert "<html" in asked["page"]
    assert closed(asked["url"])


@pytest.mark.slow
def test_several_seeds_share_a_board_and_quiet_says_nothing(call, asked):
    code, out, err = call("run", *TINY, "--tensorboard", "--seeds", "0..1", "--quiet")
    assert code == 0
    assert err == ""
    assert re.fullmatch(r"(\d\.\d{4}\n){2}\n?(.*\n)*", out)
    assert "TensorBoard" not in out
    assert asked["starts"] == 1
    assert closed(asked["url"])


def test_a_resumed_run_is_shown_from_where_it_lies(call, here, asked):
    call("run", *TINY)
    (folder,) = (here / "runs" / "quickstart").iterdir()
    moved = here / "elsewhere" / folder.name
    moved.parent.mkdir()
    folder.rename(moved)
    code, out, _ = call("run", "--resume", str(moved), "--tensorboard")
    assert code == 0
    assert len(LINE.findall(out)) == 1
    assert set(asked["tags"]) >= {"1_progress/accuracy", "final/final_average_accuracy"}


def test_an_error_stops_it_too(call, monkeypatch):
    urls = []

    def failing(parts, folder, session, progress):
        raise ConfigError("here: found something wrong; fix it")

    original = Board.start
    monkeypatch.setattr(Board, "start", lambda self, folder: (original(self, folder), urls.append(self.url)))
    monkeypatch.setattr(clframe.execution, "_finish", failing)
    code, _, err = call("run", *TINY, "--tensorboard")
    assert code == 2
    assert "here: found something wrong" in err
    assert closed(urls[0])


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_goes_with_a_command_that_is_interrupted_or_killed(number, code, here):
    command = [sys.executable, "-m", "clframe", "run", "quickstart", "backbone=mlp", "trainer.epochs=4000", "--tensorboard"]
    # Children of a background job of a shell ignore SIGINT by default.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=here, preexec_fn=heed
    )
    url = next(found[1] for line in process.stdout if (found := LINE.match(line.strip())))
    assert not closed(url)
    os.kill(process.pid, number)
    process.stdout.close()
    assert process.wait(timeout=60) == code
    assert eventually(lambda: closed(url))


def test_a_taken_port_is_left_alone(tmp_path):
    writer = SummaryWriter(str(tmp_path / "run" / "tensorboard"))
    writer.add_scalar("x", 1.0, 0)
    writer.close()
    with Board(wanted=True, echo=None) as first, Board(wanted=True, echo=None) as second:
        first.start(tmp_path)
        second.start(tmp_path)
        assert first.url != second.url
        for board in (first, second):
            tags = eventually(lambda url=board.url: json.loads(get(url, "data/plugin/scalars/tags")))
            assert tags == {"run/tensorboard": {"x": {"displayName": "", "description": ""}}}
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        get(first.url)


def test_it_says_why_it_cannot_start(tmp_path, monkeypatch):
    (tmp_path / "tensorboard.py").write_text("raise ImportError('no such wheel for this machine')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UnsupportedError, match=r"^--tensorboard: cannot start TensorBoard \(no such wheel.*\); leave"):
        Board(wanted=True, echo=None).start(tmp_path)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UnsupportedError, match=r"\(the process ended\)"):
        Board(wanted=True, echo=None).start(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    with pytest.raises(UnsupportedError, match=r"No such file"):
        Board(wanted=True, echo=None).start(tmp_path)


def test_a_run_that_writes_no_event_files_has_nothing_to_show(refused):
    refused(["run", *TINY, "trainer.loggers=[csv]", "--tensorboard"], "--tensorboard", "trainer.loggers")


def test_not_asked_for_nothing_starts():
    with Board(wanted=False, echo=print) as board:
        board.show(load_config("quickstart", []))
        assert board.url == ""
    board.stop()
