"""Training within a budget of MACs."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from power_cuts import TINY, assert_same_run, cut_run, without_pictures

import clframe
from clframe.config.load import load_config
from clframe.errors import ConfigError
from clframe.training.budget import ExperienceCost, plan_steps

COST = ExperienceCost(before=5, step=10, epoch=63, after=40, batches=7)


def spent(run: Path) -> list[int]:
    """MACs of training by experience, added up from the ledger's entries."""
    ledger = json.loads((run / "ledger.json").read_text())["ledger"]
    found: Counter[int] = Counter()
    for entry in ledger["entries"]:
        if entry["phase"] != "evaluation":
            found[entry["experience"]] += entry["macs"]
    return [found[index] for index in sorted(found)]


def budgets(run: Path) -> list[int]:
    figures = json.loads((run / "ledger.json").read_text())["ledger"]["figures"]
    return [row["value"] for row in figures if row["name"] == "budget"]


def train(folder: Path, *overrides: str) -> Path:
    return Path(str(clframe.run("quickstart", [*TINY, *overrides], output=folder).run_folder))


@pytest.fixture(scope="module", autouse=True)
def fast():
    patch = without_pictures()
    yield
    patch.undo()


@pytest.fixture(scope="module")
def naive(fast, tmp_path_factory) -> Path:
    """A run without a budget."""
    return train(tmp_path_factory.mktemp("naive"), "strategy=naive")


@pytest.fixture(scope="module")
def naive_of_13(fast, tmp_path_factory) -> Path:
    """The same of another width."""
    return train(tmp_path_factory.mktemp("naive"), "strategy=naive", "backbone.width=13")


@pytest.mark.parametrize(
    "budget, epochs, steps",
    [
        (5 + 10 + 40, 1, 1),
        (5 + 63 + 40, 1, 7),
        (5 + 63 + 14 + 40, 2, 8),
        (5 + 63 + 15 + 40, 2, 9),  # to the nearest step
        (5 + 2 * 63 + 40, 2, 14),
    ],
)
def test_steps_are_those_that_the_budget_affords(budget, epochs, steps):
    (planned,) = plan_steps([COST], [budget])
    assert (planned.epochs, planned.steps) == (epochs, steps)
    taken = [planned.batches_of(epoch, whole=7, spent=5 + 63 * epoch) for epoch in range(epochs)]
    assert sum(taken) == steps


def test_the_last_epoch_is_cut_by_what_was_really_spent():
    (planned,) = plan_steps([COST], [5 + 63 + 50 + 40])
    assert planned.batches_of(1, whole=7, spent=68) == 5
    assert planned.batches_of(1, whole=7, spent=68 - 20) == 7
    assert planned.batches_of(1, whole=7, spent=68 + 30) == 2


def test_a_budget_below_one_step_is_refused():
    with pytest.raises(ConfigError, match=r"found 49 MACs for experience 2, but one step costs 55 .*\(45\); give more"):
        plan_steps([COST, COST], [60, 49])


def test_joint_training_has_no_steps_before_the_last_experience():
    nothing = ExperienceCost(before=0, step=1, epoch=1, after=0, batches=0)
    assert [planned.steps for planned in plan_steps([nothing, COST], [1, 108])] == [0, 7]


def test_a_relative_budget_of_one_is_naive_itself(naive, tmp_path):
    equal = train(tmp_path, "strategy=naive", "trainer.budget.relative=1")
    assert budgets(equal) == spent(equal) == spent(naive)
    rows = [(run / "metrics.csv").read_text() for run in (naive, equal)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("strategy", ["er(memory=20) + lwf", "ewc(samples=40)", "er(memory=20) + exits", "bic(memory=20)"])
def test_strategies_cost_what_naive_costs(strategy, naive_of_13, tmp_path):
    """36 steps are few: half a step is the most that the cost may differ by."""
    run = train(tmp_path, f"strategy={strategy}", "backbone.width=13", "trainer.budget.relative=1")
    assert budgets(run) == spent(naive_of_13)
    for found, budget in zip(spent(run), budgets(run), strict=True):
        assert abs(found - budget) <= 0.04 * budget


def test_twice_the_budget_is_twice_the_steps(naive, tmp_path):
    run = train(tmp_path, "strategy=naive", "trainer.budget.relative=2", "optimizer.schedule=cosine")
    assert spent(run) == [2 * macs for macs in spent(naive)]


def test_the_same_macs_for_every_experience(tmp_path):
    run = train(tmp_path, "strategy=naive", "trainer.budget=2.5e6")
    assert budgets(run) == [2_500_000, 2_500_000]
    assert all(abs(found - 2_500_000) <= 60_000 for found in spent(run))


def test_a_budgeted_run_resumes_exactly(tmp_path):
    options = [*TINY, "strategy=er(memory=20) + lwf", "trainer.budget.relative=1.3", "optimizer.schedule=cosine"]
    whole, copies = cut_run(options, tmp_path, cuts=4, seed="budget")
    for _, folder in copies:
        clframe.run(resume=folder)
        assert_same_run(whole, folder)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["trainer.budget=0"], "trainer.budget.macs: found 0.0; give a number above 0"),
        (["trainer.budget.macs=1e9", "trainer.budget.relative=1"], "leave out trainer.budget.macs, or this"),
        (["trainer.budget=1e9", "trainer.budget.relative=1"], "leave out trainer.budget.macs, or this"),
        (["trainer.budget=1e9", "trainer.engine=trainer"], "trainer.engine: found 'trainer' (text); with trainer.budget give trainer.engine=fabric"),
        (["trainer.budget=1e9", "trainer.fast_dev_run=true"], "with trainer.budget give no development run"),
        (["trainer.budget=1e9", "benchmark.online=10", "trainer.epochs=1"], "benchmark.online: found 10 with trainer.budget"),
        (["trainer.budget=1e9", "strategy=slda"], "trainer.budget: slda takes no training steps"),
        (["trainer.budget=10"], "found 10 MACs for experience 1, but one step costs"),
    ],
)  # fmt: skip
def test_budgets_that_cannot_be_followed_are_refused(overrides, message, tmp_path):
    with pytest.raises(ConfigError) as refused:
        train(tmp_path, *overrides)
    assert message in str(refused.value)
    assert not list(tmp_path.rglob("config.yaml"))


