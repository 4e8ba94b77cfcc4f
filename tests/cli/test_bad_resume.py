"""Run folders that cannot be resumed: one line with the reason, and the folder is unchanged."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch


@pytest.fixture
def folder(finished, here):
    """A copy of a finished run."""
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
            "resume: run has no config.yaml; give the folder of a run, not one above it")  # fmt: skip


@pytest.mark.parametrize(
    "text, message, others",
    [
        ("a: [", "invalid YAML (", []),
        ("- a\n", "not a mapping of keys to values; write lines like", []),
        ("a: b\n", "config: unknown key 'a'; keys are backbone", ["benchmark", "backbone"]),
        ("trainer: 3\n", "trainer: found 3; give a mapping", ["benchmark", "backbone"]),
        ("trainer: {epochs: x}\n", "trainer.epochs: found 'x' (text); give a whole number", ["benchmark", "backbone"]),
        ("seed: 3\n", "config: has no benchmark; set benchmark=NAME", ["backbone"]),
    ],
)
def test_a_damaged_config(text, message, others, refused, here, folder):
    """Each fault has its line, with the file."""
    (folder / "config.yaml").write_text(text)
    lines = [f"run/config.yaml: {message}", *(f"error: run/config.yaml: config: has no {key}; set {key}=" for key in others)]
    refused(["run", "--resume", "run"], *lines, lines=len(lines))


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda _: b"", lambda _: b"no zip"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, call, caplog, folder, checkpoint):
    matrix = json.loads((folder / "results.json").read_text())["accuracy_matrix"]
    checkpoint.write_bytes(damage(checkpoint.read_bytes()))
    assert call("run", "--resume", "run").code == 0
    assert f"run/checkpoints/{checkpoint.name}: is damaged or no checkpoint of clframe; the one before" in caplog.text
    assert json.loads((folder / "results.json").read_text())["accuracy_matrix"] == matrix


@pytest.fixture
def only(folder, checkpoint):
    """The newest checkpoint, with no earlier one to use instead."""
    for other in folder.glob("checkpoints/*.ckpt"):
        if other != checkpoint:
            other.unlink()
    return checkpoint


def test_without_an_intact_checkpoint_it_is_refused(refused, here, only):
    only.write_bytes(b"not a zip")
    refused(["run", "--resume", "run"], f"run/checkpoints/{only.name}: is damaged or no checkpoint of clframe, and no "
            "intact one is left; restore it from a copy, or start a new run")  # fmt: skip


def test_a_checkpoint_that_would_run_code(refused, here, only):
    class Hack:
        def __reduce__(self):
            return os.mkdir, (str(here / "hacked"),)

    torch.save({"format": 1, "finished": Hack()}, only)
    refused(["run", "--resume", "run"], "is damaged or no checkpoint of clframe, and no intact one is left")


def test_a_checkpoint_of_another_format(refused, here, checkpoint):
    torch.save({"format": 99}, checkpoint)
    refused(["run", "--resume", "run"], f"run/checkpoints/{checkpoint.name}: has format 99, "
            "this version reads", "; use the version that wrote it")  # fmt: skip


def test_a_run_of_a_version_without_some_keys_resumes(call, folder):
    """Keys that a newer version added have their defaults, in config.yaml as in the checkpoint."""

    def older(text):
        keys = ("betas", "step", "warmup", "drop_last")
        return "".join(line for line in text.splitlines(True) if line.split(":")[0].strip() not in keys)

    config = folder / "config.yaml"
    assert len(older(config.read_text()).splitlines()) == len(config.read_text().splitlines()) - 5  # optimizer.warmup and trainer.ema.warmup
    config.write_text(older(config.read_text()))
    for path in folder.glob("checkpoints/*.ckpt"):
        content = torch.load(path, weights_only=True)
        torch.save({**content, "config": older(content["config"])}, path)
    assert call("run", "--resume", "run").code == 0


def test_a_checkpoint_of_another_config(refused, here, folder):
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("seed: 3", "seed: 4"))
    refused(["run", "--resume", "run"],
            "run/checkpoints: was written by another config; resume with the run's own config")  # fmt: skip
