"""The ledger of a session against arithmetic."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from toy_sessions import BATCH, EPOCHS, SAMPLES, TESTED, bench, run, session

from clframe.accounting import MacCounter
from clframe.core import Component, compose, parse
from clframe.data.avalanche import import_avalanche
from clframe.errors import ConfigError
from clframe.moe import count_usage

import_avalanche()

from avalanche.core import SupervisedPlugin

from clframe.training.observer import StepObserver


def forward(classes: int) -> int:
    """MACs of one sample: 4 inputs, two layers of 5, a head."""
    return 4 * 5 + 5 * 5 + 5 * classes


def backward(classes: int) -> int:
    """Both gradients of every layer, but no gradient of the input."""
    return 2 * forward(classes) - 4 * 5


CLASSES = (2, 4, 6)


@pytest.mark.parametrize("engine", ["fabric", "trainer"])
def test_plain_training(engine: str, tmp_path: Path) -> None:
    ledger = run("naive", tmp_path, engine=engine).ledger
    for index, classes in enumerate(CLASSES):
        assert ledger.by_phase(experience=index) == {
            "forward": EPOCHS * SAMPLES * forward(classes),
            "backward": EPOCHS * SAMPLES * backward(classes),
            "evaluation": TESTED * forward(classes),
        }
        assert ledger.samples(experience=index) == EPOCHS * SAMPLES
        assert ledger.steps(experience=index) == EPOCHS * 5
    assert ledger.by_experience()[None] == TESTED * forward(2)  # before anything was learnt
    assert ledger.by_component().keys() == {""} and ledger.uncounted() == {}
    weights = 4 * (4 * 5 + 5 + 5 * 5 + 5 + 6 * 5 + 6)
    assert ledger.bytes()["parameters"] - weights in range(100)  # and what the head notes of its classes
    assert set(ledger.seconds()) == {"training", "accounting", "evaluation", "exits"}


def test_replay_is_split_from_new_samples(tmp_path: Path) -> None:
    made = session("er(memory=12)", tmp_path)
    rows, on_step = 0, made.strategy.on_step
    assert on_step is not None

    def counted(strategy: Any) -> None:
        nonlocal rows
        rows += len(strategy.batch.y)
        on_step(strategy)

    made.strategy.on_step = counted
    made.run()
    made.close()
    ledger = made.ledger
    assert ledger.samples("replay") == rows - 3 * EPOCHS * SAMPLES > 0
    for index, classes in enumerate(CLASSES):
        phases, old = ledger.by_phase(experience=index), ledger.samples("replay", experience=index)
        assert (old > 0) == (index > 0)
        assert phases["forward"] == EPOCHS * SAMPLES * forward(classes)
        assert phases["backward"] == EPOCHS * SAMPLES * backward(classes)
        assert phases.get("replay", 0) == old * (forward(classes) + backward(classes))
    assert ledger.bytes()["memory"] == made.state_bytes()["er"] >= 12 * (4 + 8)


def test_a_gem_replays_a_batch_of_its_buffer_in_every_step(tmp_path: Path) -> None:
    ledger = run("agem(memory=12, sample=3)", tmp_path).ledger
    steps = EPOCHS * 5
    assert ledger.samples("replay") == 2 * steps * 3  # the buffer is empty in the first experience
    for index, classes in enumerate(CLASSES):
        phases, replayed = ledger.by_phase(experience=index), steps * 3 if index else 0
        assert phases["forward"] == EPOCHS * SAMPLES * forward(classes)
        assert phases["backward"] == EPOCHS * SAMPLES * backward(classes)
        assert ledger.samples("replay", experience=index) == replayed
        assert phases.get("replay", 0) == replayed * (forward(classes) + backward(classes))
    assert ledger.by_component()["agem"] >= ledger.by_phase()["replay"]


def test_teachers_cost_their_own_forward_pass(tmp_path: Path) -> None:
    ledger = run("lwf", tmp_path).ledger
    for index, before in ((1, 2), (2, 4)):
        assert ledger.by_phase(experience=index)["teachers"] == EPOCHS * SAMPLES * forward(before)
    assert "teachers" not in ledger.by_phase(experience=0)
    assert ledger.by_component()["lwf"] == ledger.by_phase()["teachers"]
    assert ledger.bytes()["teachers"] > 4 * (4 * 5 + 25 + 4 * 5)


@dataclass(frozen=True, kw_only=True)
class Works(Component):
    """Multiplies matrices at every hook that may, thaws, and declares."""

    name: ClassVar[str] = "works"
    terms: ClassVar[tuple[str, ...]] = ("nothing",)
    slots: ClassVar[frozenset[str]] = frozenset({"gradient"})

    def before_experience(self, network: Any, context: Any, state: Any) -> Any:
        torch.ones(2, 3) @ torch.ones(3, 4)
        return {"prepared": 1}

    def before_epoch(self, network: Any, context: Any, state: Any) -> None:
        for parameter in network.backbone.stages[0].parameters():
            parameter.requires_grad = context.epoch == 0

    def losses(self, step: Any, state: Any) -> Any:
        return {"nothing": 0 * (torch.ones(1, 7) @ torch.ones(7, 1)).sum()}

    def modify_gradients(self, network: Any, step: Any, state: Any) -> None:
        torch.ones(1, 11) @ torch.ones(11, 1)

    def after_step(self, network: Any, step: Any, state: Any) -> Any:
        torch.ones(1, 13) @ torch.ones(13, 1)
        return state

    def after_experience(self, network: Any, context: Any, state: Any) -> Any:
        torch.fft.rfft(torch.ones(4) @ torch.ones(4, 5))
        return {"prepared": 2}

    def extra_cost(self, network: Any, state: Any) -> Any:
        return {"macs": 100, "router": 1000, "things": state.get("prepared", 0)}


def test_hooks_are_charged_to_their_component_and_epochs_by_what_learns(tmp_path: Path) -> None:
    ledger = run(Works(), tmp_path).ledger
    steps = EPOCHS * 5
    for index, classes in enumerate(CLASSES):
        phases = ledger.by_phase(experience=index)
        assert phases["auxiliary"] == 2 * 3 * 4 + steps * (7 + 11 + 13 + 100) + 4 * 5
        assert phases["router"] == steps * 1000
        assert phases["forward"] == EPOCHS * SAMPLES * forward(classes)
        # In the second epoch the first layer learns nothing, and the second one hands no gradient on.
        assert phases["backward"] == SAMPLES * (backward(classes) + 5 * 5 + 2 * 5 * classes)
    assert set(ledger.by_component()) == {"", "works"}
    assert ledger.uncounted() == {"aten._fft_r2c": 3}
    assert ledger.figures() == {("works", "things"): 2}


def test_a_prediction_by_part_and_by_who_stops_where(tmp_path: Path) -> None:
    for threshold, at in ((0.0, "layer1"), (2.0, "final")):
        folder = tmp_path / at
        folder.mkdir()
        ledger = run(f"exits(head='linear', heads='growing') + early_exit(threshold={threshold})", folder).ledger
        predictions = ledger.predictions
        for index, classes in enumerate(CLASSES):
            early = 4 * 5 + (5 * classes if threshold == 0 else 0)  # a head that is never asked is not computed
            late = early + 5 * 5 + 5 * classes
            assert predictions.by_exit(experience=index) == {"layer1": early, "final": late}
            assert predictions.whole(experience=index) == late
            seen = {"layer1": 0, "final": 0} | {at: 2 * (index + 1)}  # two test samples an experience
            assert predictions.samples_by_exit(experience=index) == seen
            assert predictions.expected(experience=index) == (early if threshold == 0 else late)
            assert len(predictions.stops(experience=index)) == 2  # whatever the number of test experiences
        assert predictions.by_component().get("exits", 0) == (5 * 6 if threshold == 0 else 0)


def test_without_a_policy_a_prediction_runs_every_exit(tmp_path: Path) -> None:
    ledger = run("exits(head='linear', heads='growing')", tmp_path).ledger
    late = 4 * 5 + 5 * 6 + 5 * 5 + 5 * 6
    assert ledger.predictions.expected() == late == ledger.predictions.whole()
    assert ledger.by_phase(experience=2)["evaluation"] == TESTED * late
    assert ledger.predictions.by_role() == {"linear": 4 * 5 + 5 * 5, "head": 2 * 5 * 6}


class Spy(StepObserver):
    """Notes sections, and which of them another observer runs under a counter."""

    def __init__(self, inner: StepObserver) -> None:
        self.inner, self.sections, self.counted = inner, [], []

    @contextlib.contextmanager
    def around(self, section: Any, component: str = "", samples: int = 0) -> Any:
        self.sections.append((section, component, samples))
        before = torch.utils._python_dispatch._len_torch_dispatch_stack()
        with self.inner.around(section, component, samples):
            if torch.utils._python_dispatch._len_torch_dispatch_stack() > before:
                self.counted.append((section, component, samples))
            yield


def test_the_first_step_of_each_kind_is_counted_whatever_exits_weigh(tmp_path: Path) -> None:
    made = session("exits(head='linear', heads='growing')", tmp_path)  # its weights rise from epoch to epoch
    made.learner.observer = spy = Spy(made.learner.observer)
    made.run()
    made.close()
    step = ("forward", "task_loss", "backward")
    assert [entry for entry in spy.counted if entry[0] in step] == [(s, "", n) for n in (4, 2) for s in step] * 3
    for section in step:
        assert sum(entry[0] == section for entry in spy.sections) == 3 * EPOCHS * 5


def test_a_run_publishes_its_hooks_in_order(tmp_path: Path) -> None:
    made = session(compose(Works(), parse("er(memory=12) + lwf")), tmp_path)
    made.learner.observer = spy = Spy(StepObserver())
    made.run()
    made.close()
    names = [(section, component) for section, component, _ in spy.sections]
    first = [("before_experience", "works"), ("make_batch", "er"), ("forward", ""),
             ("task_loss", ""), ("losses", "lwf"), ("losses", "works"), ("backward", ""), ("modify_gradients", "works"),
             ("after_step", "works"), ("make_batch", "er")]  # fmt: skip
    assert names[: len(first)] == first
    assert names[-3:] == [("after_experience", "er"), ("after_experience", "lwf"), ("after_experience", "works")]
    assert spy.counted == [] and made.ledger.training_macs == 0


@dataclass(frozen=True, kw_only=True)
class Routes(Works):
    """Trains what it calls a router."""

    name: ClassVar[str] = "routes"
    phase: ClassVar[str] = "router"


def test_router_training_is_a_phase_of_its_own(tmp_path: Path) -> None:
    ledger = run(Routes(), tmp_path).ledger
    steps = EPOCHS * 5
    for index in range(3):
        phases = ledger.by_phase(experience=index)
        assert phases["auxiliary"] == steps * (7 + 11 + 13 + 100)
        assert phases["router"] == 2 * 3 * 4 + steps * 1000 + 4 * 5
    assert set(ledger.seconds()) == {"training", "accounting", "evaluation", "exits", "components"}
    assert ledger.seconds()["components"] <= ledger.seconds()["training"]  # it is part of it


def test_two_components_that_consolidate_are_charged_each(tmp_path: Path) -> None:
    ledger = run(compose(Works(), parse("ewc")), tmp_path).ledger
    for index, classes in enumerate(CLASSES):
        found = ledger.by_component(experience=index)
        assert set(found) == {"", "ewc", "works"}
        assert found["works"] == 2 * 3 * 4 + EPOCHS * 5 * (7 + 11 + 13 + 1100) + 4 * 5
        assert found["ewc"] >= SAMPLES * forward(classes)  # a pass over the data for its importances


def test_an_evaluation_costs_the_experts_that_it_really_ran(tmp_path: Path) -> None:
    made = session("moe(experts=5, tau=0.2, router_width=3, epochs=1)", tmp_path)
    made.run()
    made.close()
    network, ledger = made.learner.network, made.ledger
    x = torch.cat([network.to_device(part.prepare(part.raw(torch.arange(len(part))))) for part in bench().test])
    with torch.no_grad(), count_usage(network) as usage, MacCounter() as counter:
        for experience in x.split(2):  # as it was evaluated: batches of 5 of experiences of 2
            network.eval()(experience)
        used = usage()
    assert 0 < sum(sum(layer.ran_E) for layer in used.values()) < sum(5 * layer.tokens for layer in used.values())
    assert ledger.by_phase(experience=2)["evaluation"] == counter.macs
    assert ledger.by_phase()["router"] == ledger.by_component()["moe"] > 0
    assert ledger.predictions.experts()[0].pairs == sum(sum(layer.ran_E) for layer in used.values())
    assert ledger.predictions.mean() < ledger.predictions.expected() == forward(6)


@dataclass(frozen=True, kw_only=True)
class Boasts(Component):
    """Declares what is no count."""

    name: ClassVar[str] = "boasts"

    def extra_cost(self, network: Any, state: Any) -> Any:
        return {"macs": -1}


def test_a_cost_that_is_no_count_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"boasts: extra_cost\(\) returned macs=-1; return"):
        run(Boasts(), tmp_path)
    with torch.no_grad():
        torch.ones(2, 2) @ torch.ones(2, 2)  # no counter has stayed on


def test_an_experience_without_epochs_is_counted_too(tmp_path: Path) -> None:
    ledger = run("simplecil", tmp_path).ledger
    assert ledger.steps() == 0 and ledger.samples() == 0
    for index in range(3):
        assert ledger.by_phase(experience=index)["auxiliary"] >= SAMPLES * forward(0)
    assert set(ledger.by_component()) == {"", "simplecil"}


def test_accumulated_batches_are_one_optimizer_step(tmp_path: Path) -> None:
    (tmp_path / "works").mkdir()
    works = run(Works(), tmp_path / "works", accumulate=2).ledger  # batches of 4, 4 | 4, 4 | 2
    hooks = EPOCHS * (5 * (7 + 11 + 100) + 3 * 13)
    assert works.by_phase(experience=0)["auxiliary"] == 2 * 3 * 4 + hooks + 4 * 5
    ledger = run("naive", tmp_path, accumulate=2).ledger
    assert ledger.steps() == 3 * EPOCHS * 3
    assert ledger.samples() == 3 * EPOCHS * SAMPLES


def test_evaluations_inside_training_are_evaluations(tmp_path: Path) -> None:
    often = run("ewc", tmp_path, eval_every=1).ledger
    (tmp_path / "other").mkdir()
    once = run("ewc", tmp_path / "other").ledger
    assert often.training_macs == once.training_macs
    assert often.by_phase()["evaluation"] > once.by_phase()["evaluation"]


class Hidden(SupervisedPlugin):
    """Acts in every step, unseen."""

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Multiply where nobody looks."""
        torch.ones(2, 2) @ torch.ones(2, 2)


class Idle(SupervisedPlugin):
    """Acts between experiences."""

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Nothing."""


def test_foreign_plugins_are_named(tmp_path: Path) -> None:
    ledger = run("naive", tmp_path, plugins=[Hidden(), Idle()]).ledger
    assert ledger.uncounted() == {"plugin Hidden": 3 * EPOCHS * 5}
    assert ledger.by_phase(experience=0)["forward"] == EPOCHS * SAMPLES * forward(2)


def test_batches_left_out_are_not_counted(tmp_path: Path) -> None:
    ledger = run("naive", tmp_path, limit_batches=2).ledger
    assert ledger.samples() == 3 * EPOCHS * 2 * BATCH and ledger.steps() == 3 * EPOCHS * 2
    assert ledger.by_phase(experience=0)["forward"] == EPOCHS * 2 * BATCH * forward(2)
    assert ledger.samples("evaluation", experience=0) == TESTED
