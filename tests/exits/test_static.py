"""Rules over the scores of all exits, each against a loop over samples in plain Python."""

from __future__ import annotations

import pytest
import torch

from clframe.exits.decisions import confident, last, mean, oracle, select, vote
from clframe.exits.policies import CONFIDENCE_MEASURES, ExitPolicy, max_probability

UNFITTED = ("max_probability", "entropy", "margin", "patience")

INF = float("inf")


def drawn(exits: int = 4, samples: int = 33, classes: int = 5) -> list[torch.Tensor]:
    scores = list(2 * torch.randn(exits, samples, classes))
    for scores_BC in scores:
        scores_BC[:, 2] = -INF  # a class not met
    return scores


@pytest.mark.parametrize("exits", [1, 2, 5])
@pytest.mark.parametrize("samples", [0, 1, 7])
def test_every_rule_gives_scores_and_an_exit_for_each_sample(exits, samples):
    scores = drawn(exits, samples)
    targets_B = torch.zeros(samples, dtype=torch.long)
    policy = ExitPolicy(thresholds=0.5)
    for answer in (last(scores), confident(scores), mean(scores), vote(scores), oracle(scores, targets_B), select(scores, policy)):
        assert answer.scores_BC.shape == (samples, 5)
        assert answer.exit_B.shape == (samples,)
        assert answer.exit_B.dtype == torch.long
        assert not answer.scores_BC.isnan().any()
        assert answer.scores_BC[:, 2].isneginf().all()
        assert ((answer.exit_B >= 0) & (answer.exit_B < exits)).all()


def test_the_rule_last_returns_the_last_exit():
    scores = drawn()
    assert torch.equal(last(scores).scores_BC, scores[-1])
    assert last(scores).exit_B.tolist() == [3] * 33


@pytest.mark.parametrize("name", ["max_probability", "entropy", "margin"])
def test_the_rule_confident_returns_the_most_confident_exit(name):
    scores = drawn()
    answer = confident(scores, measure=CONFIDENCE_MEASURES.get(name))
    for sample, exit in enumerate(answer.exit_B.tolist()):
        sure = [CONFIDENCE_MEASURES.get(name)(k, scores[k], ())[0][sample].item() for k in range(4)]
        assert exit == sure.index(max(sure))
        assert torch.equal(answer.scores_BC[sample], scores[exit][sample])


def test_of_equally_confident_exits_the_first_is_used():
    row = torch.tensor([[1.0, 0.0]])
    assert confident([row - 5, row.flip(1), row]).exit_B.tolist() == [0]


def test_the_mean_is_of_probabilities():
    scores = drawn()
    p_BC = sum(scores_BC.softmax(1) for scores_BC in scores) / 4
    torch.testing.assert_close(mean(scores).scores_BC.softmax(1), p_BC)
    torch.testing.assert_close(mean(scores).scores_BC.exp(), p_BC)


def test_the_vote_is_the_majority_then_the_highest_probability():
    scores = drawn(exits=5, samples=200)
    answer_B = vote(scores).scores_BC.argmax(1)
    ties = 0
    for sample in range(200):
        named = [scores_BC[sample].argmax().item() for scores_BC in scores]
        sure = [scores_BC[sample].softmax(0).max().item() for scores_BC in scores]
        most = max(named.count(c) for c in named)
        rivals = {c for c in named if named.count(c) == most}
        ties += len(rivals) > 1
        surest = max((s, c) for s, c in zip(sure, named, strict=True) if c in rivals)
        assert answer_B[sample] == surest[1]
    assert ties > 20


def test_a_full_tie_goes_to_the_lowest_class():
    left, right = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[-1.0, 0.0, 1.0]])
    assert vote([right, left]).scores_BC.argmax(1).tolist() == [0]


def test_the_oracle_takes_the_first_exit_that_is_right():
    scores = drawn()
    targets_B = torch.randint(5, (33,))
    answer = oracle(scores, targets_B)
    for sample, exit in enumerate(answer.exit_B.tolist()):
        right = [k for k in range(4) if scores[k][sample].argmax() == targets_B[sample]]
        assert exit == (right[0] if right else 3)
        assert torch.equal(answer.scores_BC[sample], scores[exit][sample])
    assert len(answer.exit_B.unique()) > 2


@pytest.mark.parametrize("fallback", ["last", "confident"])
@pytest.mark.parametrize("exits", [None, [0, 2], [1, 2]])
@pytest.mark.parametrize("thresholds", [0.6, (0.8, 0.5, 0.7), (2.0, 0.6, 0.6)])
def test_select_takes_the_first_exit_that_fires_else_the_fallback(fallback, exits, thresholds):
    scores = drawn()
    answer = select(scores, ExitPolicy(thresholds=thresholds, fallback=fallback), exits=exits)
    limits = thresholds if isinstance(thresholds, tuple) else (thresholds,) * 3
    enabled = [0, 1, 2] if exits is None else exits
    sure_KB = torch.stack([max_probability(k, scores[k], ())[0] for k in range(4)])
    for sample, exit in enumerate(answer.exit_B.tolist()):
        fired = [k for k in enabled if sure_KB[k, sample] >= limits[k]]
        left_over = max([*enabled, 3], key=lambda k: sure_KB[k, sample].item()) if fallback == "confident" else 3
        assert exit == (fired[0] if fired else left_over)
        assert torch.equal(answer.scores_BC[sample], scores[exit][sample])
    assert len(answer.exit_B.unique()) > 1


def test_the_extremes_are_the_first_exit_and_the_last():
    scores = drawn()
    for measure in map(CONFIDENCE_MEASURES.get, UNFITTED):
        assert select(scores, ExitPolicy(measure=measure, thresholds=0.0)).exit_B.tolist() == [0] * 33
        nobody = select(scores, ExitPolicy(measure=measure, thresholds=1.0001))
        assert torch.equal(nobody.scores_BC, scores[-1])
        assert nobody.exit_B.tolist() == [3] * 33


def test_patience_requires_exits_that_agree():
    named = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 2], [2, 2, 2, 2]])
    scores = list(torch.nn.functional.one_hot(named.T, 3).float())
    once = select(scores, ExitPolicy(measure=CONFIDENCE_MEASURES.get("patience"), thresholds=1 / 2))
    assert once.exit_B.tolist() == [2, 1, 3, 1]
    twice = select(scores, ExitPolicy(measure=CONFIDENCE_MEASURES.get("patience"), thresholds=2 / 3))
    assert twice.exit_B.tolist() == [3, 3, 3, 2]
    skipping = select(scores, ExitPolicy(measure=CONFIDENCE_MEASURES.get("patience"), thresholds=1 / 2), exits=[0, 2])
    assert skipping.exit_B.tolist() == [2, 3, 3, 2]  # exits that may not stop a sample count in its run
