"""Measures of confidence by their formulas written out, and the laws of thresholds."""

from __future__ import annotations

import copy
import itertools
import math
from importlib.metadata import EntryPoint

import pytest
import torch

import clframe
from clframe.errors import ClframeError, ConfigError, DataError, UnknownNameError
from clframe.exits import policies
from clframe.exits.decisions import NEVER, ExitEvaluation, decide, select
from clframe.exits.gate import LearnedConfidence, confidence_features, fit_learned_confidence
from clframe.exits.learned import confidences
from clframe.exits.policies import (
    CONFIDENCE_MEASURES,
    ExitPolicy,
    FittedConfidence,
    entropy,
    margin,
    max_probability,
    patience,
    patience_threshold,
    register_confidence,
)
from clframe.registry import Registry
from clframe.training.prediction_cost import stops_B

UNFITTED = ("max_probability", "entropy", "margin", "patience")

INF = float("inf")


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("row", [[0.3, -1.2, 2.0], [5.0, 5.0], [-3.0, 0.1, 0.2, 0.3, 9.0], [0.7, 0.7, 0.7]])
def test_measures_are_their_formulas(row):
    p = softmax(row)
    scores_BC = torch.tensor([row])
    high, low = sorted(p)[-1], sorted(p)[-2]
    assert max_probability(0, scores_BC, ())[0].item() == pytest.approx(max(p), abs=1e-6)
    assert margin(0, scores_BC, ())[0].item() == pytest.approx(high - low, abs=1e-6)
    expected = 1 + sum(q * math.log(q) for q in p) / math.log(len(p))
    assert entropy(0, scores_BC, ())[0].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", UNFITTED)
