"""Counting on the device against one sample at a time in plain Python."""

from __future__ import annotations

import itertools
import json
import math
import random

import numpy as np
import pytest
import torch

from clframe.errors import ClframeError
from clframe.exits.study import ExitScores, evaluate
from clframe.metrics import Tally, TallyCounter


def wins(logits, label, candidates):
    """Whether ``label`` has the highest logit among ``candidates``, one number at a time."""
    best, winner = -math.inf, None
    for c in sorted(candidates):
        if c < len(logits):
            if math.isnan(logits[c]):
                return False
            if logits[c] > best:
                best, winner = logits[c], c
    return winner == label


def count_longhand(batches, experiences, classes):
    zeros = [[[0] * classes for _ in range(experiences)] for _ in range(3)]
    for j, logits_BC, y_B, classes_of_j in batches:
        for logits, label in zip(logits_BC.tolist(), y_B.tolist(), strict=True):
            zeros[0][j][label] += 1
            zeros[1][j][label] += wins(logits, label, range(len(logits)))
            zeros[2][j][label] += wins(logits, label, classes_of_j)
    return Tally(*zeros)


def count(batches, experiences, classes):
    counter = TallyCounter(experiences, classes, device="cpu")
    for batch in batches:
        counter.update(*batch)
    return counter.result()


def random_batch(generator, *, classes, columns, size, unlearnt=()):
    """Few distinct logits, so that ties happen; ``unlearnt`` columns are -inf."""
    logits_BC = torch.randint(-3, 4, (size, columns), generator=generator).float()
    logits_BC[:, list(unlearnt)] = -torch.inf
    return logits_BC, torch.randint(0, classes, (size,), generator=generator)


@pytest.mark.parametrize("size", [1, 2, 13, 64])
@pytest.mark.parametrize(
    ("columns", "unlearnt"),
    [(7, ()), (5, ()), (5, (1, 3)), (7, (0, 6)), (1, ()), (0, ()), (4, (0, 1, 2, 3))],
)
@pytest.mark.parametrize(
    "classes_of_j", [(2, 3), (3, 2), (0, 4, 6), (5, 6), (1, 3), (), (0, 1, 2, 3, 4, 5, 6), (6, 0)]
)
def test_counts_equal_a_loop_over_samples(size, columns, unlearnt, classes_of_j):
    generator = torch.Generator().manual_seed(size * 100 + columns)
    batches = []
    for j in (0, 2, 2):
        logits_BC, y_B = random_batch(generator, classes=7, columns=columns, size=size, unlearnt=unlearnt)
        batches.append((j, logits_BC, y_B, classes_of_j))
    found = count(batches, 3, 7)
    assert found == count_longhand(batches, 3, 7)
    assert sum(found.samples_E) == 3 * size


def test_the_longhand_cases_have_right_and_wrong_answers_in_them():
    generator = torch.Generator().manual_seed(0)
    logits_BC, y_B = random_batch(generator, classes=7, columns=7, size=500)
    tally = count([(0, logits_BC, y_B, (0, 4, 6))], 1, 7)
    assert 0 < tally.correct_EC[0][0] < tally.correct_aware_EC[0][0] < tally.total_EC[0][0]
    assert tally.correct_aware_EC[0][1] == 0  # class 1 is not a class of this experience


def test_labels_beyond_the_columns_are_wrong_and_counted():
    tally = count([(0, torch.zeros(3, 2), torch.tensor([0, 2, 3]), (2, 3))], 1, 4)
    assert tally == Tally(((1, 0, 1, 1),), ((1, 0, 0, 0),), ((0, 0, 0, 0),))


def test_a_row_without_a_winner_is_wrong():
    nothing, nan = -torch.inf, torch.nan
    logits_BC = torch.tensor([[nothing, nothing], [nan, nan], [nan, 1.0], [torch.inf, 0.0], [0.0, nothing]])
    tally = count([(0, logits_BC, torch.zeros(5, dtype=torch.long), (0,))], 1, 2)
    assert tally == Tally(((5, 0),), ((1, 0),), ((1, 0),))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_exits_and_tally_count_logits_that_are_not_finite_alike(bad):
    """``-inf`` is the logit of a class that is not learned yet; NaN and ``+inf`` predict nothing."""
    logits_BC = torch.tensor([[bad, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0, bad, 1.0]])
    y_B = torch.tensor([0, 0, 2])
    scores = ExitScores(logits_BC[None].numpy(), y_B.numpy(), np.zeros(3, dtype=np.int64))
    correct_B = evaluate(scores, (1,)).correct_KN[0]
    assert correct_B.tolist() == [False, True, bad == -torch.inf]
    assert count([(0, logits_BC, y_B, (0, 1, 2))], 1, 3).correct_EC == ((1, 0, int(correct_B[2])),)


def test_one_class():
    tally = count([(0, torch.tensor([[-5.0]]), torch.tensor([0]), (0,))], 1, 1)
    assert tally == Tally(((1,),), ((1,),), ((1,),))


