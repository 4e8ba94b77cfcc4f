"""Training within a budget of MACs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import audit_macs
import pytest
import torch
import yaml
from power_cuts import TINY, assert_same_run, cut_run, without_pictures

import clframe
from clframe.config.load import load_config
from clframe.core import Composition
from clframe.data.avalanche import import_avalanche
from clframe.errors import ConfigError, UnsupportedError
from clframe.nn import Network
from clframe.nn.backbones import mlp

import_avalanche()

from avalanche.training.plugins import LwFPlugin

from clframe.training.budget import ExperienceCost, TrainingPlan, plan_steps
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy

COST = ExperienceCost(before=5, step=10, epoch=63, after=40, batches=7)


def spent(run: Path) -> list[int]:
    """MACs of training by experience, added up from the ledger's entries."""
    ledger = json.loads((run / "ledger.json").read_text())["ledger"]
    found: Counter[int] = Counter()
    for entry in ledger["entries"]:
        if entry["phase"] != "evaluation":
            found[entry["experience"]] += entry["macs"]
    return [found[index] for index in sorted(found)]


def entries(run: Path) -> list[dict[str, Any]]:
    return [row for row in json.loads((run / "ledger.json").read_text())["ledger"]["entries"] if not row["component"]]


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


def test_joint_training_spends_the_budget_of_the_stream_in_the_first_experience(naive, tmp_path):
    run = train(tmp_path, "strategy=joint", "trainer.budget.relative=1")
    total = sum(spent(naive))
    assert budgets(run) == [total, 0]
    (found, nothing), half_a_step = spent(run), total / 36 / 2
    assert abs(found - total) <= half_a_step and nothing == 0


def test_explain_shows_the_pooled_budget_of_joint_training(naive):
    text = clframe.explain("quickstart", [*TINY, "strategy=joint", "trainer.budget.relative=1"])
    _, first, second = text.partition("training within the budget\n")[2].splitlines()
    assert first.split()[1] == f"{sum(spent(naive)):.4g}" and first.split()[-1] == "33"
    assert second.split() == ["1", "0", "-", "0", "0", "0"]


def test_experiences_that_cannot_spend_their_budget_are_reported(tmp_path, caplog):
    """The first session trains on its own data only, so it has no claim to the budgets of the others."""
    with caplog.at_level("WARNING", logger="clframe.training.session"):
        run = train(tmp_path, "strategy=simplecil(train_first=true)", "trainer.budget=2e6")
    found = spent(run)
    assert budgets(run) == [2_000_000, 2_000_000] and 0 < found[1] < 400_000
    assert f"experience 2 cost {found[1]:.4g} MACs, {found[1] / 2e4:.1f} % of its budget of 2e+06" in caplog.text


@pytest.mark.parametrize("limit, uncounted", [("trainer.budget.relative=1", "MACs"), ("trainer.memory=40000", "memory")])
def test_plugins_whose_costs_are_not_counted_are_refused(limit, uncounted, tmp_path):
    options = [*TINY, "strategy=er", limit, "components.avalanche.plugins=[LwFPlugin]"]
    message = (rf"^components\.avalanche\.plugins: found LwFPlugin with (trainer\.\w+), but the {uncounted} of Avalanche plugins "
               rf"cannot be counted; leave out the plugins, or \1$")  # fmt: skip
    for refuse in (lambda: train(tmp_path, *options), lambda: clframe.explain("quickstart", options)):
        with pytest.raises(UnsupportedError, match=message):
            refuse()
    assert not list(tmp_path.rglob("config.yaml"))


@pytest.mark.parametrize(
    "strategy", [
        "mir(memory=100)", "mir(memory=20, replay=half)", "derpp(update=step)",
        pytest.param("gss(memory=40)", marks=pytest.mark.slow),
        pytest.param("er(update=step, selection=reservoir)", marks=pytest.mark.slow),
    ],
)  # fmt: skip
@pytest.mark.parametrize("relative", [1, pytest.param(3.3, marks=pytest.mark.slow)])
def test_buffers_that_fill_during_training_keep_to_the_budget(strategy, relative, tmp_path):
    """To half a step, whose mean is a little less than that of a full batch: the last batch of an epoch is smaller."""
    run = train(tmp_path, f"strategy={strategy}", f"trainer.budget.relative={relative}")
    steps = [row["steps"] for row in entries(run) if row["phase"] == "forward"]
    for found, budget, count in zip(spent(run), budgets(run), steps, strict=True):
        assert abs(found - budget) <= 0.58 * found / count


def test_plugins_given_to_a_strategy_with_a_plan_are_refused():
    module = ContinualModule(Network(mlp((1, 2, 2))), Composition(), optimizer=partial(torch.optim.SGD, lr=0.1))
    plan = TrainingPlan(plan_steps([COST], [108]), lambda epochs: None)
    with pytest.raises(UnsupportedError, match=r"plan: found the plugin LwFPlugin, whose MACs cannot be counted; leave out one"):
        LightningStrategy(model=module, plan=plan, plugins=[LwFPlugin()])


def test_first_steps_cost_less_while_a_buffer_fills():
    """Steps of 2, 6 and then 10 MACs, on batches of 7 steps an epoch."""
    (planned,) = plan_steps([replace(COST, filling=(2, 6))], [5 + 2 + 6 + 4 * 10 + 40])
    assert (planned.epochs, planned.steps) == (1, 6)
    assert planned.batches_of(0, whole=7, spent=5) == 6


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


@pytest.mark.parametrize("strategy", ["er(memory=20) + lwf", pytest.param("mir", marks=pytest.mark.slow)])
def test_a_budgeted_run_resumes_exactly(strategy, tmp_path):
    options = [*TINY, f"strategy={strategy}", "trainer.budget.relative=1.3", "optimizer.schedule=cosine"]
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
    strategies = ["er + lwf", "ewc", "mir"]
    assert audit_macs.main(["--strategies", *strategies, "--", *TINY, "trainer.budget.relative=0.7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if " ledger " in line] == ["+0.000%"] * 3


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
        ("er + ewc(samples=40)", "er"), ("bic", "bic"),
    ],
)
def test_memory_is_divided_between_teachers_importances_and_samples(strategy, owner, tmp_path):
    limit = 40_000
    run = train(tmp_path / "a", f"strategy={strategy}", f"trainer.memory={limit}")
    size = yaml.safe_load((run / "config.yaml").read_text())["components"][owner]["memory"]
    most = max(kept(run))
    assert 0.93 * limit <= most <= limit
    further = 4 if owner == "bic" else 1  # one of each class: bic stores equally many
    more = train(tmp_path / "b", f"strategy={strategy}", f"components.{owner}.memory={size + further}")
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
