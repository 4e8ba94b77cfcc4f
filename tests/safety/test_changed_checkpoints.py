"""A checkpoint whose data or states were changed ends in one line, not in wrong names of classes or a traceback."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import clframe


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose exit policy has thresholds and a fitted measure, and its last checkpoint."""
    words = ["strategy=er + exits + early_exit(measure='gate', budget=0.7)", "benchmark.experiences=2", "backbone=mlp",
             "backbone.width=8", "trainer.epochs=1", "trainer.progress=false", "trainer.loggers=[]",
             "benchmark.validation=0.2"]  # fmt: skip
    folder = clframe.run("quickstart", words, output=tmp_path_factory.mktemp("runs")).run_folder
    content = torch.load(f"{folder}/checkpoints/experience_002.ckpt", weights_only=True)
    return folder, content


@pytest.fixture
def change(trained, here):
    """Write a copy of the run with a changed checkpoint."""
    folder, content = trained
    np.savez(here / "inputs.npz", x=np.zeros((2, 1, 8, 8), dtype=np.uint8))

    def changing(edit):
        copy = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
        edit(copy)
        shutil.copytree(folder, here / "run", dirs_exist_ok=True)
        torch.save(copy, here / "run" / "checkpoints" / "experience_002.ckpt")

    return changing


def test_the_unchanged_checkpoint_predicts(change, call, readers):
    change(lambda content: None)
    code, out, err = call(*readers["predict"])
    assert code == 0 and err == "" and "2 predictions" in out


NAMES = tuple("abcdefghij")


@pytest.mark.parametrize("key, value, reason", [
    ("class_order", tuple(range(2, 10)), "(class_order has 8 classes, the network 10 outputs)"),
    ("class_order", (), "(class_order has 0 classes, the network 10 outputs)"),
    ("class_order", (-1, *range(9)), "class_order (-1, 0, 1, 2, 3, 4, 5, 6, 7, 8), expected different class ids from 0"),
    ("class_order", (0, *range(9)), "expected different class ids from 0"),
    ("class_order", "0123456789", "expected different class ids from 0"),
    ("class_order", tuple(range(1, 11)), "class_names has 10 entries, class_order ids up to 10"),
    ("class_names", NAMES[1:], "class_names has 9 entries, class_order ids up to 9"),
    ("class_names", (1,) * 10, "class_names has 10 entries"),
    ("mean", (1.0, 2.0), "2 values of mean and 1 of std for inputs of shape (1, 8, 8)"),
    ("mean", "a", "mean ('a',) and std"),
    ("mean", None, ""),
    ("mean", (float("inf"),), "expected finite numbers and a std above 0"),
    ("std", (-1.0,), "expected finite numbers and a std above 0"),
    ("std", (0.0,), "expected finite numbers and a std above 0"),
    ("std", (), "1 values of mean and 0 of std"),
    ("inputs", {"kind": "image", "largest": 0}, "images of shape (1, 8, 8) with values up to 0"),
    ("inputs", {"kind": "words", "n_features": 9}, "vectors of 9 words for inputs of shape (1, 8, 8)"),
    ("inputs", {"kind": "tokens"}, "inputs of kind 'tokens' with mean and std"),
    ("inputs", {"kind": "image", "largest": "x"}, "inputs.largest: found"),
])  # fmt: skip
def test_data(key, value, reason, change, refused, readers):
    change(lambda content: content["data"].update({key: value}))
    refused(readers["predict"], "run: the newest checkpoint does not fit its config (", reason)


@pytest.mark.parametrize("state", [
    {}, 5, {"thresholds": 0.5}, {"thresholds": ("a",), "gate": None, "exits": 2}, {"thresholds": 0.5, "gate": {}},
    {"thresholds": (0.5,) * 7, "gate": None, "exits": 2}, {"thresholds": float("nan"), "gate": None, "exits": 2},
], ids=repr)  # fmt: skip
def test_the_state_of_the_exit_policy(state, change, refused, readers):
    change(lambda content: content["components"].update(early_exit=state))
    refused(readers["predict"], "run: the newest checkpoint does not fit its config (")


def test_a_component_that_changes_predictions_needs_its_state(change, refused, readers):
    change(lambda content: content["components"].pop("early_exit"))
    refused(readers["predict"], "run: the newest checkpoint does not fit its config (no state of early_exit)")


@pytest.mark.parametrize("key, value", [
    ("tallies", (1,)), ("tallies", "x"), ("tallies", 3), ("past", (0, 0)), ("past", (99,)), ("past", ("a",)),
])  # fmt: skip
def test_counts_and_learned_classes(key, value, change, refused, readers):
    change(lambda content: content.update({key: value}))
    refused(readers["predict"], "run: the newest checkpoint does not fit its config (")


def test_an_extension_names_the_run_and_not_its_own_folder(change, refused, here):
    """The extension's folder no longer exists when the message is read."""
    change(lambda content: content["network"].pop(next(iter(content["network"]))))
    refused(["extend", "run", "benchmark=digits", "output=out"],
            "run: the newest checkpoint does not fit its config (", "restore both")  # fmt: skip
    assert not (here / "out").exists()


def test_a_copy_of_a_model(trained, here, call, refused):
    """The header of a safetensors file is as easily changed."""
    library = pytest.importorskip("safetensors.torch")
    folder, _ = trained
    np.savez(here / "inputs.npz", x=np.zeros((2, 1, 8, 8), dtype=np.uint8))
    assert call("export", folder, "--format", "safetensors", "--output", "copy")[0] == 0
    path = next((here / "copy").rglob("model.safetensors"))
    tensors = library.load_file(path)
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["clframe"])
    assert call("predict", path.parent, "inputs.npz")[0] == 0
    header["data"]["class_order"] = header["data"]["class_order"][1:]
    library.save_file(tensors, path, metadata={"clframe": json.dumps(header), "format": "pt"})
    refused(["predict", path.parent, "inputs.npz"], "(class_order has 9 classes, the network 10 outputs)")
