"""Two processes never train one cell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from clframe.sweep import locks
from clframe.sweep.locks import STALE, claim, holder, lock_path


def write(tmp_path, *, host="another-machine", pid=1, age=0.0, token="t"):
    path = lock_path(tmp_path, "k")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"host": host, "pid": pid, "token": token}))
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def this_host():
    import socket

    return socket.gethostname()


def test_one_at_a_time(tmp_path):
    with claim(tmp_path, "k") as mine:
        assert mine and holder(tmp_path, "k").pid == os.getpid()
        with claim(tmp_path, "k") as second, claim(tmp_path, "other") as other:
            assert not second and other
        assert holder(tmp_path, "k") is not None
    assert holder(tmp_path, "k") is None and not list(lock_path(tmp_path, "k").parent.iterdir())
    with pytest.raises(KeyError), claim(tmp_path, "k"):
        raise KeyError
    assert holder(tmp_path, "k") is None


def test_of_threads_that_start_together_one_wins(tmp_path):
    barrier, won = threading.Barrier(8), []
    done = threading.Event()

    def work():
        barrier.wait()
        with claim(tmp_path, "k") as mine:
            won.append(mine)
            done.wait(10)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(won) < 8:
        time.sleep(0.01)
    done.set()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True]


def test_a_process_of_this_machine_that_has_ended(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write(tmp_path, host=this_host(), pid=ended.pid)
    assert holder(tmp_path, "k") is None
    with claim(tmp_path, "k") as mine:
        assert mine


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="states of processes are read on Linux")
def test_a_process_that_nobody_has_waited_for(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    write(tmp_path, host=this_host(), pid=ended.pid)
    for _ in range(1000):
        if holder(tmp_path, "k") is None:
            break
        time.sleep(0.02)
    assert holder(tmp_path, "k") is None  # still in the table of processes
    ended.wait()


def test_a_lock_of_another_machine_is_stale_after_two_minutes_without_renewal(tmp_path):
    write(tmp_path, age=STALE - 30)
    assert holder(tmp_path, "k").host == "another-machine"
    with claim(tmp_path, "k") as mine:
        assert not mine
    path = write(tmp_path, age=STALE + 1)
    assert holder(tmp_path, "k") is None
    with claim(tmp_path, "k") as mine:
        assert mine and json.loads(path.read_text())["pid"] == os.getpid()


def test_half_a_lock_counts_until_it_is_stale(tmp_path):
    path = write(tmp_path)
    path.write_text('{"host": "x"')
    with claim(tmp_path, "k") as mine:
        assert not mine
    os.utime(path, (1, 1))
    with claim(tmp_path, "k") as mine:
        assert mine


def test_of_two_that_take_over_a_stale_lock_the_slower_one_restores_the_other(tmp_path):
    path = write(tmp_path, age=STALE + 1)
    stale = locks._read(path)
    with claim(tmp_path, "k") as mine:
        assert mine
        current = path.read_text()
        locks._remove(path, stale)  # what a second process does that has read the stale lock before
        assert path.read_text() == current
        assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_holder_renews_and_ends_when_it_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "RENEWED", 0.01)
    lost = threading.Event()
    with claim(tmp_path, "k", on_lost=lost.set) as mine:
        assert mine
        path = lock_path(tmp_path, "k")
        os.utime(path, (1, 1))
        for _ in range(1000):
            if path.stat().st_mtime > 1:
                break
            time.sleep(0.01)
        assert path.stat().st_mtime > 1 and not lost.is_set()
        write(tmp_path, token="another")
        assert lost.wait(10)
    assert json.loads(path.read_text())["token"] == "another"  # not removed
