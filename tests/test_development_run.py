"""``trainer.fast_dev_run``: the first experiences only, few batches, and results that say what they are."""

from __future__ import annotations

import pytest

import clframe
from clframe.config.load import load_config
from clframe.data import class_incremental, digits
from clframe.data.streams import online_stream
from clframe.errors import RunFolderError
from clframe.stream import build_stream, development_experiences

FAST = ("backbone=mlp", "backbone.width=8", "trainer.progress=false", "trainer.loggers=[]", "trainer.figures=none",
        "trainer.batch_size=16")  # fmt: skip


@pytest.mark.parametrize(("wanted", "count"), [("false", 5), ("true", 1), ("1", 1), ("3", 3), ("9", 5)])
def test_the_stream_is_cut_off(wanted, count):
    config = load_config("quickstart", [f"trainer.fast_dev_run={wanted}"])
    source, benchmark = build_stream(config)
    complete = build_stream(load_config("quickstart"))[1]
    assert len(benchmark) == len(benchmark.train) == len(benchmark.test) == count
    assert benchmark.classes == complete.classes[:count] and benchmark.class_order == complete.class_order
    assert [s.y.tolist() for s in benchmark.test] == [s.y.tolist() for s in complete.test[:count]]
    assert source.classes == 10


def test_an_online_stream_is_cut_off_after_the_parts_of_its_experiences():
    whole = online_stream(class_incremental(digits(), experiences=5, validation=0.2), size=50, seed=0)
    cut = whole.first_experiences(2)
    assert len(cut.train) == whole.sub_experiences(1).stop < len(whole.train)
    assert sum(map(len, cut.train)) == sum(map(len, cut.original)) == sum(map(len, whole.original[:2]))
    assert len(cut.validation) == len(cut.original) == 2


def test_a_run_trains_and_evaluates_few_batches_and_says_so(tmp_path, caplog):
    with caplog.at_level("INFO", logger="clframe.execution"):
        result = clframe.run("quickstart", [*FAST, "trainer.fast_dev_run=2"], output=tmp_path)
    assert "development run: 2 experience(s), one epoch of 2 batches each" in caplog.text
    assert "trainer.fast_dev_run=2" not in caplog.text
    assert result.name == "quickstart (development run)"
    assert result.steps == 4 and len(result.accuracy_matrix) == 2
    # Accuracies are fractions of two batches of 16, though the tests have 90 samples and evaluation batches 256.
    accuracies = [a for row in result.accuracy_matrix for a in row]
    assert all(a * 32 == pytest.approx(round(a * 32), abs=1e-9) for a in accuracies)
    with pytest.raises(RunFolderError, match=r"is a development run .* of the first 2 experiences; extend a complete"):
        clframe.api.extend(result.run_folder, ["benchmark=digits"])


@pytest.mark.parametrize(("experiences", "advised"), [(5, True), (1, False)])
def test_one_experience_unless_asked(experiences, advised, tmp_path, caplog):
    overrides = [*FAST, "trainer.fast_dev_run=true", f"benchmark.experiences={experiences}"]
    with caplog.at_level("INFO", logger="clframe.execution"):
        result = clframe.run("quickstart", overrides, output=tmp_path)
    assert result.steps == 2 and len(result.accuracy_matrix) == 1
    assert ("trainer.fast_dev_run=2 adds the second experience" in caplog.text) is advised


def test_strategies_with_epochs_of_their_own_take_the_fewest_that_they_need(tmp_path, caplog):
    with caplog.at_level("INFO", logger="clframe.execution"):
        result = clframe.run("quickstart", [*FAST, "strategy=exits(regime=disjoint)", "trainer.fast_dev_run=1"], output=tmp_path)
    assert "1 experience(s), 2 epochs of 2 batches each" in caplog.text
    assert result.steps == 4


def test_extensions_and_complete_runs_are_not_cut_off():
    config = load_config("quickstart", ["trainer.fast_dev_run=false"])
    assert development_experiences(config) == 0
