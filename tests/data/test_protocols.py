"""Splits into experiences: no sample is lost or repeated, and Avalanche's streams have the same samples."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import InterpolationMode, rotate

from clframe.data.avalanche import describe, import_avalanche
from clframe.data.benchmark import class_incremental
from clframe.data.lazy import DatasetSamples
from clframe.data.protocol import ICARL_ORDER, class_order, classes_per_experience, hold_out
from clframe.data.samples import TensorSamples, concatenate
from clframe.data.source import Source
from clframe.data.streams import (
    PixelOrder,
    Rotation,
    blurry_stream,
    domain_incremental,
    linear_decay,
    mixture_weights,
    online_stream,
    permuted_stream,
    rotated_stream,
    rotations,
)
from clframe.errors import ConfigError, DataError

SHAPE = (1, 3, 3)


def samples(y, *, first_id, lazy=False):
    """One sample for each label: 3 x 3 pixels that no other sample and no other pixel has, in shuffled order."""
    pixels = 9
    x = (first_id + torch.arange(len(y)).unsqueeze(1)) * pixels + torch.arange(pixels)
    x, y = x.reshape(-1, *SHAPE).int(), torch.as_tensor(y)
    if lazy:
        return DatasetSamples.of(list(x), y, mean=(4.0,), std=(2.0,), num_workers=0)
    return TensorSamples(x, y, mean=(4.0,), std=(2.0,))


def toy(classes, *, lazy=False):
    """Class c has 3 + c training samples and two for testing."""
    train = [c for c in range(classes) for _ in range(3 + c)]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(5))
    y = torch.tensor(train)[order]
    return Source(
        "toy",
        samples(y, first_id=0, lazy=lazy),
        samples(list(range(classes)) * 2, first_id=1000, lazy=lazy),
        classes,
    )


def every(part):
    """All stored inputs, as the part sees them."""
    return part.raw(torch.arange(len(part)))


def ids(part):
    """Which sample each is, wherever its pixels have gone."""
    return (every(part).flatten(1).min(dim=1).values // 9).tolist()


def label_of(source):
    """The data set's own label of every sample."""
    return {i: int(c) for part in (source.train, source.test) for i, c in zip(ids(part), part.y, strict=True)}


# --- classes per experience ----------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 7, 10, 12])
def test_deals_are_even_and_complete(classes):
    for experiences in range(1, classes + 1):
        dealt = classes_per_experience(classes, experiences)
        assert len(dealt) == experiences and sum(dealt) == classes
        assert max(dealt) - min(dealt) <= 1 and list(dealt) == sorted(dealt, reverse=True)
        for first in range(1, classes - experiences + 2):
            if experiences == 1 and first < classes:
                continue
            larger = classes_per_experience(classes, experiences, first=first)
            assert larger[0] == first and len(larger) == experiences and sum(larger) == classes
            assert larger[1:] == (classes_per_experience(classes - first, experiences - 1) if experiences > 1 else ())


def test_the_usual_splits():
    assert classes_per_experience(10, 5) == (2,) * 5 and classes_per_experience(100, 10) == (10,) * 10 and classes_per_experience(10, 3) == (4, 3, 3)
    assert classes_per_experience(100, 11, first=50) == (50, *(5,) * 10) and classes_per_experience(100, 6, first=50) == (50, *(10,) * 5)
    assert classes_per_experience(10, 4, first=2) == (2, 3, 3, 2)
    assert classes_per_experience(10, 5, counts=(1, 7, 2)) == (1, 7, 2)
    assert classes_per_experience(4, 1, first=4) == classes_per_experience(4, 9, counts=[4]) == (4,)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"experiences": 0}, "benchmark.experiences: found 0; give at least 1"),
        ({"experiences": 11}, "benchmark.experiences: found 11 for 10 classes; give at most 10"),
        ({"experiences": 5, "first": 0}, "benchmark.first: found 0 for 10 classes in 5 experiences; give 1 to 6"),
        ({"experiences": 5, "first": 7}, "benchmark.first: found 7 .* give 1 to 6"),
        ({"experiences": 1, "first": 7}, "benchmark.first: found 7 .* give 10$"),
        ({"experiences": 10, "first": 2}, "benchmark.first: found 2 .* give 1$"),
        ({"experiences": 3, "counts": (4, 4)}, "benchmark.counts: found 2 counts with sum 8 for 10 classes"),
        ({"experiences": 3, "counts": (10, 0)}, "benchmark.counts: found 0; give every experience at least 1"),
        ({"experiences": 3, "counts": (11, -1)}, "benchmark.counts: found -1; give every experience at least 1"),
        ({"experiences": 2, "counts": (5, 5), "first": 5}, "benchmark.first: found 5 together with benchmark.counts"),
    ],
)
def test_deals_that_do_not_add_up(options, message):
    with pytest.raises(ConfigError, match=message):
        classes_per_experience(10, **options)


