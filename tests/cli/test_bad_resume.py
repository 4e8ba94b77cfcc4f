"""Run folders that cannot be gone on with: one line says why, and the folder stays as it is."""

from __future__ import annotations

import os
import shutil

import pytest
import torch


@pytest.fixture
def folder(finished, here):
    """A copy of a run that ended."""
    return shutil.copytree(finished[0], here / "run")


@pytest.fixture
def checkpoint(folder):
    return sorted(folder.glob("checkpoints/*.ckpt"))[-1]


def test_not_a_folder(refused, here):
    (here / "run").write_text("mine")
    refused(["run", "--resume", "run"], "resume: no folder run; give the run folder")


def test_no_config(refused, here, folder):
    (folder / "config.yaml").unlink()
    refused(["run", "--resume", "run"],
            "resume: run holds no config.yaml; give the folder of a run, not one above it")  # fmt: skip


@pytest.mark.parametrize(
    "text, said",
    [
        ("a: [", "run/config.yaml: is no valid YAML ("),
        ("- a\n", "run/config.yaml: holds no mapping of keys to values; write lines like"),
        ("a: b\n", "run/config.yaml: config: unknown key 'a'; keys are backbone"),
        ("trainer: 3\n", "run/config.yaml: trainer: found 3; give a mapping"),
        ("trainer: {epochs: x}\n", "run/config.yaml: trainer.epochs: found 'x' (text); give a whole number"),
        ("seed: 3\n", "run/config.yaml: config: has no benchmark; set benchmark=NAME"),
    ],
)
def test_a_damaged_config(text, said, refused, here, folder):
    (folder / "config.yaml").write_text(text)
    refused(["run", "--resume", "run"], said)


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda _: b"", lambda _: b"no zip"])
def test_a_damaged_checkpoint(damage, refused, here, checkpoint):
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    refused(["run", "--resume", "run"], f"run/checkpoints/{checkpoint.name}: is damaged or "
            "no checkpoint of clframe; delete it to resume from the one before")  # fmt: skip


def test_a_checkpoint_that_would_run_code(refused, here, checkpoint):
    class Hack:
        def __reduce__(self):
            return os.mkdir, (str(here / "hacked"),)

    torch.save({"format": 1, "finished": Hack()}, checkpoint)
    refused(["run", "--resume", "run"], "is damaged or no checkpoint of clframe; delete it")


def test_a_checkpoint_of_another_format(refused, here, checkpoint):
    torch.save({"format": 99}, checkpoint)
    refused(["run", "--resume", "run"], f"run/checkpoints/{checkpoint.name}: has format 99, "
            "this version reads", "; resume with the version that wrote it")  # fmt: skip


def test_a_checkpoint_of_another_config(refused, here, folder):
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("seed: 3", "seed: 4"))
    refused(["run", "--resume", "run"],
            "run/checkpoints: was written by another config; resume with the run's own config")  # fmt: skip
