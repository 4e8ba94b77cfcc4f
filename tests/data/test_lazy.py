"""Datasets read batch by batch: the samples, order and bits of data in memory, with and without workers."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from clframe.core import Batch, Experience, StepContext
from clframe.data import EpochLoader, TensorSamples, concatenate
from clframe.data.augmentation import ColorJitter, Flip, PadCrop
from clframe.data.lazy import DatasetSamples
from clframe.data.reader import Reader, temporary_seed
from clframe.errors import ConfigError, DataError
from clframe.nn import BACKBONES, Network
from clframe.seeding import epoch_order, generator_for
from strategies import ER

# Workers are forked, as torch forks them everywhere; Python 3.12 warns of it where torch has threads.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # on a machine of one core
]

MEAN, STD = (100.0, 120.0, 140.0), (50.0, 60.0, 70.0)
AUGMENT = (PadCrop(2), Flip(), ColorJitter(brightness=0.5))


def pictures(count=13, channels=3):
    return torch.randint(256, (count, channels, 6, 6), generator=generator_for(7), dtype=torch.uint8)


class Pairs(Dataset):
    """Images and labels like those of torch datasets; ``form`` converts an image to its type."""

    def __init__(self, x, form="tensor"):
        self.x, self.form = x, form

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        image = self.x[index]
        if self.form == "pil":
            image = Image.fromarray(image.permute(1, 2, 0).numpy().squeeze())
        return image if self.form == "bare" else (image, index % 3)


class Noisy(Pairs):
    """A transform of the user's own, drawing from all three global generators."""

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + float(torch.rand(()))
        return self.x[index].float() + noise, 0


class ProcessOf(Pairs):
    """Which process has read a sample."""

    def __getitem__(self, index):
        return torch.full((1, 1, 1), float(os.getpid()), dtype=torch.float64), 0


class Broken(Pairs):
    def __getitem__(self, index):
        if index == 5:
            raise self.form
        return self.x[index], 0


def lazy(dataset=None, *, workers=0, augment=AUGMENT, mean=MEAN, std=STD):
    dataset = Pairs(pictures()) if dataset is None else dataset
    y = torch.arange(len(dataset)) % 3
    return DatasetSamples.of(dataset, y, mean=mean, std=std, augment=augment, num_workers=workers)


def in_memory(augment=AUGMENT):
    x = pictures()
    return TensorSamples(x, torch.arange(len(x)) % 3, mean=MEAN, std=STD, augment=augment)


def epochs(samples, *, size=4, shuffle=True, count=2, experience=1):
    loader = EpochLoader(samples, size, shuffle=shuffle, seed=5, experience=experience)
    served = []
    for loader.epoch in range(count):
        served += list(loader)
        assert len(served) == (loader.epoch + 1) * len(loader)
    return served


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        assert a[0].dtype == b[0].dtype == torch.float32