def test_the_order_of_icarl_is_numpys_permutation_of_seed_1993():
    assert tuple(np.random.RandomState(1993).permutation(100).tolist()) == ICARL_ORDER
    assert class_order(100, order="icarl", seed=7) == ICARL_ORDER
    assert ICARL_ORDER[:5] == (68, 56, 78, 8, 23) and ICARL_ORDER[-3:] == (49, 57, 33)
    with pytest.raises(ConfigError, match="found 'icarl', which orders 100 classes, for 10 classes; use 'seeded'"):
        class_order(10, order="icarl", seed=0)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"experiences": 1},
        {"experiences": 3},
        {"experiences": 7, "order": "sorted"},
        {"experiences": 3, "first": 4},
        {"experiences": 2, "counts": (1, 4, 2), "order": (6, 5, 4, 3, 2, 1, 0)},
        {"experiences": 3, "validation": 0.3},
        {"experiences": 4, "validation": 0.3, "first": 1, "task_labels": True},
    ],
)
def test_every_sample_has_one_place_and_its_own_label(options, lazy):
    source = toy(7, lazy=lazy)
    benchmark = class_incremental(source, seed=3, **options)
    dealt = classes_per_experience(7, options["experiences"], first=options.get("first"), counts=options.get("counts", ()))
    assert tuple(map(len, benchmark.classes)) == dealt and len(benchmark) == len(dealt)
    assert [c for classes in benchmark.classes for c in classes] == list(range(7))
    original = label_of(source)
    for whole, parts in (
        (source.train, [*benchmark.train, *benchmark.validation]),
        (source.test, benchmark.test),
    ):
        found = [i for part in parts for i in ids(part)]
        assert sorted(found) == sorted(ids(whole)) and len(set(found)) == len(found)
        labels = [benchmark.class_order[int(c)] for part in parts for c in part.y]
        assert labels == [original[i] for i in found]
    for part, classes in zip(benchmark.train, benchmark.classes, strict=True):
        assert set(part.y.tolist()) == set(classes)
    again = class_incremental(source, seed=3, **options)
    assert again.class_order == benchmark.class_order
    assert [ids(part) for part in again.train] == [ids(part) for part in benchmark.train]


def test_uneven_parts_are_said(caplog):
    with caplog.at_level(logging.INFO, logger="clframe"):
        class_incremental(toy(10), experiences=3)
        assert caplog.messages == ["toy: 10 classes in 3 experiences = 4 + 3 + 3"]
        caplog.clear()
        class_incremental(toy(10), experiences=3, first=4)  # asked for, and the rest is even
        class_incremental(toy(10), experiences=3, counts=(1, 2, 7))
        assert not caplog.messages


# --- validation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share, counts", [(0.0, (0, 0, 0, 0)), (0.01, (1, 1, 1, 1)), (0.25, (1, 1, 1, 2)),
                                           (0.5, (2, 2, 3, 3)), (0.99, (2, 3, 4, 5))])  # fmt: skip
def test_each_class_gives_its_share(share, counts):
    y = torch.tensor([c for c in range(4) for _ in range(3 + c)])[torch.randperm(18)]
    train, held = hold_out(y, share, seed=0)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(18))
    assert tuple(torch.bincount(y[held], minlength=4).tolist()) == counts
    assert train.tolist() == sorted(train.tolist()) and held.tolist() == sorted(held.tolist())


def test_validation_data_depends_on_the_seed_alone():
    source = toy(6)

    def held(**options):
        return {i for part in class_incremental(source, validation=0.4, **options).validation for i in ids(part)}

    first = held(experiences=3, seed=1)
    assert first == held(experiences=2, order="sorted", seed=1) == held(experiences=6, seed=1)
    assert first != held(experiences=3, seed=2)
    assert first <= set(ids(source.train)) and not first & set(ids(source.test))


def test_impossible_validation():
    lonely = torch.tensor([0, 0, 3])
    assert [len(part) for part in hold_out(lonely, 0.0, seed=0)] == [3, 0]
    with pytest.raises(DataError, match="benchmark.validation: found 1 training sample of class 3"):
        hold_out(lonely, 0.1, seed=0)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="benchmark.validation: found"):
            hold_out(lonely, share, seed=0)


