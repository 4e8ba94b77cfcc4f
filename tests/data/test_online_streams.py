"""Online streams: small experiences in order, and classes that mix at the borders of experiences."""

from __future__ import annotations

import pytest
import torch
from numbered_samples import every, ids, toy

from clframe.data.avalanche import import_avalanche
from clframe.data.benchmark import class_incremental
from clframe.data.streams import (
    blurry_stream,
    linear_decay,
    mixture_weights,
    online_stream,
    rotated_stream,
)
from clframe.errors import ConfigError


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("size", [1, 4, 7, 1000])
def test_small_experiences_are_the_experience_in_order(size, lazy):
    whole = class_incremental(toy(5, lazy=lazy), experiences=2, seed=1, validation=0.2)
    benchmark = online_stream(whole, size=size, seed=4)
    assert benchmark.test is whole.test and benchmark.validation is whole.validation and len(benchmark) == 2
    at = 0
    for i, (before, after) in enumerate(zip(whole.train, benchmark.original, strict=True)):
        assert sorted(ids(after)) == sorted(ids(before))
        own = benchmark.sub_experiences(i)
        assert own.start == at and len(own) == -(-len(before) // size)
        parts = [benchmark.train[k] for k in own]
        assert [i for part in parts for i in ids(part)] == ids(after)
        assert torch.equal(torch.cat([part.y for part in parts]), after.y)
        assert all(len(part) == size for part in parts[:-1]) and 1 <= len(parts[-1]) <= size
        at = own.stop
    assert at == len(benchmark.train)
    same, other = online_stream(whole, size=size, seed=4), online_stream(whole, size=size, seed=5)
    assert [ids(part) for part in same.original] == [ids(part) for part in benchmark.original]
    assert [ids(part) for part in other.original] != [ids(part) for part in benchmark.original]


def test_small_experiences_cost_no_memory():
    cut = online_stream(class_incremental(toy(5), experiences=2), size=3)
    for benchmark in (cut, cut.to("meta"), cut.to("cpu")):
        for i, whole in enumerate(benchmark.original):
            for k in benchmark.sub_experiences(i):
                assert benchmark.train[k].x._base is whole.x and benchmark.train[k].y._base is whole.y
    assert len(cut.to("meta").train) == len(cut.train) and cut.to("meta").train[0].x.device.type == "meta"


def test_a_stream_that_is_not_online_has_one_part_for_each_experience():
    benchmark = class_incremental(toy(5), experiences=2)
    assert not benchmark.original
    assert [benchmark.sub_experiences(i) for i in range(2)] == [range(0, 1), range(1, 2)]


def test_impossible_online_streams():
    benchmark = class_incremental(toy(4), experiences=2)
    for make in (online_stream, blurry_stream):
        with pytest.raises(ConfigError, match="benchmark.online: found 0; give at least 1 sample"):
            make(benchmark, size=0)
        with pytest.raises(ConfigError, match="already online"):
            make(online_stream(benchmark, size=2), size=2)
    for blur in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="benchmark.blurry: found"):
            blurry_stream(benchmark, size=2, blur=blur)
    labeled = class_incremental(toy(4), experiences=2, task_labels=True)
    assert online_stream(labeled, size=2).task_labels
    for hide in (lambda: online_stream(labeled, size=2, boundaries=False), lambda: blurry_stream(labeled, size=2)):
        with pytest.raises(ConfigError, match="found task labels on an online stream"):
            hide()


def test_neighbors_mix_linearly_around_their_border():
    probability_TE = mixture_weights(3, steps=8, blur=0.5)  # borders at 8 and 16, each with 2 places before and after
    rising = [0.0, 0.25, 0.5, 0.75]
    first = [1.0] * 6 + [1 - r for r in rising] + [0.0] * 14
    second = [0.0] * 6 + rising + [1.0] * 4 + [1 - r for r in rising] + [0.0] * 6
    third = [0.0] * 14 + rising + [1.0] * 6
    assert probability_TE.T.tolist() == [first, second, third]
    for experiences, steps, blur in ((1, 1, 1.0), (2, 1, 1.0), (5, 7, 0.3), (4, 3, 0.01), (10, 600, 0.5)):
        probability_TE = mixture_weights(experiences, steps=steps, blur=blur)
        assert probability_TE.shape == (experiences * steps, experiences)
        assert torch.allclose(probability_TE.sum(1), torch.ones(experiences * steps), atol=1e-6)
        assert bool((probability_TE >= 0).all())


def test_blurry_streams_draw_what_avalanche_draws():
    import_avalanche()
    from avalanche.benchmarks import split_continuous_linear_decay_stream

    whole = class_incremental(toy(6), experiences=3, seed=1)
    sizes = [len(part) for part in whole.train]
    for size, steps, blur, seed in ((4, 5, 0.5, 3), (1, 9, 1.0, 4), (10, 8, 0.25, 5)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            theirs = list(
                split_continuous_linear_decay_stream(
                    whole.avalanche.streams["train"], size, steps, beta=2 / blur, shuffle=True
                )
            )
        generator = torch.Generator().manual_seed(seed)
        ours = linear_decay(sizes, size=size, steps=steps, blur=blur, generator=generator)
        assert len(ours) == len(theirs) == 3 * steps
        for (experience_N, sample_N), drawn in zip(ours, theirs, strict=True):
            assert torch.bincount(experience_N, minlength=3).tolist() == drawn.n_samples_from_each_exp
            expected = [whole.train[e].prepare(whole.train[e].raw(torch.tensor([i])))[0]
                        for e, i in zip(experience_N.tolist(), sample_N.tolist(), strict=True)]  # fmt: skip
            assert torch.equal(torch.stack(expected), torch.stack([drawn.dataset[k][0] for k in range(size)]))


@pytest.mark.parametrize("kind", ["classes", "domains"])
def test_blurry_streams_begin_and_end_pure_and_mix_between(kind):
    source = toy(6)
    whole = class_incremental(source, experiences=3) if kind == "classes" else rotated_stream(source, experiences=3)
    benchmark = blurry_stream(whole, size=2, blur=0.5, seed=1)
    steps = -(-sum(len(part) for part in whole.train) // 6)
    assert benchmark.test is whole.test and not benchmark.online.boundaries
    assert [len(part) for part in benchmark.original] == [2 * steps] * 3 and len(benchmark.train) == 3 * steps
    known = {tuple(x.flatten().tolist()): e for e, part in enumerate(whole.train) for x in every(part)}
    came = [[known[tuple(x.flatten().tolist())] for x in every(part)] for part in benchmark.train]
    assert all(set(part) == {0} for part in came[: steps * 3 // 4])
    assert all(set(part) == {2} for part in came[-(steps * 3 // 4) + 1 :])
    assert {0, 1} <= {e for part in came[steps * 3 // 4 : steps * 5 // 4 + 1] for e in part}
    assert blurry_stream(whole, size=2, seed=1).original[1].y.tolist() == benchmark.original[1].y.tolist()
    assert blurry_stream(whole, size=2, seed=2).original[1].y.tolist() != benchmark.original[1].y.tolist()
