"""Early exit as a decision: given thresholds, budgets from held-out data, and deciding together."""

from __future__ import annotations

import pytest
import torch

import clframe
from clframe.accounting.macs import backbone_macs, cumulative_macs
from clframe.core import Experience, StepContext
from clframe.data import TensorSamples
from clframe.errors import ComposeError, ConfigError
from clframe.exits import ExitPolicy, select
from clframe.exits.clearance import CLEARANCE
from clframe.nn import BACKBONES, Network
from clframe.nn.features import exit_logits
from clframe.nn.types import Output
from clframe.seeding import generator_for
from strategies import EarlyExit, Exits

FAST = ["backbone=mlp", "backbone.width=12", "backbone.depth=3", "trainer.epochs=2", "trainer.progress=false",
        "trainer.loggers=[]", "benchmark.experiences=3"]  # fmt: skip


def network(classes=4, **options):
    net = Network(BACKBONES.get("mlp")((5,), width=9, depth=3))
    Exits(**options).setup_network(net)
    net.grow(range(classes))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)  # confidences that differ
    return net


def context(samples):
    experience = Experience(0, 1, (0, 1, 2, 3), (), (), samples, (samples,))
    return StepContext(experience, 0, 1, generator_for(0, 0))


def held_out(count=101):
    return TensorSamples(torch.randn(count, 5), torch.randint(4, (count,)))


def test_the_rule_is_that_of_select():
    scores = tuple(3 * torch.randn(33, 4) for _ in range(3))
    for threshold in (0.0, 0.6, (0.9, 0.5), 1.5):
        component = EarlyExit(threshold=threshold)
        state = component.init_state(network())
        expected = select(scores, ExitPolicy(thresholds=threshold)).scores_BC
        assert torch.equal(component.predict(Output(scores), state), expected)
    assert torch.equal(EarlyExit(threshold=0.0).predict(Output(scores), {"thresholds": 0.0, "gate": None}), scores[0])
    assert torch.equal(EarlyExit(rule="last").predict(Output(scores), state), scores[-1])
    mean = torch.stack([s.softmax(1) for s in scores]).mean(0)
    assert torch.allclose(EarlyExit(rule="mean").predict(Output(scores), state).softmax(1), mean)


@pytest.mark.parametrize("solver", ["shared", "quantiles", "coordinate"])
@pytest.mark.parametrize("measure", ["max_probability", "margin", "patience", "gate"])
def test_a_budget_is_kept_on_held_out_data(solver, measure):
    net, samples = network(), held_out()
    component = EarlyExit(budget=0.8, solver=solver, measure=measure)
    state = component.after_experience(net, context(samples), component.init_state(net))
    logits, _ = exit_logits(net, [samples])
    exit_N = select(logits, component.policy(state)).exit_B
    cost = torch.tensor(cumulative_macs(net), dtype=torch.float64)[exit_N].mean()
    assert cost <= 0.8 * backbone_macs(net)
    assert (state["gate"] is None) == (measure != "gate")


def test_a_gate_without_a_budget_is_fitted_and_keeps_its_threshold():
    net = network()
    component = EarlyExit(measure="gate", threshold=0.4)
    state = component.after_experience(net, context(held_out()), component.init_state(net))
    assert state["thresholds"] == 0.4 and state["gate"]["weight_KD"].abs().sum() > 0


def test_a_network_with_one_exit_predicts_with_it():
    net = Network(BACKBONES.get("mlp")((5,), width=9))
    net.grow(range(4))
    component = EarlyExit(budget=0.5)
    state = component.after_experience(net, context(held_out()), component.init_state(net))
    assert state == component.init_state(net)
    scores = (torch.randn(5, 4),)
    assert torch.equal(component.predict(Output(scores), state), scores[0])


def test_a_budget_sets_the_threshold_of_a_network_with_two_exits():
    net, samples = network(at=("layer1",)), held_out()
    component = EarlyExit(budget=0.8)
    state = component.after_experience(net, context(samples), component.init_state(net))
    assert len(net.heads) == 2 and len(state["thresholds"]) == 1
    exit_N = select(exit_logits(net, [samples])[0], component.policy(state)).exit_B
    assert torch.tensor(cumulative_macs(net)).double()[exit_N].mean() <= 0.8 * backbone_macs(net)


def test_one_standard_error_never_stops_earlier_than_the_best_threshold():
    net, samples = network(), held_out()
    policies = {}
    for rule in ("best", "one_standard_error"):
        component = EarlyExit(budget=1.2, budget_rule=rule)
        state = component.after_experience(net, context(samples), component.init_state(net))
        policies[rule] = component.policy(state)
    assert policies["one_standard_error"].thresholds[0] >= policies["best"].thresholds[0]
    with pytest.raises(ConfigError, match=r"^components\.early_exit\.budget_rule: found one_standard_error with solver co"):
        EarlyExit(budget=0.5, budget_rule="one_standard_error", solver="coordinate")


def test_a_network_of_nan_is_one_line_and_not_a_formatting_error():
    net, samples = network(), held_out()
    with torch.no_grad():
        next(net.parameters()).fill_(float("nan"))
    component = EarlyExit(budget=0.6)
    with pytest.raises(ConfigError, match=r"^budget: no thresholds keep .* check that training has not diverged$"):
        component.after_experience(net, context(samples), component.init_state(net))