def test_evaluating_on_validation_data():
    benchmark = class_incremental(toy(4), experiences=2, validation=0.3)
    assert benchmark.evaluation is benchmark.test
    assert benchmark.evaluation_stream is benchmark.avalanche.streams["test"]
    chosen = replace(benchmark, evaluate="validation")
    assert chosen.evaluation is benchmark.validation
    assert chosen.evaluation_stream is chosen.avalanche.streams["valid"]
    with pytest.raises(ConfigError, match="benchmark.evaluate: found 'validation' without validation data"):
        replace(class_incremental(toy(4), experiences=2), evaluate="validation")


# --- domains --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [False, True])
def test_permuted_pixels(lazy):
    source = toy(3, lazy=lazy)
    benchmark = permuted_stream(source, experiences=4, seed=2, validation=0.3)
    assert benchmark.classes == ((0, 1, 2),) * 4 and benchmark.class_order == (0, 1, 2)
    assert benchmark.domains == ("as stored", *("permuted pixels",) * 3)
    orders = [None, *(part.view.order_P for part in benchmark.train[1:])]
    assert len({tuple(order.tolist()) for order in orders[1:]}) == 3
    train, held = source.hold_out(0.3, seed=2)
    for i, order in enumerate(orders):
        for plain, parts in ((train, benchmark.train), (held, benchmark.validation), (source.test, benchmark.test)):
            expected = every(plain) if i == 0 else every(plain).flatten(1)[:, order].reshape(-1, *SHAPE)
            assert torch.equal(every(parts[i]), expected)
            assert torch.equal(parts[i].y, plain.y)
            for (x, y), at in zip(parts[i].batches(None, 4), torch.arange(len(plain)).split(4), strict=True):
                assert torch.equal(x, (expected[at] - 4.0) / 2.0) and torch.equal(y, plain.y[at])
        if i:
            assert sorted(order.tolist()) == list(range(9))
            assert torch.equal(every(benchmark.test[i]).flatten(1)[:, order.argsort()], every(source.test).flatten(1))
    other = permuted_stream(source, experiences=4, seed=3)
    assert not torch.equal(other.train[1].view.order_P, orders[1])
    longer = permuted_stream(source, experiences=9, seed=2)
    assert torch.equal(longer.train[3].view.order_P, orders[3])


def test_pixels_of_all_channels_move_alike_and_features_move_too():
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    x = torch.arange(2 * 3 * 6, dtype=torch.uint8).reshape(2, 3, 2, 3)
    moved = PixelOrder(order)(x)
    for n, c, p in itertools.product(range(2), range(3), range(6)):
        assert moved[n, c, p // 3, p % 3] == x[n, c, order[p] // 3, order[p] % 3]
    features = torch.rand(1, 6)
    assert torch.equal(PixelOrder(order)(features), features[:, order])
    flat = Source("f", *[TensorSamples(torch.rand(4, 6), torch.zeros(4).long())] * 2, classes=1)
    assert sorted(permuted_stream(flat, experiences=2).train[1].view.order_P.tolist()) == list(range(6))


def test_domains_share_one_copy_wherever_they_are():
    source = toy(3)
    for benchmark in (permuted_stream(source, experiences=3), rotated_stream(source, experiences=3)):
        assert all(part.x is source.train.x for part in benchmark.train)
        moved = benchmark.to("meta")
        for before, after in ((benchmark.train, moved.train), (benchmark.test, moved.test)):
            assert len({id(part.x) for part in after}) == 1 and after[0].x.device.type == "meta"
            assert [part.view for part in after] == [part.view for part in before]
    parts = class_incremental(source, experiences=3).to("meta").train
    assert len({id(part.x) for part in parts}) == 3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32, torch.float64])
def test_quarter_turns_are_exact(dtype):
    x = torch.randint(0, 256, (3, 2, 5, 5)).to(dtype)
    assert torch.equal(Rotation(0.0)(x), x) and torch.equal(Rotation(360.0)(x), x)
    assert torch.equal(Rotation(90.0)(x)[:, :, 0], x[..., 4])  # the right column becomes the top row
    turned = x
    for quarter in range(1, 5):
        turned = Rotation(90.0)(turned)
        assert turned.dtype == dtype and turned.is_contiguous()
        assert torch.equal(turned, Rotation(90.0 * quarter)(x))
        assert torch.equal(turned, Rotation(90.0 * quarter - 360)(x))
    assert torch.equal(turned, x)


