"""Rows of classifiers between experiences, longhand."""

from __future__ import annotations

import math

import torch

from clframe.functional.prototypes import alignment, consolidate_rows


def test_alignment_is_the_ratio_of_mean_lengths():
    old, new = torch.randn(5, 3), 4 * torch.randn(2, 3)
    mean = lambda rows: sum(math.sqrt(sum(v * v for v in row)) for row in rows.tolist()) / len(rows)  # noqa: E731
    assert math.isclose(alignment(old, new).item(), mean(old) / mean(new), rel_tol=1e-5)
    aligned = new * alignment(old, new)
    assert math.isclose(mean(aligned), mean(old), rel_tol=1e-5)


def test_alignment_without_rows_or_length_is_one():
    rows = torch.ones(2, 3)
    assert alignment(rows[:0], rows).item() == alignment(rows, rows[:0]).item() == 1
    assert alignment(rows, torch.zeros(1, 3)).item() == 1


def test_consolidated_rows_class_by_class():
    kept, fresh = torch.randn(4, 3), torch.randn(4, 3)
    past, now = torch.tensor([9, 5, 0, 0]), torch.tensor([4, 0, 7, 0])
    weight, count = consolidate_rows(kept, past, fresh, now)
    mean = (fresh[0].sum() + fresh[2].sum()) / 6
    ratio = math.sqrt(9 / 4)
    assert torch.allclose(weight[0], (kept[0] * ratio + fresh[0] - mean) / (ratio + 1))
    assert torch.allclose(weight[2], fresh[2] - mean)
    assert torch.equal(weight[1], kept[1]) and torch.equal(weight[3], kept[3])
    assert count.tolist() == [13, 5, 7, 0]
