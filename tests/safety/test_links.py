"""Links that lead out of a run folder are refused by every command, and nothing outside is read or written."""

from __future__ import annotations

import os
import shutil

import pytest

import clframe
from clframe.errors import RunFolderError
from clframe.files import check_contained

FILES = [
    "config.yaml", "results.json", "environment.json", "ledger.json", "metrics.csv", "log.txt", "lock", "latency.json",
    "moefy.json", "confusion.npz", "checkpoints/experience_002.ckpt", "checkpoints/inside_003_step_000001.ckpt",
]  # fmt: skip
FOLDERS = ["checkpoints", "tensorboard", "figures", "report", "report/tables", "sparsity"]


@pytest.fixture
def outside(run):
    """Files of another person next to the run."""
    folder = run.parent / "outside"
    folder.mkdir()
    (folder / "file").write_text("secret: words\n")
    return folder


def link(path, target):
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)


CASES = [("report", "results.json"), ("report", "config.yaml"), ("resume", "checkpoints"), ("resume", "tensorboard")]


@pytest.mark.parametrize(
    "verb, name",
    [*CASES, *(pytest.param(v, n, marks=pytest.mark.slow) for v in ("report", "resume") for n in [*FILES, *FOLDERS])],
)
def test_a_link_out_of_the_folder(verb, name, run, outside, refused, readers):
    link(run / name, outside / "file" if name in FILES else outside)
    refused(readers[verb], f"run/{name}: is a link to ", "outside the run folder; replace it by the file or folder")
    assert os.listdir(outside) == ["file"] and (outside / "file").read_text() == "secret: words\n"


@pytest.mark.parametrize(
    "verb",
    [
        "predict",
        *(
            pytest.param(v, marks=pytest.mark.slow)
            for v in ("evaluate", "export", "extend", "card", "latency", "analyze")
        ),
    ],
)
def test_every_command_refuses_it(verb, run, outside, refused, readers):
    link(run / "checkpoints", outside)
    refused(readers[verb], "run/checkpoints: is a link to ", "outside the run folder")
    assert os.listdir(outside) == ["file"]


def test_a_link_to_what_does_not_exist_yet_is_not_written_through(run, outside, refused, readers):
    (run / "log.txt").unlink()
    (run / "log.txt").symlink_to(outside / "new")
    refused(readers["resume"], "run/log.txt: is a link to ")
    assert os.listdir(outside) == ["file"]


def test_a_relative_link_upwards(run, refused, readers):
    link(run / "metrics.csv", "../run/../inputs.npz")
    refused(readers["report"], "run/metrics.csv: is a link to ")


def test_a_pipe_does_not_block(run, refused, readers):
    (run / "metrics.csv").unlink()
    os.mkfifo(run / "metrics.csv")
    refused(readers["report"], "run/metrics.csv: is neither a file nor a folder; remove it")


def test_a_circle_of_links(run):
    (run / "a").symlink_to("b")
    (run / "b").symlink_to("a")
    check_contained(run)  # they lead nowhere, and stay inside
    assert len(clframe.load(run).classify(_inputs())) == 1


def test_links_inside_the_folder_and_to_the_folder_are_followed(run):
    (run / "checkpoints" / "latest.ckpt").symlink_to("experience_002.ckpt")
    (run.parent / "alias").symlink_to(run)
    expected = clframe.load(run).classify(_inputs())
    assert clframe.load(run.parent / "alias").classify(_inputs()).tolist() == expected.tolist()


def test_files_in_the_cache_of_the_hub_are_links_to_its_blobs(tmp_path):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    folder.mkdir(parents=True)
    (blobs / "f00").write_text("weights")
    (folder / "model.safetensors").symlink_to("../../blobs/f00")
    check_contained(folder)
    (folder / "config.yaml").symlink_to("../../other")
    with pytest.raises(RunFolderError, match=r"config\.yaml: is a link to "):
        check_contained(folder)


def _inputs():
    import torch

    return torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
