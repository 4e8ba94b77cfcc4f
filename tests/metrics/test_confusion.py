"""Counts by true and predicted class, against scikit-learn and by hand."""

from __future__ import annotations

import torch
from sklearn.metrics import confusion_matrix

from clframe.metrics import TallyCounter
from clframe.metrics.confusion import ConfusionCounter

INF = float("inf")


def test_counts_are_those_of_scikit_learn_and_agree_with_the_tally():
    generator = torch.Generator().manual_seed(3)
    counter, tally = ConfusionCounter(7, device="cpu"), TallyCounter(1, 7, device="cpu")
    labels, predictions = [], []
    for size in (5, 1, 64):
        scores_BC, y_B = torch.randn(size, 5, generator=generator), torch.randint(7, (size,), generator=generator)
        counter.update(scores_BC, y_B)
        tally.update(0, scores_BC, y_B, range(7))
        labels += y_B.tolist()
        predictions += scores_BC.argmax(1).tolist()
    found = counter.result()
    assert found.tolist() == confusion_matrix(labels, predictions, labels=range(7)).tolist()
    assert tuple(found.diagonal().tolist()) == tally.result().correct_EC[0]


def test_a_sample_without_a_prediction_is_not_counted_and_ties_go_to_the_lowest_class():
    counter = ConfusionCounter(2, device="cpu")
    scores_BC = torch.tensor([[float("nan"), 1.0], [-INF, -INF], [0.5, 0.5], [-INF, 0.0]])
    counter.update(scores_BC, torch.tensor([1, 1, 1, 0]))
    assert counter.result().tolist() == [[0, 1], [1, 0]]


def test_a_network_without_classes_predicts_nothing():
    counter = ConfusionCounter(2, device="cpu")
    counter.update(torch.zeros(3, 0), torch.tensor([0, 1, 1]))
    assert counter.result().tolist() == [[0, 0], [0, 0]]
