from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from clframe.replay.selection import append_rows, balanced_choice, balanced_trim, quotas
from clframe.seeding import derive_seed, epoch_order, generator_for


@pytest.mark.parametrize("size, count", [(10, 1), (10, 3), (3, 3), (2, 5), (200, 7)])
def test_quotas_share_everything_and_differ_by_one_at_most(size, count):
    shares = quotas(size, range(count))
    assert sum(shares.values()) == size
    assert max(shares.values()) - min(shares.values()) <= 1


def test_too_many_owners_have_a_place_alike_and_none_comes_back():
    """Chi-square over 20 places in 2,000 draws of 5; 43.8 is its 99.9 % quantile at 19 degrees."""
    found = torch.zeros(20)
    for salt in range(2000):
        found += torch.tensor(list(quotas(5, range(20), salt=salt).values()))
    assert float((found - 500).square().sum() / 500) < 43.8
    for salt in range(50):
        kept = [{c for c, share in quotas(5, range(count), salt=salt).items() if share} for count in range(5, 40)]
        assert all(len(now) == 5 for now in kept)
        assert all(later - before <= {5 + i} for i, (before, later) in enumerate(pairwise(kept)))
    narrower = [{c for c, share in quotas(size, range(9)).items() if share} for size in (7, 6, 3, 1)]
    assert all(fewer < more for more, fewer in pairwise(narrower))


def test_choice_is_a_random_subset_per_class():
    y = torch.tensor([0, 1, 0, 1, 0, 2, 0])
    chosen = balanced_choice(y, {0: 2, 1: 5, 2: 0}, generator=generator_for(0))
    assert y[chosen].tolist() == [0, 0, 1, 1]
    assert len(set(chosen.tolist())) == 4
    assert balanced_choice(y, {}, generator=generator_for(0)).tolist() == []
    draws = {
        tuple(sorted(balanced_choice(y, {0: 2}, generator=generator_for(s)).tolist())) for s in range(200)
    }
    assert len(draws) == 6  # all pairs of the four zeros


def test_trim_keeps_the_first_of_each():
    y = torch.tensor([1, 0, 0, 1, 0])
    assert balanced_trim(y, {0: 2, 1: 1}).tolist() == [1, 2, 0]
    assert balanced_trim(y, {}).tolist() == []


@pytest.mark.parametrize("exits", [2, 3])
@pytest.mark.parametrize("old, new", [(1, 2), (2, 1), (2, 3), (2, 2)])
def test_rows_of_several_exits_are_padded_in_their_last_dimension(exits, old, new):
    before, now = torch.ones(1, exits, old), torch.full((2, exits, new), 2.0)
    joined = append_rows(before, now)
    assert joined.shape == (3, exits, max(old, new))
    assert torch.equal(joined[:1, :, :old], before) and torch.equal(joined[1:, :, :new], now)
    assert joined.isneginf().sum() == exits * (max(0, new - old) + 2 * max(0, old - new))


def test_seeds_depend_on_every_part_of_the_place():
    places = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, 1, "a"), (0, "1"), (0, 1)]
    assert len({derive_seed(*place) for place in places}) == len(places)
    assert derive_seed(3, "order", 1, 2) == derive_seed(3, "order", 1, 2) < 2**63


def test_order_is_a_permutation_that_its_arguments_alone_decide():
    first = epoch_order(11, seed=1, experience=2, epoch=3)
    torch.rand(5)  # the global generator has no say
    assert torch.equal(first, epoch_order(11, seed=1, experience=2, epoch=3))
    assert sorted(first.tolist()) == list(range(11))
    others = [epoch_order(11, seed=s, experience=e, epoch=p) for s, e, p in ((0, 2, 3), (1, 1, 3), (1, 2, 2))]
    assert not any(torch.equal(first, other) for other in others)


def test_trimming_is_a_loop_over_the_classes():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        y = torch.randint(0, 8, (int(torch.randint(0, 30, (), generator=generator)),), generator=generator)
        classes = torch.randperm(10, generator=generator)[:6].tolist()
        quota = {c: int(torch.randint(0, 5, (), generator=generator)) for c in classes}
        longhand = torch.cat([(y == c).nonzero().flatten()[:count] for c, count in quota.items()])
        assert torch.equal(balanced_trim(y, quota), longhand)