def test_half_a_turn_of_an_oblong_picture_is_exact_and_a_quarter_keeps_its_size():
    x = torch.randint(0, 256, (2, 1, 4, 7), dtype=torch.uint8)
    assert torch.equal(Rotation(180.0)(x), x.flip(-1, -2))
    quarter = Rotation(90.0)(x)
    assert quarter.shape == x.shape
    # A quarter turn takes the middle 4 x 4 pixels onto half-pixel places: bilinear means of four.
    assert not torch.equal(quarter, x) and int(quarter[..., 0].sum()) == 0


@pytest.mark.parametrize("degrees", [1.0, 33.0, 45.0, -20.0, 135.5, 400.0])
@pytest.mark.parametrize("shape", [(1, 1, 28, 28), (5, 3, 12, 7)])
def test_other_angles_are_torchvisions(degrees, shape):
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    ours, theirs = Rotation(degrees)(x), rotate(x, degrees, InterpolationMode.BILINEAR)
    assert ours.dtype == torch.uint8 and int((ours.int() - theirs.int()).abs().max()) <= 1
    assert float((ours != theirs).float().mean()) < 0.01  # ties that round the other way
    one_by_one = torch.cat([Rotation(degrees)(one) for one in x.split(1)])
    assert torch.equal(ours, one_by_one)
    floats = Rotation(degrees)(x.double())
    assert floats.dtype == torch.float64 and float((floats - ours).abs().max()) <= 0.51


def test_angles():
    assert [r and r.degrees for r in rotations(5)] == [None, 45.0, 90.0, 135.0, 180.0]
    assert rotations(1) == (None,)
    benchmark = rotated_stream(toy(3), experiences=9, angles=(10.0, 360.0, -90.0))
    assert benchmark.domains == ("rotated by 10 degrees", "as stored", "rotated by -90 degrees")
    assert torch.equal(every(benchmark.test[2]), every(benchmark.test[1]).rot90(-1, (-2, -1)))
    with pytest.raises(ConfigError, match=r"benchmark.angles: found \[nan\]"):
        rotated_stream(toy(3), experiences=1, angles=(float("nan"),))
    flat = Source("flat", *[TensorSamples(torch.rand(4, 6), torch.zeros(4).long())] * 2, classes=1)
    with pytest.raises(DataError, match=r"flat: found inputs of shape \[6\], which cannot be rotated"):
        rotated_stream(flat, experiences=2)
    for make in (permuted_stream, rotated_stream):
        with pytest.raises(ConfigError, match="benchmark.experiences: found 0"):
            make(toy(3), experiences=0)


def test_all_domains_at_once():
    benchmark = rotated_stream(toy(3), experiences=3)
    joint = concatenate(benchmark.train)
    assert torch.equal(every(joint), torch.cat([every(part) for part in benchmark.train]))
    assert torch.equal(joint.y, benchmark.train[0].y.repeat(3)) and joint.view is None


def test_domains_of_ones_own():
    class Negative:
        def __call__(self, raw):
            return -raw

        def __str__(self):
            return "negative"

    benchmark = domain_incremental(toy(2), [Negative(), None], task_labels=True)
    assert benchmark.domains == ("negative", "as stored")
    assert torch.equal(every(benchmark.train[0]), -every(benchmark.train[1]))
    assert [e.task_label for e in benchmark.avalanche.streams["test"]] == [0, 1]


# --- online streams -------------------------------------------------------------------------------


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


# --- the bridge to Avalanche ----------------------------------------------------------------------


def streams_of_all_kinds():
    source = toy(5)
    classes = class_incremental(source, experiences=3, seed=1, validation=0.3)
    tasks = class_incremental(source, experiences=3, seed=1, validation=0.3, task_labels=True)
    return {
        "classes": classes,
        "tasks": tasks,
        "first": class_incremental(source, experiences=2, first=4),
        "permuted": permuted_stream(source, experiences=3, validation=0.3),
        "rotated": rotated_stream(source, experiences=2, angles=(0.0, 30.0)),
        "online": online_stream(classes, size=4),
        "online tasks": online_stream(tasks, size=4),
        "online domains": online_stream(permuted_stream(source, experiences=2), size=5),
        "hidden": online_stream(classes, size=4, boundaries=False),
        "blurry": blurry_stream(classes, size=4),
        "lazy": class_incremental(toy(5, lazy=True), experiences=3),
    }


KINDS = tuple(streams_of_all_kinds())


