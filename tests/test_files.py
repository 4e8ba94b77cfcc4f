"""Atomic writes under faults: a file keeps its old content until the new one is complete."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from clframe.errors import RunFolderError
from clframe.files import remove_temporaries, write_atomically


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