def test_an_empty_batch_counts_nothing():
    empty = torch.zeros(0, dtype=torch.long)
    assert count([(0, torch.zeros(0, 3), empty, (0, 1))], 1, 3).samples_E == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_every_precision_and_with_gradients(dtype):
    logits_BC = torch.eye(3, dtype=dtype, requires_grad=True)
    tally = count([(0, logits_BC, torch.tensor([0, 1, 1]), (0, 2))], 1, 3)
    assert tally == Tally(((1, 2, 0),), ((1, 1, 0),), ((1, 0, 0),))


def test_small_label_types():
    counter = TallyCounter(1, 3, device="cpu")
    counter.update(0, torch.eye(3), torch.tensor([0, 1, 2], dtype=torch.uint8), (1, 2))
    assert counter.result() == Tally(((1, 1, 1),), ((1, 1, 1),), ((0, 1, 1),))


def test_any_split_into_batches_gives_the_same_counts():
    generator = torch.Generator().manual_seed(3)
    logits_BC, y_B = random_batch(generator, classes=6, columns=5, size=97)
    whole = count([(1, logits_BC, y_B, (0, 2, 5))], 2, 6)
    cuts = random.Random(0)
    for _ in range(10):
        edges = [0, *sorted(cuts.sample(range(1, 97), cuts.randint(1, 30))), 97]
        parts = [(1, logits_BC[a:b], y_B[a:b], (0, 2, 5)) for a, b in itertools.pairwise(edges)]
        assert count(parts, 2, 6) == whole


def test_columns_may_grow_between_updates():
    counter = TallyCounter(1, 3, device="cpu")
    y_B = torch.tensor([2])
    counter.update(0, torch.tensor([[0.0, 1.0]]), y_B, (0, 2))
    counter.update(0, torch.tensor([[0.0, 1.0, 2.0]]), y_B, (0, 2))
    assert counter.result() == Tally(((0, 0, 2),), ((0, 0, 1),), ((0, 0, 1),))


def test_accuracies_are_exact_ratios_and_nan_without_samples():
    total_EC = ((3, 2, 0), (0, 1, 0), (0, 0, 0))
    tally = Tally(total_EC, ((1, 2, 0), (0, 0, 0), (0, 0, 0)), ((3, 2, 0), (0, 0, 0), (0, 0, 0)))
    assert tally.samples_E == (5, 1, 0)
    assert tally.accuracy_E[:2] == (3 / 5, 0.0)
    assert tally.accuracy_aware_E[:2] == (1.0, 0.0)
    assert tally.accuracy_C[:2] == (1 / 3, 2 / 3)
    assert math.isnan(tally.accuracy_E[2])
    assert math.isnan(tally.accuracy_aware_E[2])
    assert math.isnan(tally.accuracy_C[2])


def test_a_tally_survives_json():
    tally = Tally(((3, 2),), ((1, 2),), ((3, 2),))
    assert Tally(**json.loads(json.dumps(tally.as_tree()))) == tally


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ((((3,),), ((4,),), ((3,),)), "tally: correct_EC has 4 of 3 samples"),
        ((((3,),), ((3,),), ((-1,),)), "tally: correct_aware_EC has -1 of 3 samples"),
        ((((3,),), ((3, 0),), ((3,),)), "tally: correct_EC and total_EC differ in shape"),
        ((((3,), (1, 2)), ((3,), (1, 2)), ((3,), (1, 2))), "differ in shape"),
    ],
)
def test_counts_that_cannot_be_are_refused(counts, message):
    with pytest.raises(ClframeError) as caught:
        Tally(*counts)
    assert message in str(caught.value)


def count_without_waiting(device):
    counter = TallyCounter(2, 7, device=device)
    for classes_of_j in ((2, 3), (0, 4, 6), (0, 4, 6), (6,), ()):
        counter.update(1, torch.ones(5, 6, device=device), torch.full((5,), 6, device=device), classes_of_j)
    return counter


def test_an_update_never_reads_a_value_from_the_device():
    assert count_without_waiting("meta").counts_3EC.shape == (3, 2, 7)  # tensors without values to read


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# torch warns whenever the mode is set; tested is what it detects
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_an_update_never_waits_for_cuda_and_counts_the_same():
    count_without_waiting("cuda")  # allocations and libraries
    generator = torch.Generator().manual_seed(1)
    batch = random_batch(generator, classes=7, columns=6, size=1001, unlearnt=(1,))
    expected = TallyCounter(2, 7, device="cpu")
    found = TallyCounter(2, 7, device="cuda")
    on_device = tuple(tensor.cuda() for tensor in batch)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for classes_of_j in ((2, 3), (0, 4, 6), (6,), ()):
            found.update(1, *on_device, classes_of_j)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for classes_of_j in ((2, 3), (0, 4, 6), (6,), ()):
        expected.update(1, *batch, classes_of_j)
    assert found.result() == expected.result()
