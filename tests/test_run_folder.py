"""Run folders: created, locked, repaired, or refused in one line."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import clframe
from clframe.errors import RunFolderError
from clframe.files import remove_temporaries, write_atomically
from clframe.run_folder import RunFolder, started_at, strategy_label

SMALL = ["backbone=mlp", "backbone.width=8", "trainer.epochs=1", "benchmark.experiences=2", "trainer.progress=false"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run, to be copied."""
    return clframe.run("quickstart", SMALL, output=tmp_path_factory.mktemp("finished")).run_folder


@pytest.mark.parametrize("inside", ["", "x"])
def test_an_output_folder_that_is_a_dangling_link_is_refused(tmp_path, inside):
    link = tmp_path / "runs"
    link.symlink_to(tmp_path / "unmounted" / "disk")
    with pytest.raises(RunFolderError, match=r"runs is a link to a folder that does not exist"):
        RunFolder.create(link / inside, name="a", seed=0)


def test_a_very_deep_output_folder_is_refused_in_one_line(tmp_path):
    with pytest.raises(RunFolderError, match="cannot be written") as caught:
        RunFolder.create(tmp_path / "/".join(["x"] * 3000), name="a", seed=0)
    assert len(str(caught.value)) < 500 and not (tmp_path / "x").exists()


def test_runs_of_one_second_get_folders_of_their_own(tmp_path):
    folders = [RunFolder.create(tmp_path, name="a", seed=0).path for _ in range(5)]
    assert len(set(folders)) == 5


def test_a_folder_is_called_by_strategy_seed_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form: form.replace("%Y%m%d", "20261129").replace("%H%M%S", "171500"))
    label = strategy_label("er(memory=50) + exits")
    names = [RunFolder.create(tmp_path, name="a", seed=7, label=label).path.name for _ in range(2)]
    assert names == ["er+exits-seed7-20261129-171500", "er+exits-seed7-20261129-171500-1"]
    assert RunFolder.create(tmp_path, name="a", seed=7).path.name == "seed7-20261129-171500"
    assert [started_at(Path(name)) for name in names] == ["20261129-171500"] * 2


@pytest.mark.parametrize(
    "strategy, plugins, label",
    [("naive", ["LwFPlugin", "EWCPlugin"], "naive+LwFPlugin+EWCPlugin"), ("lwf(a=(1, 2)) + er(b='x)')", (), "lwf+er"),
     ("a/b:c*?", (), "a_b_c_"), ("x" * 300, (), "x" * 80), ("é", (), "é")],
)  # fmt: skip
def test_labels_are_safe_names(tmp_path, strategy, plugins, label):
    assert strategy_label(strategy, plugins=plugins) == label
    assert RunFolder.create(tmp_path, name="a", seed=0, label=label).path.name.startswith(f"{label}-seed0-")


def test_a_second_process_is_refused_and_named(tmp_path):
    folder = RunFolder.create(tmp_path, name="a", seed=0)
    with folder.lock():
        with pytest.raises(RunFolderError) as caught, folder.lock():
            pass
        assert f"process {os.getpid()} on {socket.gethostname()} is writing to it" in str(caught.value)
    assert not (folder.path / "lock").exists()
    with folder.lock():
        pass


def test_the_lock_of_a_killed_process_is_stale(tmp_path):
    folder = RunFolder.create(tmp_path, name="a", seed=0)
    code = (
        "import os, signal, sys; from pathlib import Path; from clframe.run_folder import RunFolder\n"
        f"with RunFolder(Path({str(folder.path)!r})).lock(): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert (folder.path / "lock").exists()
    with folder.lock():
        pass


def test_a_full_disk_at_the_lock_is_one_line_and_removes_only_a_new_folder(tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path / "runs", name="a", seed=0)
    old = RunFolder(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    for one in (folder, old):
        with pytest.raises(RunFolderError, match=r": cannot be written \(No space left on device\); check the"), one.lock():
            raise AssertionError
    assert list(tmp_path.iterdir()) == []


def test_the_lock_that_a_child_of_a_killed_process_inherited_is_stale(tmp_path):
    """Loader workers live on for seconds."""
    folder = RunFolder.create(tmp_path, name="a", seed=0)
    code = (
        "import os, sys, time; from pathlib import Path; from clframe.run_folder import RunFolder\n"
        f"with RunFolder(Path({str(folder.path)!r})).lock():\n"
        "    child = os.fork()\n"
        "    if child == 0: os.close(1); os.close(2); time.sleep(60)\n"
        "    print(child, flush=True); os._exit(0)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, timeout=50)
    child = int(done.stdout)
    try:
        with folder.lock():
            pass
    finally:
        os.kill(child, 9)


def test_a_run_in_a_locked_folder_is_refused(tmp_path):
    result = clframe.run("quickstart", SMALL, output=tmp_path)
    with RunFolder(Path(result.run_folder)).lock(), pytest.raises(RunFolderError, match="is writing to it"):
        clframe.run(resume=result.run_folder)
    assert not (Path(result.run_folder) / "lock").exists()


def test_a_resumption_cleans_up_and_restores_the_folder_of_checkpoints(tmp_path):
    result = clframe.run("quickstart", SMALL, output=tmp_path)
    folder = Path(result.run_folder)
    mine = [folder / ".metrics.csv.725.tmp", folder / "checkpoints" / ".experience_005.ckpt.725.tmp"]
    theirs = folder / "notes.tmp"
    for path in (*mine, theirs):
        path.write_text("half")
    clframe.run(resume=folder)
    assert not any(path.exists() for path in mine) and theirs.exists()
    for path in (folder / "checkpoints").iterdir():
        path.unlink()
    (folder / "checkpoints").rmdir()
    again = clframe.run(resume=folder)  # from the start
    assert again.accuracy_matrix == result.accuracy_matrix


@pytest.mark.parametrize("damage", [b"experience,step,name,value\n0,1", b"\xff\xfe", b"a,b\n1,2\n", b"experience,step,name,value\n0,x,y,z\n"])
def test_a_damaged_metrics_file_is_one_line(finished, tmp_path, damage):
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / "metrics.csv").write_bytes(damage)
    with pytest.raises(RunFolderError, match=r"metrics\.csv: is damaged; delete it"):
        clframe.run(resume=folder)


def test_only_temporary_files_of_ours_are_removed(tmp_path):
    for name in (".a.json.12.tmp", ".a.tmp", "b.12.tmp", ".c.12.tmp.txt"):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.tmp", ".c.12.tmp.txt", "b.12.tmp"]


def test_a_read_only_file_system_is_one_line(tmp_path, monkeypatch):
    """Root may write anywhere, so the system call itself fails here."""

    def refuse(self, missing_ok=False):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(RunFolderError, match="cannot be written"):
        write_atomically(tmp_path / "missing" / "file", "text")


def test_a_run_folder_that_cannot_be_written_is_not_resumed(tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path, name="a", seed=0)

    def refuse(path, *rest, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RunFolderError, match=r"cannot be written \(Read-only file system\)"), folder.lock():
        pass