def test_classes_not_met_change_nothing(name):
    scores_BC = torch.randn(7, 4)
    gaps_BC = torch.full((7, 6), -INF)
    gaps_BC[:, [0, 2, 3, 5]] = scores_BC
    carried, gaps = (), ()
    for exit in range(3):
        confidence_B, carried = CONFIDENCE_MEASURES.get(name)(exit, scores_BC.roll(exit // 2, 0), carried)
        with_gaps_B, gaps = CONFIDENCE_MEASURES.get(name)(exit, gaps_BC.roll(exit // 2, 0), gaps)
        torch.testing.assert_close(with_gaps_B, confidence_B)


@pytest.mark.parametrize("name", ["max_probability", "entropy", "margin"])
@pytest.mark.parametrize("scores_BC", [torch.randn(3, 1), torch.tensor([[-INF, 4.0], [2.0, -INF]])])
def test_a_single_class_is_certain(name, scores_BC):
    assert CONFIDENCE_MEASURES.get(name)(0, scores_BC, ())[0].tolist() == [1.0] * len(scores_BC)


@pytest.mark.parametrize("name", UNFITTED)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("classes", [1, 2, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_confidence_lies_between_zero_and_one(name, scale, classes, dtype):
    carried = ()
    for exit in range(4):
        scores_BC = scale * torch.randn(33, classes).to(dtype)
        confidence_B, carried = CONFIDENCE_MEASURES.get(name)(exit, scores_BC, carried)
        assert confidence_B.shape == (33,)
        assert ((confidence_B >= 0) & (confidence_B <= 1)).all()
        assert (confidence_B >= ExitPolicy(thresholds=0.0).of_exits(2)[0]).all()
        assert not (confidence_B >= 1.0001).any()


def test_half_precision_scores_are_judged_in_single_precision():
    scores_BC = torch.tensor([[7.0, 0.0]], dtype=torch.bfloat16)
    assert max_probability(0, scores_BC, ())[0].item() == pytest.approx(1 / (1 + math.exp(-7)), abs=1e-7)


def test_patience_counts_consecutive_equal_predictions():
    answers = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 0, 1], [2, 2, 1, 1]])
    runs = [[1, 2, 3, 4], [1, 1, 2, 3], [1, 1, 1, 1], [1, 2, 1, 2]]
    carried = ()
    for exit in range(4):
        confidence_B, carried = patience(exit, torch.nn.functional.one_hot(answers[:, exit], 3).float(), carried)
        assert confidence_B.tolist() == pytest.approx([(run[exit] - 1) / run[exit] for run in runs])


def test_a_patience_threshold_fires_at_just_that_many_agreements():
    scores_BC, carried = torch.tensor([[1.0, 0.0]]), ()
    for agreements in range(30):
        confidence_B, carried = patience(agreements, scores_BC, carried)
        assert (confidence_B >= patience_threshold(agreements)).item()
        assert not (confidence_B >= patience_threshold(agreements + 1)).item()


def test_exits_whose_confidence_is_needed():
    policy = ExitPolicy(thresholds=(0.5, 1.5, 1.0))
    assert policy.confidence_exits(4) == (0, 2)
    assert policy.confidence_exits(4, among=[1, 2, 3]) == (2,)
    surest = ExitPolicy(thresholds=(0.5, 1.5, 1.0), fallback="confident")
    assert surest.confidence_exits(4) == (0, 1, 2, 3)
    assert surest.confidence_exits(4, among=[1]) == (1, 3)
    assert ExitPolicy(thresholds=2.0).confidence_exits(4) == ()
    assert ExitPolicy(thresholds=0.5).confidence_exits(1) == ()


def test_a_measure_that_carries_values_is_asked_at_every_exit_before_one_that_can_fire():
    policy = ExitPolicy(measure=patience, thresholds=(2.0, 0.5, 2.0))
    assert policy.confidence_exits(4) == (0, 1) and policy.answering_exits(4) == (1,)
    assert policy.confidence_exits(4, among=[0]) == ()
    assert ExitPolicy(measure=patience, thresholds=2.0).confidence_exits(4) == ()
    surest = ExitPolicy(measure=patience, thresholds=0.5, fallback="confident")
    assert surest.confidence_exits(4, among=[2]) == (0, 1, 2, 3) and surest.answering_exits(4, among=[2]) == (2, 3)


@pytest.mark.parametrize("fallback", ["last", "confident"])
@pytest.mark.parametrize("name", ["max_probability", "patience", "failure"])
def test_execution_decides_as_the_solver_assumes_where_an_exit_never_stops(name, fallback):
    torch.manual_seed(2)
    pairs, targets_N = noisy_exits(200)
    scores = [*pairs, *(each + torch.randn_like(each) for each in pairs)]
    measure = CONFIDENCE_MEASURES.get(name)
    measure = measure.fit(scores, targets_N) if isinstance(measure, type) else measure
    evaluation = ExitEvaluation(
        confidence_KN=confidences(measure, scores).double(),
        correct_KN=torch.stack([each.argmax(1) == targets_N for each in scores]), cost_K=tuple(range(1, len(scores) + 1)),
    )  # fmt: skip
    for thresholds in itertools.product([0.0, 0.5, 0.7, NEVER], repeat=len(scores) - 1):
        policy = ExitPolicy(measure=measure, thresholds=thresholds, fallback=fallback)
        expected = decide(evaluation, thresholds, fallback=fallback)
        assert torch.equal(select(scores, policy).exit_B, expected.exit_N)
        assert torch.equal(stops_B(scores, policy), expected.stop_N)


def test_wrong_policies_are_one_line():
    with pytest.raises(ConfigError, match=r"^policy: found 3 thresholds for 3 exits; give one, or one for each exit but the last$"):
        ExitPolicy(thresholds=(0.1, 0.2, 0.3)).of_exits(3)
    with pytest.raises(ConfigError, match=r"^policy: found thresholds nan; give numbers$"):
        ExitPolicy(thresholds=float("nan"))
    with pytest.raises(ConfigError, match=r"^policy: found fallback 'first'; give 'last' or 'confident'$"):
        ExitPolicy(thresholds=0.5, fallback="first")


def noisy_exits(samples: int = 600) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Scores of two exits whose accuracy grows with their confidence; the second is more accurate."""
    targets_N = torch.randint(5, (samples,))
    strength_N1 = 4 * torch.rand(samples, 1)
    right_NC = torch.nn.functional.one_hot(targets_N, 5) * strength_N1
    return [right_NC + torch.randn(samples, 5), 2 * right_NC + torch.randn(samples, 5)], targets_N


def test_a_fitted_gate_has_no_gradient_left():
    scores, targets_N = noisy_exits()
    gate = fit_learned_confidence(scores, targets_N, decay=0.01)
    for exit, scores_NC in enumerate(scores):
        signs_ND = confidence_features(exit, scores_NC).double()
        mean_D, spread_D = signs_ND.mean(0), signs_ND.std(0, correction=0)
        weight_D, bias = gate.weight_KD[exit].double() * spread_D, gate.bias_K[exit] + gate.weight_KD[exit].double() @ mean_D
        error_N = gate(exit, scores_NC, ())[0].double() - (scores_NC.argmax(1) == targets_N).double()
        slope_D = (error_N[:, None] * (signs_ND - mean_D) / spread_D).mean(0) + 0.01 * weight_D
        assert slope_D.abs().max() < 1e-5
        assert abs(error_N.mean() + 0.01 * bias) < 1e-5


def test_a_gate_is_calibrated_and_ranks_correct_predictions_higher():
    scores, targets_N = noisy_exits()
    gate = fit_learned_confidence(scores, targets_N)
    held_out, answers_N = noisy_exits(2000)
    for exit, scores_NC in enumerate(held_out):
        confidence_N, carried = gate(exit, scores_NC, ())
        right_N = scores_NC.argmax(1) == answers_N
        assert carried == ()
        assert confidence_N.mean().item() == pytest.approx(right_N.float().mean().item(), abs=0.04)
        assert confidence_N[right_N].mean() > confidence_N[~right_N].mean() + 0.1


@pytest.mark.parametrize("targets", [[0, 0, 0, 0], [1, 1, 1, 1]])
def test_exits_always_right_or_always_wrong_give_finite_gates(targets):
    scores_NC = torch.tensor([[3.0, 0.0, -INF], [1.0, 0.0, -INF], [2.0, -1.0, -INF], [0.5, 0.2, -INF]])
    gate = fit_learned_confidence([scores_NC, scores_NC], torch.tensor(targets))
    confidence_N = gate(1, scores_NC, ())[0]
    assert gate.weight_KD.isfinite().all()
    assert ((confidence_N > 0.5) == (targets[0] == 0)).all()


def test_one_class_and_one_sample_can_be_fitted():
    gate = fit_learned_confidence([torch.randn(1, 1)], torch.tensor([0]))
    assert 0.5 < gate(0, torch.randn(1, 1), ())[0].item() < 1
    with pytest.raises(DataError, match=r"^fit_learned_confidence: found no samples; give held-out scores and targets$"):
        fit_learned_confidence([torch.empty(0, 3)], torch.empty(0, dtype=torch.long))


def test_a_gate_is_fitted_the_same_twice_and_its_state_brings_its_size():
    scores, targets_N = noisy_exits(50)
    state = copy.deepcopy(fit_learned_confidence(scores, targets_N).state_dict())
    again = fit_learned_confidence(scores, targets_N).state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    loaded = LearnedConfidence(7)
    loaded.load_state_dict(state)
    assert torch.equal(loaded(1, scores[1], ())[0], fit_learned_confidence(scores, targets_N)(1, scores[1], ())[0])


def test_an_unknown_measure_names_the_nearest_one():
    from strategies import EarlyExit

    with pytest.raises(UnknownNameError, match=r"^components\.early_exit\.measure: .*'margn'.*margin"):
        EarlyExit(measure="margn")


@pytest.fixture
def registered():
    """Registers a measure for a test."""
    before = dict(CONFIDENCE_MEASURES._entries)
    yield register_confidence
    CONFIDENCE_MEASURES._entries = before


FAST = ["backbone=mlp", "backbone.depth=3", "backbone.width=16", "trainer.epochs=1", "trainer.progress=false",
        "trainer.loggers=[]", "benchmark.experiences=2", "benchmark.validation=0.2"]  # fmt: skip


def check_run(strategy, tmp_path):
    """Train by name, then compare dynamic inference with the evaluation of all exits."""
    result = clframe.run("quickstart", [*FAST, f"strategy={strategy}"], output=tmp_path)
    model, test = clframe.load(result.run_folder), clframe.data.digits().test
    found = model.dynamic()(model.prepare(test.x))
    assert torch.equal(model.ids(found.scores_BC), model.classify(test.x))
    assert len(found.exit_B.unique()) > 1
    right = (model.classify(test.x) == test.y).float().mean().item()
    assert right == pytest.approx(result.final_weighted_accuracy, abs=1e-6)
    return model


def test_a_registered_measure_works_from_a_config(registered, tmp_path):
    @registered("top_two_ratio")
    def top_two_ratio(exit, scores_BC, carried):
        first_B, second_B = scores_BC.softmax(1).topk(2, dim=1).values.unbind(1)
        return 1 - second_B / first_B, ()

    model = check_run("er(memory=40) + exits + early_exit(measure=top_two_ratio, budget=0.8)", tmp_path)
    assert model.dynamic().policy.measure is top_two_ratio
    with pytest.raises(ClframeError, match="registered twice"):
        registered("top_two_ratio")(max_probability)


def test_a_registered_measure_with_parameters_is_fitted_saved_and_restored(registered, tmp_path):
    @registered("scaled")
    class Scaled(FittedConfidence):
        """Maximum probability times the accuracy of the exit on held-out data."""

        def __init__(self, exits):
            super().__init__(exits)
            self.register_buffer("accuracy_K", torch.zeros(exits))

        @classmethod
        def fit(cls, scores, targets_N):
            measure = cls(len(scores))
            right = [(scores_NC.argmax(1) == targets_N).float().mean() for scores_NC in scores]
            measure.accuracy_K.copy_(torch.stack(right))
            return measure

        def forward(self, exit, scores_BC, carried):
            return max_probability(exit, scores_BC, ())[0] * self.accuracy_K[exit], ()

    model = check_run("er(memory=40) + exits + early_exit(measure=scaled, budget=0.8)", tmp_path)
    measure = model.dynamic().policy.measure
    assert isinstance(measure, Scaled) and len(measure.accuracy_K) == 3 and (measure.accuracy_K > 0).all()
    with pytest.raises(ConfigError, match=r"early_exit\.measure: found 'scaled'.*which needs held-out data"):
        clframe.run("quickstart", [*FAST, "benchmark.validation=0", "strategy=exits + early_exit(measure=scaled)"],
                    output=tmp_path)  # fmt: skip


class NoFit(FittedConfidence):
    def forward(self, exit, scores_BC, carried):
        return scores_BC[:, 0], ()


class TwoArguments(FittedConfidence):
    @classmethod
    def fit(cls, scores, targets_N):
        return cls(len(scores))

    def forward(self, exit, scores_BC):
        return scores_BC[:, 0], ()


@pytest.mark.parametrize(
    "entry, message",
    [
        (lambda scores_BC: scores_BC, r"found the signature <lambda>\(scores_BC\); expected a function \(exit, scores_BC"),
        (torch.nn.Linear, r"found the class Linear; expected a function \(exit, scores_BC, carried\) -> "),
        (NoFit, "NoFit does not define fit; add it$"),
        (TwoArguments, r"signature forward\(self, exit, scores_BC\); expected forward\(self, exit, scores_BC, carried\)$"),
    ],
)
def test_what_is_no_measure_is_refused_when_it_is_registered(entry, message, registered):
    with pytest.raises(ConfigError, match=rf"^confidence measure 'mine': .*{message}"):
        registered("mine")(entry)
    assert "mine" not in CONFIDENCE_MEASURES


def test_measures_of_installed_packages_are_found_by_their_entry_point(monkeypatch):
    point = EntryPoint("mine", "clframe.exits.policies:margin", "clframe.exit_policies")
    broken = EntryPoint("broken", "no_such_module:measure", "clframe.exit_policies")
    fresh = Registry("confidence measure", group="clframe.exit_policies", load=policies._load_measure)
    monkeypatch.setattr("clframe.registry.entry_points", lambda group: [point, broken] if "exit_policies" in group else [])
    assert fresh.get("mine") is policies.margin
    with pytest.raises(UnknownNameError, match="not loaded: entry point broken"):
        fresh.get("broken")