def test_a_state_saved_before_it_had_the_number_of_exits_is_read():
    component = EarlyExit(measure="gate", threshold=0.4)
    net = network()
    state = component.after_experience(net, context(held_out()), component.init_state(net))
    old = {key: value for key, value in state.items() if key != "exits"}
    scores = tuple(torch.randn(5, 4) for _ in range(3))
    assert torch.equal(component.predict(Output(scores), old), component.predict(Output(scores), state))


def test_too_small_a_budget_buys_the_first_exit():
    net, samples = network(), held_out()
    component = EarlyExit(budget=0.01)
    state = component.after_experience(net, context(samples), component.init_state(net))
    logits, _ = exit_logits(net, [samples])
    assert not select(logits, component.policy(state)).exit_B.any()


def test_bad_options_and_missing_data_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^components\.early_exit\.budget: found 0"):
        EarlyExit(budget=0.0)
    with pytest.raises(ConfigError, match=r"^components\.early_exit\.threshold: found -0\.1"):
        EarlyExit(threshold=-0.1)
    wanted = r"^components\.early_exit\.threshold: found 1 thresholds for 3 exits; give one number, or 2: one for each exit but the last$"
    with pytest.raises(ConfigError, match=wanted):
        EarlyExit(threshold=(0.5,)).init_state(network())
    with pytest.raises(ConfigError, match=r"early_exit\.budget: found 0\.5, which needs held-out data"):
        clframe.run("quickstart", [*FAST, "strategy=exits + early_exit(budget=0.5)"], output=tmp_path)
    with pytest.raises(ComposeError, match="appears twice"):
        EarlyExit() + EarlyExit()
    assert not list(tmp_path.rglob("*"))


def test_a_run_its_loaded_model_and_dynamic_inference_predict_alike(tmp_path):
    strategy = "er(memory=60) + exits(ensemble='geometric', fit_epochs=2) + early_exit(budget=0.8)"
    result = clframe.run("quickstart", [*FAST, f"strategy={strategy}", "backbone.width=32", "benchmark.validation=0.2"], output=tmp_path)
    model = clframe.load(result.run_folder)
    test = clframe.data.digits().test
    ids = model.classify(test.x)
    assert (ids == test.y).float().mean().item() == pytest.approx(result.final_weighted_accuracy, abs=1e-6)
    answer = model.dynamic()(model.prepare(test.x))
    assert torch.equal(model.ids(answer.scores_BC), ids)
    assert len(answer.exit_B.unique()) > 1
    first = model.dynamic(threshold=0.0)(model.prepare(test.x))
    right = (model.ids(first.scores_BC) == test.y).float().mean().item()
    assert right == pytest.approx(result.exits[-1].accuracy_K[0], abs=1e-6)


def test_policies_and_ensembles_are_fitted_on_corrected_logits():
    from clframe.core import compose
    from clframe.training.learner import Learner
    from strategies import NCM

    torch.manual_seed(0)
    net = Network(BACKBONES.get("mlp")((5,), width=9, depth=3))
    strategy = NCM() + Exits() + EarlyExit(budget=0.9)
    learner = Learner(net, compose(strategy), seed=0)
    samples = held_out()
    learner.begin(context(samples).experience, classes=(0, 1, 2, 3), epochs=1)
    learner.before_epoch(0)
    learner.end()
    net.eval()
    scores = learner.corrected_output(samples.prepare(samples.x)).logits
    assert not torch.equal(scores[0], net(samples.prepare(samples.x)).logits[0])
    policy = EarlyExit(budget=0.9).policy(learner.state["early_exit"])
    exit_N = select(scores, policy).exit_B
    cost = torch.tensor(cumulative_macs(net), dtype=torch.float64)
    within = 0.9 * backbone_macs(net)
    assert cost[exit_N].mean() <= within
    # each finite threshold is next to the confidence of a held-out sample under the corrected scores, and reached by it
    confidences = torch.cat([s.softmax(1).amax(1).double() for s in scores[:-1]]).detach()
    finite = [t for t in policy.thresholds if 0 < t <= 1]
    for threshold in finite:
        assert 0 < float(confidences[confidences >= threshold].min()) - threshold < 1.01 * CLEARANCE
    assert finite


def test_before_a_gate_is_fitted_no_exit_is_sure():
    scores = tuple(torch.full((3, 2), float(exit)) for exit in range(4))
    component = EarlyExit(measure="gate", threshold=0.01)
    state = {"thresholds": 0.01, "gate": None}
    assert torch.equal(component.predict(Output(scores), state), scores[-1])


@pytest.mark.parametrize("option", [{"budget": 0.2}, {"threshold": 0.5}, {"measure": "entropy"}, {"fallback": "confident"}])
@pytest.mark.parametrize("rule", ["last", "confident", "mean", "vote"])
def test_an_option_of_stopping_is_refused_with_a_rule_that_computes_all_exits(rule, option):
    (name,) = option
    with pytest.raises(ConfigError, match=rf"^components\.early_exit\.{name}: found .* with rule {rule}, which computes all"):
        EarlyExit(rule=rule, **option)
    assert EarlyExit(rule=rule).rule == rule
