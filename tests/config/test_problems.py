"""Independent problems of a config are found together, and options without effect are named."""

from __future__ import annotations

import logging

import pytest

from clframe.build import build
from clframe.cli import main
from clframe.config.load import load_config
from clframe.errors import ConfigError, ConfigErrors, Problems, UnknownNameError


def test_problems_of_all_blocks_and_overrides_are_one_line_each(capsys):
    overrides = ["strateg=er", "optimizer.lr=-1", "optimizer.warmup=-2", "trainer.epochs=0", "benchmark.validation=2", "seed=x"]
    assert main(["explain", "quickstart", *overrides]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "clframe: error: override 'strateg=er': unknown key 'strateg'; did you mean 'strategy'?",
        "clframe: error: benchmark.validation: found 2.0; give a fraction from 0, below 1",
        "clframe: error: optimizer.lr: found -1.0; give a number above 0",
        "clframe: error: optimizer.warmup: found -2; give at least 0",
        "clframe: error: trainer.epochs: found 0; give at least 1",
        "clframe: error: seed: found 'x' (text); give a whole number",
    ]


def test_problems_that_only_building_finds():
    overrides = ["benchmark.tset=1", "backbone.widht=4", "trainer.precision=16-mixed", "trainer.accelerator=cpu",
                 "optimizer.gamma=0.5", "strategy=er + early_exit(budget=0.5) + exits"]  # fmt: skip
    with pytest.raises(ConfigErrors) as refusal:
        build(load_config("quickstart", overrides))
    places = [str(problem).partition(": ")[0] for problem in refusal.value.problems]
    assert places == ["optimizer.gamma", "components.early_exit.budget", "trainer.precision", "backbone.widht", "benchmark.tset"]


def test_options_of_a_block_with_an_unknown_name_are_not_compared_with_those_of_another_block(capsys):
    overrides = ["benchmark=digts", "benchmark.resize=8", "benchmark.experiences=0", "backbone=smal_cnn", "backbone.depht=3",
                 "optimizer.lr=-1"]  # fmt: skip
    assert main(["run", "quickstart", *overrides]) == 2
    assert [line.partition(" (known: ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "clframe: error: override 'benchmark=digts': unknown benchmark 'digts'; did you mean 'digits'?",
        "clframe: error: override 'backbone=smal_cnn': unknown backbone 'smal_cnn'; did you mean 'small_cnn'?",
        "clframe: error: optimizer.lr: found -1.0; give a number above 0",
    ]


def test_one_problem_keeps_its_type_and_equal_ones_are_one():
    problems = Problems()
    for _ in range(2):
        with problems.attempt():
            raise UnknownNameError("x: unknown; do this")
    with pytest.raises(UnknownNameError, match="^x: unknown; do this$"):
        problems.raise_found()
    problems.add(ConfigErrors([ConfigError("y: a; b"), ConfigError("x: unknown; do this")]))
    with pytest.raises(ConfigErrors, match="^x: unknown; do this\ny: a; b$"):
        problems.raise_found()
    Problems().raise_found()


def test_components_that_the_strategy_does_not_use_are_named_and_left_out(caplog):
    with caplog.at_level(logging.WARNING, logger="clframe.config.load"):
        config = load_config("quickstart", ["strategy=er", "components.ewc.lamb=3", "components.er.memory=50"])
        load_config("quickstart", ["strategy=er"])  # components of the file are not named
    assert [record.getMessage() for record in caplog.records] == [
        "components.ewc: the strategy 'er' does not use it, its options have no effect; add it to the strategy or leave "
        "them out"
    ]
    assert set(build(config).config.components) == {"er"}
