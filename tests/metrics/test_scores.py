"""The metrics of a run by name, from counts of uneven experiences."""

from __future__ import annotations

import math

import pytest
import torch

from clframe.errors import ClframeError
from clframe.metrics import Tally, TokenCounter, all_metrics, scores

TOTAL = ((3, 2, 0, 0), (0, 0, 1, 0), (0, 0, 0, 7))  # experiences of 5, 1 and 7 samples
RIGHT = (
    ((3, 1, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)),
    ((2, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 0)),
    ((1, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 5)),
)
AWARE = ((3, 2, 0, 0), (0, 0, 1, 0), (0, 0, 0, 6))


def test_every_metric_of_uneven_experiences_longhand():
    found = scores(
        [Tally(TOTAL, right, AWARE) for right in RIGHT],
        baseline=Tally(TOTAL, ((1, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 2)), AWARE),
    )
    expected = {
        "final_average_accuracy": (1 / 5 + 0 + 5 / 7) / 3,
        "final_average_accuracy_task_aware": (1 + 1 + 6 / 7) / 3,
        "final_weighted_accuracy": 6 / 13,
        "average_incremental_accuracy": (4 / 5 + (2 / 5 + 1) / 2 + (1 / 5 + 0 + 5 / 7) / 3) / 3,
        "forgetting": ((4 / 5 - 1 / 5) + (1 - 0)) / 2,
        "backward_transfer": ((1 / 5 - 4 / 5) + (0 - 1)) / 2,
        "forward_transfer": ((0 - 0) + (0 - 2 / 7)) / 2,
        "learning_accuracy": (4 / 5 + 1 + 5 / 7) / 3,
    }
    assert list(found) == [name for name, metric in all_metrics().items() if not metric.per_token]
    assert {name: score.value for name, score in found.items()} == pytest.approx(expected, abs=1e-15)
    assert not any(score.undefined for score in found.values())


def test_every_metric_of_tokens_longhand():
    total = ((4, 0), (0, 8))  # domains of 4 and 8 tokens
    nats = ((8.0, 40.0), (12.0, 16.0))  # sums: 2 and 5 nats per token, then 3 and 2
    tallies = [Tally(total, ((1, 0), (0, 2)), total, nats_E=sums) for sums in nats]
    found = scores(tallies, baseline=Tally(total, ((0, 0), (0, 0)), total, nats_E=(24.0, 48.0)))
    expected = {
        "final_perplexity": math.exp((3 + 2) / 2),
        "final_nats_per_token": (3 + 2) / 2,
        "learning_nats": (2 + 2) / 2,
        "forgetting_nats": 3 - 2,
        "backward_transfer_nats": 2 - 3,
        "forward_transfer_nats": 6 - 5,
    }
    assert list(found) == list(all_metrics())
    assert {name: found[name].value for name in expected} == pytest.approx(expected)
    running = scores(tallies[:1], running=True)
    assert running["final_perplexity"].value == pytest.approx(math.exp(2))  # of the domain seen
    assert running["forgetting_nats"].undefined == "needs two experiences, found one"
    assert Tally(**tallies[0].as_tree()) == tallies[0] and "nats_E" not in Tally(total, total, total).as_tree()
    with pytest.raises(ClframeError, match="nats_E and total_EC differ in length"):
        Tally(total, total, total, nats_E=(1.0,))


def test_tokens_are_counted_by_domain_and_their_likelihoods_summed():
    counter = TokenCounter(2, 3, device="cpu")
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [torch.nan, 0.0]])  # two windows of two tokens
    counter.update(1, logits[:3].repeat(2, 1)[:4], torch.tensor([0, 0, 1, 0]), torch.tensor([2, 1]))
    counter.update(0, logits[2:], torch.tensor([1, 1]), torch.tensor([0]))
    tally = counter.result()
    assert tally.total_EC == ((2, 0, 0), (0, 2, 2)) and tally.correct_EC == ((1, 0, 0), (0, 2, 1))
    nll = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(1)), math.log(1 + math.exp(-3)), math.log(1 + math.exp(-2))]
    assert tally.nats_E[1] == pytest.approx(sum(nll)) and math.isnan(tally.nats_E[0])
    assert tally.nll_E[1] == pytest.approx(sum(nll) / 4) and tally.accuracy_E == (0.5, 0.75)


def test_domain_incremental_streams_have_the_same_classes_in_every_experience():
    total = ((2, 3), (4, 1))
    first = Tally(total, ((2, 3), (1, 0)), total)
    second = Tally(total, ((1, 2), (4, 1)), total)
    found = scores([first, second], baseline=Tally(total, ((0, 0), (2, 0)), total))
    assert found["final_average_accuracy"].value == pytest.approx((3 / 5 + 1) / 2)
    assert found["forgetting"].value == pytest.approx(1 - 3 / 5)
    assert found["forward_transfer"].value == pytest.approx(1 / 5 - 2 / 5)
    assert second.accuracy_C == (5 / 6, 3 / 4)


def test_one_experience_defines_accuracies_and_nothing_else():
    found = scores([Tally(((4,),), ((3,),), ((4,),))])
    undefined = {name for name, score in found.items() if math.isnan(score.value)}
    assert undefined == {"forgetting", "backward_transfer", "forward_transfer"}
    assert all(found[name].undefined for name in undefined)
    assert found["final_average_accuracy"].value == 0.75


def test_bad_evaluations_are_refused():
    one, two = Tally(((4,),), ((3,),), ((4,),)), Tally(((4, 0),), ((3, 0),), ((4, 0),))
    with pytest.raises(ClframeError, match=r"^evaluations: none; "):
        scores([])
    with pytest.raises(ClframeError, match=r"^evaluations: none; "):
        scores([], baseline=one)
    with pytest.raises(ClframeError, match=r"^evaluations: shapes \[\(1, 1\), \(1, 2\)\]"):
        scores([one, two])
    with pytest.raises(ClframeError, match=r"^evaluations: shapes "):
        scores([one], baseline=two)