def test_explain_shows_what_a_strategy_can_afford():
    text = clframe.explain("quickstart", [*TINY, "strategy=ewc(samples=40)", "trainer.budget.relative=1"])
    heading, *rows = text.partition("training within the budget\n")[2].splitlines()
    assert heading.split() == ["experience", "budget", "per", "step", "in", "between", "epochs", "steps", "(MACs)"]
    numbers = [[float(cell.replace(",", "")) for cell in row.split()] for row in rows]
    for index, (found, budget, step, between, epochs, steps) in enumerate(numbers):
        assert found == index and 0 < between < budget
        assert abs(between + steps * step - budget) <= step
        assert epochs < 2


def test_torch_counts_the_macs_of_the_ledger(capsys):
    """With a budget and without, by torch's own counter, which counts every step."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "perf"))
    try:
        import audit_macs
    finally:
        sys.path.pop(0)
    assert audit_macs.main(["--strategies", "er + lwf", "ewc", "--", *TINY, "trainer.budget.relative=0.7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if " ledger " in line] == ["+0.000%", "+0.000%"]


def kept(run: Path) -> list[int]:
    """Bytes of all components' states after each experience."""
    rows = json.loads((run / "ledger.json").read_text())["ledger"]["bytes"]
    found: Counter[int] = Counter()
    for row in rows:
        if row["component"]:
            found[row["experience"]] += row["bytes"]
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize(
    "strategy, owner", [
        pytest.param("er", "er", marks=pytest.mark.slow), ("er(budget=per_class) + lwf", "er"), ("derpp", "derpp"),
        ("er + ewc(samples=40)", "er"),
    ],
)
def test_memory_is_divided_between_teachers_importances_and_samples(strategy, owner, tmp_path):
    limit = 40_000
    run = train(tmp_path / "a", f"strategy={strategy}", f"trainer.memory={limit}")
    size = yaml.safe_load((run / "config.yaml").read_text())["components"][owner]["memory"]
    most = max(kept(run))
    assert 0.93 * limit <= most <= limit
    more = train(tmp_path / "b", f"strategy={strategy}", f"components.{owner}.memory={size + 1}")
    assert max(kept(more)) > limit


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["strategy=naive"], "trainer.memory: found 500 bytes, but naive has no replay buffer whose size it would set"),
        (["strategy=er + lwf"], "but teachers and importances take"),
        (["trainer.memory=0"], "trainer.memory.bytes: found 0.0; give a number above 0"),
    ],
)
def test_memory_that_is_too_small_is_refused(overrides, message, tmp_path):
    with pytest.raises(ConfigError) as refused:
        train(tmp_path, "trainer.memory=500", *overrides)
    assert message in str(refused.value)


def test_a_run_with_fitted_memory_resumes_exactly(tmp_path):
    options = [*TINY, "strategy=er + lwf", "trainer.memory=40000", "trainer.budget.relative=1"]
    whole, copies = cut_run(options, tmp_path, cuts=2, seed="memory")
    for _, folder in copies:
        clframe.run(resume=folder)
        assert_same_run(whole, folder)


@pytest.mark.parametrize("limit, key", [("trainer.budget.relative=1", "trainer.budget.relative"), ("trainer.memory=40000", "trainer.memory.bytes")])
def test_limits_of_a_run_are_not_those_of_its_extension(limit, key, tmp_path):
    data = ["benchmark=digits", "benchmark.classes=6", "benchmark.experiences=3"]
    first = train(tmp_path / "a", "strategy=er", "benchmark.classes=4", limit)
    before = sorted(tmp_path.rglob("config.yaml"))
    with pytest.raises(ConfigError, match=f"for an extended run.* set {key}=null"):
        clframe.api.extend(first, data, output=tmp_path / "b")
    assert sorted(tmp_path.rglob("config.yaml")) == before
    extended = clframe.api.extend(first, [*data, f"{key}=null"], output=tmp_path / "b")
    assert len(extended.accuracy_matrix) > 2


def test_a_value_that_is_short_for_a_block_merges_with_its_other_keys():
    averaged = load_config("quickstart", ["trainer.ema.warmup=false", "trainer.ema=0.9"]).trainer.ema
    assert (averaged.decay, averaged.warmup) == (0.9, False)
    assert load_config("quickstart", ["trainer.ema=0.9", "trainer.ema=null"]).trainer.ema.decay is None


def test_memory_beyond_the_stream_is_reported(tmp_path, caplog):
    with caplog.at_level("INFO", logger="clframe.planning"):
        run = train(tmp_path, "strategy=er", "trainer.memory=1e6")
    size = yaml.safe_load((run / "config.yaml").read_text())["components"]["er"]["memory"]
    assert f"trainer.memory: components.er.memory={size}, not 200" in caplog.text
    assert "trainer.memory: 1,000,000 bytes hold more than the" in caplog.text
