"""Memory that joins the data when the loader is made, and loaders that leave room for it."""

from __future__ import annotations

import functools

import pytest
import torch

import clframe
from clframe.data.avalanche import import_avalanche
from clframe.data.benchmark import class_incremental
from clframe.data.lazy import DatasetSamples
from clframe.data.samples import TensorSamples
from clframe.data.source import Source
from clframe.errors import ComposeError, ConfigError, UnsupportedError
from clframe.nn import Network
from clframe.nn.backbones import mlp
from clframe.seeding import epoch_order
from strategies import ER

import_avalanche()

from avalanche.core import SupervisedPlugin

from clframe.core import Component, compose
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy

BATCH, EPOCHS, PER_CLASS, MEMORY = 5, 2, 9, 7


@functools.cache
def source(*, lazy: bool = False) -> Source:
    y = torch.arange(6).repeat_interleave(PER_CLASS)
    x = torch.randint(256, (len(y), 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    if lazy:
        samples = DatasetSamples.of(x, y, mean=(99.0,), std=(50.0,), num_workers=0)
        return Source("toy", samples, samples.subset(torch.arange(0, len(y), 3)), classes=6)
    scale = {"mean": (99.0,), "std": (50.0,)}
    return Source("toy", TensorSamples(x, y, **scale), TensorSamples(x[::3], y[::3], **scale), classes=6)


def strategy_on(benchmark, expression, *, batch=BATCH, **options):
    torch.manual_seed(0)
    sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    module = ContinualModule(Network(mlp((1, 2, 2), width=5)), expression, optimizer=sgd, seed=0)
    return LightningStrategy(
        model=module, benchmark=benchmark, train_mb_size=batch, train_epochs=EPOCHS, evaluator=None, **options
    )


def trained(expression, *, lazy=False, **options):
    """The strategy after three experiences; of each, what was planned, its batches, and the memory before it."""
    benchmark = class_incremental(source(lazy=lazy), experiences=3, order="sorted")
    strategy, seen = strategy_on(benchmark, expression, **options), []
    for experience in benchmark.avalanche.train_stream:
        batches = []
        strategy.on_step = lambda s, to=batches: to.append((s.mbatch[0].clone(), s.mbatch[1].clone()))
        memory = strategy.learner.state.get("er")
        seen.append((strategy.count_steps(experience), batches, memory))
        strategy.train(experience, eval_streams=[])
    return strategy, benchmark, seen


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("engine", ["fabric", "trainer"])
def test_an_epoch_runs_over_memory_and_new_data_once_in_one_shuffled_order(engine, lazy):
    _, benchmark, seen = trained(f"er(memory={MEMORY}, replay='concatenate')", engine=engine, lazy=lazy)
    for index, (planned, batches, memory) in enumerate(seen):
        new = benchmark.train[index]
        raw, y = new.raw(torch.arange(len(new))), new.y
        if index:
            assert len(memory["y"]) == MEMORY
            raw, y = torch.cat([raw, memory["x"]]), torch.cat([y, memory["y"]])
        x = (raw.float() - 99) / 50
        orders = [epoch_order(len(y), seed=0, experience=index, epoch=e).split(BATCH) for e in range(EPOCHS)]
        expected = [part for order in orders for part in order]
        assert len(batches) == planned == len(expected) == EPOCHS * -(-len(y) // BATCH)
        for (batch_x, batch_y), order in zip(batches, expected, strict=True):
            assert torch.equal(batch_y, y[order])
            torch.testing.assert_close(batch_x, x[order])


@pytest.mark.parametrize("batch, new", [(4, 2), (5, 3), (1, 1)])
def test_half_serves_half_as_many_new_samples_and_as_many_old_ones(batch, new):
    _, benchmark, seen = trained(f"er(memory={MEMORY}, replay='half')", batch=batch)
    for index, (planned, batches, _) in enumerate(seen):
        size = len(benchmark.train[index])
        served = new if index else batch
        assert planned == len(batches) == EPOCHS * -(-size // served)
        for step, (_, y) in enumerate(batches):
            fresh = min(served, size - served * (step % -(-size // served)))
            assert len(y) == (2 * fresh if index else fresh)
            assert set((y[:fresh] // 2).tolist()) == {index}
            assert (y[fresh:] < 2 * index).all()


def test_both_engines_learn_the_same_weights():
    expression = f"er(memory={MEMORY}, replay='concatenate') + lwf"
    (one, *_), (other, *_) = trained(expression), trained(expression, engine="trainer")
    for a, b in zip(one.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_memory_keeps_new_samples_of_the_experience_alone():
    concatenated, *_ = trained(f"er(memory={MEMORY}, replay='concatenate')")
    extra, *_ = trained(f"er(memory={MEMORY})")
    for key in ("x", "y", "group"):
        assert torch.equal(concatenated.learner.state["er"][key], extra.learner.state["er"][key])


def test_only_the_way_of_replay_acts():
    assert ER(replay="concatenate").acts_at() == ("init_state", "training_set", "after_experience")
    assert ER(replay="half").acts_at() == ("init_state", "training_set", "make_batch", "after_experience")
    assert ER(replay="fixed").acts_at() == ER().acts_at() == ("init_state", "make_batch", "after_experience")


def test_a_pool_weighs_all_samples_alike():
    with pytest.raises(ConfigError, match=r"^components\.er\.scale: found 0\.5 with replay concatenate.*; leave it"):
        ER(replay="concatenate", scale=0.5)
    assert str(compose(ER(replay="concatenate", scale=0))) == "naive"


def test_pool_belongs_to_the_slot_batch():
    class Pooling(Component):
        name = "pooling"

        def training_set(self, samples, size, state):
            return samples, size

    with pytest.raises(ComposeError, match=r"^component 'pooling': overrides training_set\(\) without owning the slot 'batch'"):
        compose(Pooling())


def test_data_that_a_plugin_has_changed_cannot_be_joined():
    class Shorten(SupervisedPlugin):
        def after_train_dataset_adaptation(self, strategy, **kwargs):
            strategy.adapted_dataset = strategy.adapted_dataset.subset(range(8))

    benchmark = class_incremental(source(), experiences=3)
    strategy = strategy_on(benchmark, "er(replay='concatenate')", plugins=[Shorten()])
    with pytest.raises(UnsupportedError, match="^LightningStrategy: 'er' changes what the loader serves"):
        strategy.train(benchmark.avalanche.train_stream[0], eval_streams=[])


def test_a_plain_trainer_serves_what_it_is_given():
    module = strategy_on(class_incremental(source(), experiences=3), "er(replay='half')").module
    with pytest.raises(UnsupportedError, match="^ContinualModule: 'er' changes the samples of an epoch"):
        module.configure_optimizers()


@pytest.mark.parametrize("replay", ["concatenate", "half"])
def test_a_run_that_broke_off_ends_the_same(replay, tmp_path):
    class Killed(BaseException):
        pass

    def kill(progress):
        if progress.finished == 2:
            raise Killed

    overrides = [
        "backbone=mlp", "backbone.width=8", "trainer.epochs=1", "trainer.loggers=[csv]", "trainer.progress=false",
        f"strategy=er(memory=20, replay='{replay}')",
    ]  # fmt: skip
    whole = clframe.run("quickstart", overrides, output=tmp_path / "whole")
    with pytest.raises(Killed):
        clframe.run("quickstart", overrides, output=tmp_path / "broken", on_evaluated=kill)
    (folder,) = (tmp_path / "broken").glob("quickstart/*")
    result = clframe.run(resume=folder)
    assert (result.accuracy_matrix, result.steps) == (whole.accuracy_matrix, whole.steps)