@pytest.mark.parametrize("form", ["tensor", "bare", "pil"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_data_in_memory_bit_for_bit(form, workers):
    samples = lazy(Pairs(pictures(), form), workers=workers)
    assert_same(epochs(samples), epochs(in_memory()))
    assert_same(epochs(samples, shuffle=False), epochs(in_memory(), shuffle=False))
    assert_same(epochs(samples, size=1), epochs(in_memory(), size=1))
    assert_same(epochs(samples, size=100), epochs(in_memory(), size=100))


@pytest.mark.parametrize("workers", [0, 2])
def test_subsets_are_those_of_data_in_memory(workers):
    whole, stored = lazy(workers=workers), in_memory()
    for experience, index in enumerate((torch.tensor([3, 0, 12, 7, 7]), torch.tensor([5]))):
        a, b = whole.subset(index), stored.subset(index)
        assert len(a) == len(b) and torch.equal(a.y, b.y) and a.input_shape == b.input_shape == (3, 6, 6)
        assert torch.equal(a.raw(torch.arange(len(a)).flip(0)), b.raw(torch.arange(len(b)).flip(0)))
        assert_same(epochs(a, size=2, experience=experience), epochs(b, size=2, experience=experience))


def test_samples_of_samples_in_any_order():
    first, second = lazy().subset(torch.tensor([1, 4, 6])), None
    second = replace_reader(first, lazy().subset(torch.tensor([0, 12])))
    joined = concatenate([first, second])
    assert torch.equal(joined.raw(torch.tensor([4, 0])), pictures()[[12, 1]])
    assert joined.y.tolist() == [1, 1, 0, 0, 0] and len(joined) == 5


def replace_reader(of, samples):
    return DatasetSamples(of.reader, samples.index, samples.y, samples.mean, samples.std, samples.augment)


def test_parts_of_different_datasets_do_not_join():
    with pytest.raises(DataError, match="samples of different datasets"):
        concatenate([lazy(), lazy()])


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_joins_the_data_as_in_memory(workers):
    raw, y = 255 - pictures(5), torch.tensor([9, 8, 7, 6, 5])
    more = torch.tensor([4])
    grown = lazy(workers=workers).with_stored(raw, y).with_stored(raw[:1] // 2, more)
    stored = in_memory().with_stored(raw, y).with_stored(raw[:1] // 2, more)
    assert torch.equal(grown.y, stored.y) and grown.y[-6:].tolist() == [9, 8, 7, 6, 5, 4]
    assert_same(epochs(grown), epochs(stored))
    assert_same(epochs(grown, size=1, shuffle=False), epochs(stored, size=1, shuffle=False))
    index = torch.tensor([18, 13, 2, 17])
    assert torch.equal(grown.subset(index).raw(torch.tensor([0, 3])), stored.subset(index).raw(torch.tensor([0, 3])))
    assert grown.nbytes == lazy().nbytes + 6 * (8 + 8) + raw.nbytes + raw[:1].nbytes


def test_a_view_is_seen_by_everything_but_a_memory():
    def inverted(raw):
        return 255 - raw

    kept, y = pictures(2), torch.tensor([0, 1])
    a = DatasetSamples(Reader(Pairs(pictures()), num_workers=0), torch.arange(13), torch.arange(13) % 3, MEAN, STD,
                       AUGMENT, view=inverted).with_stored(kept, y)  # fmt: skip
    plain = in_memory()
    b = TensorSamples(plain.x, plain.y, MEAN, STD, AUGMENT, view=inverted).with_stored(kept, y)
    assert torch.equal(a.raw(torch.tensor([0, 13])), torch.stack([255 - plain.x[0], kept[0]]))
    assert_same(epochs(a), epochs(b))
    assert_same(epochs(a, shuffle=False, size=1), epochs(b, shuffle=False, size=1))


@pytest.mark.parametrize("workers", [0, 2])
def test_random_transforms_are_a_function_of_seed_experience_and_epoch(workers):
    def run(workers, **place):
        samples = lazy(Noisy(pictures()), workers=workers, augment=(), mean=(0.0,), std=(1.0,))
        return torch.cat([x for x, _ in epochs(samples, **place)])

    here = run(0)
    torch.manual_seed(99)
    random.seed(99)
    assert torch.equal(run(workers), here)
    assert not torch.equal(run(workers, experience=2), here)
    order = [epoch_order(13, seed=5, experience=1, epoch=epoch) for epoch in (0, 1)]
    noise = [x - pictures()[i].float() for x, i in zip(here.split(13), order, strict=True)]
    drawn = torch.cat(noise)[:, 0, 0, 0]
    assert len(drawn.unique()) == 26  # every sample of every batch of every epoch its own


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_the_global_generators_alone(workers):
    samples = lazy(Noisy(pictures()), workers=workers)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    epochs(samples)
    samples.raw(torch.tensor([0]))
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert np.array_equal(np.random.get_state()[1], states[1])


def test_what_is_seeded_is_put_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), temporary_seed(3):
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def processes(samples, **options):
    # Pids are whole numbers well below 2**24, so float32 keeps them.
    return {int(p) for x, _ in epochs(samples, **options) for p in x.flatten()}


def test_workers_outlive_epochs_and_experiences():
    samples = lazy(ProcessOf(pictures()), workers=2, augment=(), mean=(0.0,), std=(1.0,))
    first = processes(samples.subset(torch.arange(8)), size=1)
    next(iter(EpochLoader(samples, 1)))  # stopped after the first batch
    gc.collect()
    second = processes(samples.subset(torch.arange(8, 13)), size=1, experience=2)
    assert first == second and len(first) == 2 and os.getpid() not in first
    assert processes(lazy(ProcessOf(pictures()), augment=(), mean=(0.0,), std=(1.0,))) == {os.getpid()}


def test_an_epoch_left_early_does_not_disturb_the_next():
    samples = lazy(workers=2)
    for _ in range(2):
        for batch in EpochLoader(samples, 1, shuffle=True, seed=5, experience=1):
            assert len(batch) == 2
            break
        gc.collect()
    assert_same(epochs(samples), epochs(in_memory()))


@pytest.mark.parametrize("workers", [0, 2])
def test_two_epochs_may_be_read_at_once(workers):
    """As an evaluation on training data in the middle of a training epoch does."""
    samples, stored = lazy(workers=workers), in_memory()
    inner, expected = [], epochs(stored, count=1, size=3)
    outer = []
    for batch in EpochLoader(samples, 3, shuffle=True, seed=5, experience=1):
        outer.append(batch)
        inner += epochs(samples, shuffle=False, count=1)
    assert_same(outer, expected)
    assert_same(inner, epochs(stored, shuffle=False, count=1) * len(expected))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "error, message",
    [
        (OSError("image file\nis truncated"), r"data: sample 5 cannot be read \(OSError: image file is truncated\)"),
        (DataError("/data/cat.png: is empty; replace it"), r"^/data/cat.png: is empty; replace it$"),
    ],
)
def test_a_sample_that_cannot_be_read_is_one_line(workers, error, message):
    samples = lazy(Broken(pictures(), error), workers=workers)
    with pytest.raises(DataError, match=message) as caught:
        epochs(samples)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_gray_among_colored_images_is_one_line(workers):
    class Mixed(Pairs):
        def __getitem__(self, index):
            return self.x[index][: 1 if index == 9 else 3], 0

    samples = lazy(Mixed(pictures()), workers=workers)
    with pytest.raises(DataError, match=r"data: sample 9 has shape \(1, 6, 6\), sample 0 has \(3, 6, 6\)"):
        epochs(samples)


def test_gray_pictures_keep_one_channel():
    samples = lazy(Pairs(pictures(channels=1), "pil"), augment=(), mean=(0.0,), std=(1.0,))
    assert samples.input_shape == (1, 6, 6)
    assert torch.equal(samples.raw(torch.arange(13)), pictures(channels=1))


def test_bad_arguments():
    with pytest.raises(DataError, match="13 inputs and 2 labels"):
        DatasetSamples.of(Pairs(pictures()), torch.zeros(2).long())
    with pytest.raises(ConfigError, match="data.num_workers: found -1"):
        lazy(workers=-1)


def test_a_reader_travels_without_its_workers():
    samples = lazy(workers=2)
    expected = epochs(samples)
    for other in (pickle.loads(pickle.dumps(samples)), copy.deepcopy(samples)):
        assert other.reader is not samples.reader
        assert_same(epochs(other), expected)
    samples.reader.close()
    assert_same(epochs(samples), expected)


def test_a_memory_of_read_samples_is_that_of_samples_in_memory():
    network = Network(BACKBONES.get("mlp")((3, 6, 6), width=5))
    states, joined = [], []
    for samples in (lazy(), in_memory()):
        er = ER(memory=6, selection="herding")
        context = StepContext(Experience(0, 2, (0, 1, 2), (), (), samples), 0, 1, generator_for(0))
        torch.manual_seed(0)
        states.append(er.after_experience(network, context, er.init_state(network)))
        joined.append(er.make_batch(Batch(torch.zeros(2, 3, 6, 6), torch.zeros(2).long()), context, states[-1], network))
    assert all(torch.equal(states[0][name], states[1][name]) for name in ("x", "y", "group"))
    assert torch.equal(joined[0].x, joined[1].x) and len(joined[0].y) == 4


def test_sizes_in_memory():
    samples = lazy()
    assert samples.nbytes == 13 * (8 + 8)
    assert in_memory().nbytes == 13 * (3 * 36 + 8)
    assert samples.to("cpu").subset(torch.tensor([0])).nbytes == 16
