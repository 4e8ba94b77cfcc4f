"""Atomic writes under faults: a file keeps its old content until the new one is complete."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from clframe.errors import RunFolderError
from clframe.files import remove_temporaries, require_writable, write_atomically
from clframe.targets.latency import time_run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    write_atomically(path, "old")
    return path


class PowerCut(BaseException):
    """Nothing catches it."""


def test_short_writes_are_completed(file, monkeypatch):
    whole = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: whole(handle, data[:7]))
    write_atomically(file, bytes(range(256)))
    assert file.read_bytes() == bytes(range(256))


@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk_keeps_the_old_content(after, file, monkeypatch):
    whole, calls = os.write, []

    def write(handle, data):
        calls.append(handle)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(handle, data[:2])

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(RunFolderError, match=r"file: cannot be written \(No space left on device\); check"):
        write_atomically(file, "new content")
    assert file.read_text() == "old" and [path.name for path in file.parent.iterdir()] == ["file"]


def test_a_disk_that_takes_nothing_is_full(file, monkeypatch):
    monkeypatch.setattr(os, "write", lambda handle, data: 0)
    with pytest.raises(RunFolderError, match="No space left on device"):
        write_atomically(file, "new")
    assert file.read_text() == "old"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_of_syncing_or_renaming_keeps_the_old_content(call, file, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(RunFolderError, match="Input/output error"):
        write_atomically(file, "new")
    assert file.read_text() == "old" and [path.name for path in file.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_power_cut_leaves_the_old_content_and_a_temporary_file(call, file, monkeypatch):
    def cut(*_, **__):
        raise PowerCut

    monkeypatch.setattr(os, call, cut)
    monkeypatch.setattr(Path, "unlink", cut)  # nothing runs after a power cut
    with pytest.raises(PowerCut):
        write_atomically(file, "new")
    monkeypatch.undo()
    assert file.read_text() == "old" and len(list(file.parent.iterdir())) == 2
    remove_temporaries(file.parent)
    assert [path.name for path in file.parent.iterdir()] == ["file"]


def test_the_folder_is_synced_after_the_rename(file, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, call=call: (order.append(name), call(*a))[1])
    write_atomically(file, "new")
    assert order == ["fsync", "replace", "fsync"] and file.read_text() == "new"


def test_folders_that_cannot_be_written_are_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"^--output: .*file is not a folder; choose another$"):
        require_writable(tmp_path / "file" / "below")
    require_writable(tmp_path / "new" / "below")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(RunFolderError, match=r"^--output: .* cannot be written; choose another folder$"):
        require_writable(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(RunFolderError, match=r"^latency: .* cannot be written; make the run folder writable$"):
        time_run(tmp_path)


def test_pipes_and_devices_are_written_to_and_remain(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_atomically(pipe, "found")
        assert os.read(reader, 16) == b"found"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode) and os.listdir(tmp_path) == ["pipe"]
    link = tmp_path / "null"
    link.symlink_to(os.devnull)
    write_atomically(link, "nothing")
    assert link.is_symlink() and stat.S_ISCHR(os.stat(os.devnull).st_mode)
