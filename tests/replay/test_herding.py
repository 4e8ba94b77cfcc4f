"""Herding, the reservoir and columns of a memory, against longhand."""

from __future__ import annotations

import itertools

import pytest
import torch

from clframe.replay.selection import append_rows, herding, reservoir
from clframe.seeding import generator_for


def longhand(features, count):
    """Algorithm 4 of the iCaRL paper, literally: the nearest running mean, sample by sample."""
    unit = [[float(v) / sum(float(w) ** 2 for w in f) ** 0.5 for v in f] for f in features]
    width = len(unit[0])
    mean = [sum(f[d] for f in unit) / len(unit) for d in range(width)]
    picked: list[int] = []
    for k in range(1, min(count, len(unit)) + 1):

        def distance(i, k=k):
            chosen = [*picked, i]
            return sum((mean[d] - sum(unit[j][d] for j in chosen) / k) ** 2 for d in range(width))

        picked.append(min((i for i in range(len(unit)) if i not in picked), key=distance))
    return picked


@pytest.mark.parametrize("samples, features, count", [(12, 5, 12), (30, 3, 10), (7, 1, 3), (5, 8, 9), (1, 4, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_herding_is_the_greedy_running_mean(samples, features, count, seed):
    features_NF = torch.randn(samples, features, generator=generator_for(seed)) + 0.5
    if features == 1:
        features_NF = features_NF.abs() + torch.arange(samples).reshape(-1, 1)  # all alike once they are units
        assert sorted(herding(features_NF, samples).tolist()) == list(range(samples))
        return
    assert herding(features_NF, count).tolist() == longhand(features_NF.tolist(), count)


def test_herding_by_hand():
    # Units at 0, 90 and 20 degrees: the mean points at about 36, so 20 comes first; of 0 and 90, 90 brings the
    # running mean back across it.
    angles = torch.deg2rad(torch.tensor([0.0, 90.0, 20.0]))
    lengths = torch.tensor([3.0, 0.1, 50.0]).reshape(-1, 1)
    features_NF = torch.stack([angles.cos(), angles.sin()], dim=1) * lengths
    assert herding(features_NF, 3).tolist() == [2, 1, 0]


def test_a_shorter_herd_is_the_beginning_of_a_longer_one():
    features_NF = torch.randn(20, 6)
    whole = herding(features_NF, 20)
    assert all(torch.equal(herding(features_NF, k), whole[:k]) for k in range(20))
    assert herding(features_NF, 0).tolist() == [] and herding(features_NF[:0], 3).tolist() == []
    assert sorted(whole.tolist()) == list(range(20))


def test_a_herd_stands_for_its_class_better_than_chance():
    features_NF = torch.nn.functional.normalize(torch.randn(60, 8, generator=generator_for(0)) + 1)
    mean = features_NF.mean(dim=0)
    herd = float((features_NF[herding(features_NF, 6)].mean(dim=0) - mean).norm())
    chance = [
        float((features_NF[torch.randperm(60, generator=generator_for(s))[:6]].mean(dim=0) - mean).norm())
        for s in range(50)
    ]
    assert herd < sorted(chance)[4]


@pytest.mark.parametrize("size", [1, 3, 5, 9])
def test_the_reservoir_keeps_the_smallest_keys(size):
    old, new = torch.tensor([0.9, 0.1, 0.5]), torch.tensor([0.2, 0.8])
    kept, fresh = reservoir(old, new, size)
    keys = sorted([*old[kept].tolist(), *new[fresh].tolist()])
    assert keys == sorted([*old.tolist(), *new.tolist()])[:size]
    assert kept.tolist() == sorted(kept.tolist()) and fresh.tolist() == sorted(fresh.tolist())


def test_every_subset_is_equally_likely_in_whatever_portions_samples_come():
    """Chi-square over the 20 subsets of 3 of 6 samples; 43.8 is its 99.9 % quantile at 19 degrees."""
    generator, draws = generator_for(0), 1500
    for portions in ((6,), (1, 5), (2, 2, 2)):
        counts = dict.fromkeys(itertools.combinations(range(6), 3), 0)
        for _ in range(draws):
            members, keys = torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.float64)
            start = 0
            for portion in portions:
                fresh_keys = torch.rand(portion, generator=generator, dtype=torch.float64)
                kept, fresh = reservoir(keys, fresh_keys, 3)
                members = torch.cat([members[kept], start + fresh])
                keys = torch.cat([keys[kept], fresh_keys[fresh]])
                start += portion
            counts[tuple(sorted(members.tolist()))] += 1
        expected = draws / 20
        assert sum((n - expected) ** 2 / expected for n in counts.values()) < 43.8


def test_columns_grow_with_the_classes():
    old, new = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 4.0, 5.0]], [[6.0, 7.0, 8.0]]])
    assert append_rows(old, new).tolist() == [[[1.0, 2.0, -torch.inf]], [[3.0, 4.0, 5.0]], [[6.0, 7.0, 8.0]]]
    assert append_rows(new, old).tolist() == [[[3.0, 4.0, 5.0]], [[6.0, 7.0, 8.0]], [[1.0, 2.0, -torch.inf]]]
    y = append_rows(torch.tensor([1]), torch.tensor([2, 3]))
    assert y.tolist() == [1, 2, 3] and y.dtype == torch.int64
    images = torch.zeros(2, 1, 3, 3, dtype=torch.uint8)
    assert append_rows(images, images[:1]).shape == (3, 1, 3, 3) and append_rows(images, images).dtype == torch.uint8
