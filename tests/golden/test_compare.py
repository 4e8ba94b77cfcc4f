"""The comparison of two revisions finds every difference, and none where there is none."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from clframe.training.tensorboard import GRADIENT_NORM

sys.path.insert(0, str(Path(__file__).parent))
try:
    import compare
finally:
    sys.path.remove(str(Path(__file__).parent))


def folder(path, *, accuracy=0.5, loss="0.25", norm="1.5", weight=1.0):
    (path / "checkpoints").mkdir(parents=True)
    (path / "results.json").write_text(json.dumps({"accuracy_matrix": [[accuracy, 1.0]], "train_seconds": 3.0}))
    rows = ["0,1,loss/task/ce,0.5", f"0,1,{GRADIENT_NORM},{norm}", "0,1,train/seconds,3", f"0,2,loss/task/ce,{loss}"]
    (path / "metrics.csv").write_text("\n".join(["experience,step,name,value", *rows, ""]))
    torch.save({"network": {"w": torch.tensor([weight, 2.0])}}, path / "checkpoints" / "experience_002.ckpt")
    return path


@pytest.mark.parametrize(
    "change, line",
    [
        ({}, None),
        ({"accuracy": 0.75}, "results.json accuracy_matrix[0][0]: 0.5 before, 0.75 after"),
        ({"loss": "0.2500000001"}, "metrics.csv loss/task/ce[1]: 0.25 before, 0.2500000001 after"),
        ({"norm": "1.25"}, f"metrics.csv {GRADIENT_NORM}[0]: 1.5 before, 1.25 after"),
        ({"weight": 1.0 + 2**-20}, "weights w[0]: 1.0 before, 1.0000009536743164 after"),
    ],
)
def test_each_kind_of_number_is_compared(tmp_path, change, line):
    sides = compare.numbers(folder(tmp_path / "a")), compare.numbers(folder(tmp_path / "b", **change))
    assert [found for found, _ in compare.differences(*sides)] == ([] if line is None else [line])


def test_missing_series_and_nan():
    assert list(compare.differences({"a": [math.nan]}, {"a": [math.nan]})) == []
    assert list(compare.differences({"a": [1.0]}, {"a": [math.nan]})) != []
    assert list(compare.differences({"a": [1.0]}, {"b": [1.0]})) == [
        ("a: only before", math.inf),
        ("b: only after", math.inf),
    ]


def test_an_unknown_revision_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"compare: cannot unpack 'no-such' \(.*\); give a revision that git knows"):
        compare.unpack("no-such", tmp_path / "source")


@pytest.mark.slow
def test_the_working_tree_equals_itself(capsys):
    assert compare.main([".", ".", "backbone=mlp", "benchmark.experiences=2"]) == 0
    assert "no difference in " in capsys.readouterr().out