@pytest.mark.parametrize("kind", KINDS)
def test_avalanche_sees_the_same_samples(kind):
    benchmark = streams_of_all_kinds()[kind]
    streams = benchmark.avalanche.streams
    expected = {"train": benchmark.train, "test": benchmark.test}
    expected |= {"valid": benchmark.validation} if benchmark.validation else {}
    expected |= {"original_train": benchmark.original} if benchmark.online else {}
    assert set(streams) == set(expected)
    for name, parts in expected.items():
        assert len(streams[name]) == len(parts)
        for i, (experience, part) in enumerate(zip(streams[name], parts, strict=True)):
            assert experience.current_experience == i and experience.origin_stream.name == name
            assert list(experience.dataset.targets) == part.y.tolist()
            for k in range(len(part)):
                x, y, task = experience.dataset[k]
                assert torch.equal(x, part.prepare(part.raw(torch.tensor([k])))[0]) and y == int(part.y[k])
                if not benchmark.task_labels:
                    assert task == 0
                elif name != "train" or not benchmark.online:
                    assert task == i


@pytest.mark.parametrize("kind", KINDS)
def test_every_experience_knows_its_classes_the_past_and_what_is_ahead(kind):
    benchmark = streams_of_all_kinds()[kind]
    train, past = benchmark.avalanche.streams["train"], ()
    parts = [set(part.y.tolist()) for part in benchmark.train]
    for i, experience in enumerate(train):
        seen = describe(experience, count=len(train), past=past, samples=None)
        assert set(seen.classes) == parts[i] == experience.classes_in_this_experience
        assert set(seen.past) == set().union(*parts[:i]) == experience.previous_classes
        assert set(seen.classes_so_far) == set().union(*parts[: i + 1]) == experience.classes_seen_so_far
        assert set(seen.ahead) == set(range(5)) - set(seen.classes_so_far) == experience.future_classes
        assert seen.index == i and seen.count == len(train)
        assert torch.equal(seen.samples.y, benchmark.train[i].y)
        past = tuple(sorted({*past, *seen.classes}))
    assert past == tuple(range(5))


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("boundaries", [False, True])
def test_small_experiences_are_those_of_avalanches_splitter(boundaries, size):
    import_avalanche()
    from avalanche.benchmarks import OnlineCLExperience, split_online_stream

    benchmark = online_stream(class_incremental(toy(5), experiences=2), size=size, boundaries=boundaries)
    whole = replace(benchmark, train=benchmark.original, online=None)
    theirs = list(split_online_stream(whole.avalanche.streams["train"], size, shuffle=False))
    ours = benchmark.avalanche.streams["train"]
    assert len(ours) == len(theirs)
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert isinstance(mine, OnlineCLExperience) and mine.access_task_boundaries == boundaries
        assert mine.subexp_size == other.subexp_size and mine.sub_stream_length == other.sub_stream_length
        assert mine.is_first_subexp == other.is_first_subexp
        index = mine.origin_experience.current_experience
        assert mine.is_last_subexp == (i == benchmark.sub_experiences(index)[-1])
        assert list(mine.dataset.targets) == list(other.dataset.targets)
        assert all(torch.equal(mine.dataset[k][0], other.dataset[k][0]) for k in range(len(mine.dataset)))


@pytest.mark.parametrize("size", [None, 4])
def test_models_with_a_head_for_each_task_are_told_the_task(size):
    import_avalanche()
    from avalanche.models import MultiTaskModule
    from avalanche.training import Naive

    class Heads(MultiTaskModule):
        """Remembers which tasks it was asked for."""

        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(9, 5)
            self.asked = []

        def forward(self, x, task_labels):
            self.asked.append(set(task_labels.tolist()))
            return self.linear(x.flatten(1))

    benchmark = class_incremental(toy(5), experiences=3, task_labels=True)
    benchmark = benchmark if size is None else online_stream(benchmark, size=size)
    streams, model = benchmark.avalanche.streams, Heads()
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-9),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=100,
        eval_mb_size=100,
        evaluator=_quiet_evaluator(),
    )
    for i in range(3):
        own = [streams["train"][k] for k in benchmark.sub_experiences(i)]
        assert {(e.task_label, tuple(e.task_labels)) for e in own} == {(i, (i,))}
        model.asked.clear()
        strategy.train(own, eval_streams=[])
        assert model.asked == [{i}] * len(own)
    model.asked.clear()
    strategy.eval(streams["test"])
    assert model.asked == [{0}, {1}, {2}]
    plain = class_incremental(toy(5), experiences=3).avalanche.streams["train"][0]
    assert not hasattr(plain, "task_label") and not hasattr(plain, "task_labels")


def _quiet_evaluator():
    import warnings

    from avalanche.training.plugins import EvaluationPlugin

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No loggers specified")
        return EvaluationPlugin()
