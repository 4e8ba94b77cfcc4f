"""A ContinualModule inside Lightning Trainers: the same run, with Lightning's own callbacks."""

from __future__ import annotations

from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from lightning.pytorch.callbacks import Timer
from sampled import sampled

from clframe.core import Experience
from clframe.data import Benchmark, EpochLoader, Source, TensorSamples, class_incremental
from clframe.errors import UnsupportedError
from clframe.nn import BACKBONES, Network
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy

EXPRESSIONS = ["naive", "er(memory=12)", "lwf", "er(memory=12) + lwf", "joint", "cumulative"]


@pytest.fixture(scope="module")
def blobs() -> Benchmark:
    """Ours: six classes in three experiences, 14 samples a class."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(6).repeat(14)
    x = torch.randn(len(y), 1, 4, 4, generator=generator) + y.reshape(-1, 1, 1, 1)
    data = TensorSamples(x, y)
    return class_incremental(Source("blobs", data, data, classes=6), experiences=3)


def module(expression: str, *, seed: int | None = 3, **options: Any) -> ContinualModule:
    torch.manual_seed(0)
    network = Network(BACKBONES.get("mlp")((1, 4, 4), width=12))
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    return ContinualModule(network, expression, optimizer=optimizer, seed=seed, **options)


def finish(blobs: Benchmark, model: ContinualModule, **options: Any) -> LightningStrategy:
    options = {"train_mb_size": 10, "train_epochs": 2, "evaluator": None, "benchmark": blobs, **options}
    learner = LightningStrategy(model=model, **options)
    for experience in blobs.avalanche.train_stream:
        learner.train(experience)
    return learner


def step_down(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.3)


@pytest.mark.parametrize(
    ("expression", "options"),
    sampled(
        EXPRESSIONS,
        [
            {},
            {"seed": None},
            {"clip": 0.05, "scheduler": step_down},
            {"limit_batches": 2, "accumulate": 2},
            {"eval_every": 1},
        ],
    ),
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "plain",
)
def test_both_engines_end_with_the_same_weights(
    toy: SimpleNamespace, blobs: Benchmark, expression: str, options: dict[str, Any]
) -> None:
    of_module = {name: options[name] for name in ("seed", "clip", "scheduler") if name in options}
    of_strategy = {name: options[name] for name in options if name not in of_module}
    ends = []
    for engine in ("fabric", "trainer"):
        model = module(expression, **of_module)
        learner = finish(blobs, model, engine=engine, **of_strategy)
        state = [value for part in model.learner.state.values() for value in part.values()]
        ends.append((toy.weights(model), toy.random_states(), learner.clock.train_iterations, state))
    assert toy.same(ends[0][0], ends[1][0])
    assert ends[0][1:3] == ends[1][1:3]
    for on_fabric, in_trainer in zip(ends[0][3], ends[1][3], strict=True):
        if isinstance(on_fabric, torch.Tensor):
            assert torch.equal(on_fabric, in_trainer)


class Counting(lightning.Callback):
    """Counts Lightning's own callbacks; ``stop_at`` asks for a stop in the way Lightning's callbacks do."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.calls: Counter[str] = Counter()
        self.losses: list[float] = []
        self.stop_at = stop_at

    def __deepcopy__(self, memo: Any) -> Counting:
        """Counts through all experiences, unlike callbacks in general."""
        return self

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.calls["fit"] += 1

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.calls["epoch"] += 1
        assert isinstance(pl_module, ContinualModule) and pl_module.training

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert len(batch[0]) == len(batch[1]) <= 10

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.calls["update"] += 1
        assert any(p.grad is not None and bool(p.grad.any()) for p in pl_module.parameters())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self.calls["batch"] += 1

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.stop_at:
            trainer.should_stop = True

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.calls["end"] += 1


def test_lightnings_callbacks_are_called(blobs: Benchmark) -> None:
    counting = Counting()
    timer = Timer(duration={"hours": 1})
    learner = finish(blobs, module("er(memory=12) + lwf"), engine="trainer", trainer={"callbacks": [counting, timer]})
    (timer,) = [callback for callback in learner.module.trainer.callbacks if isinstance(callback, Timer)]
    assert counting.calls == {"fit": 3, "epoch": 6, "update": 18, "batch": 18, "end": 3}
    assert learner.clock.train_iterations == 18  # 28 samples: three batches of ten, two epochs, three times
    assert timer.time_elapsed("train") > 0


def test_a_callback_of_lightnings_may_stop_an_experience(toy: SimpleNamespace, blobs: Benchmark) -> None:
    stopped = finish(
        blobs,
        module("naive"),
        engine="trainer",
        train_epochs=5,
        trainer={"callbacks": [Counting(stop_at=1)]},
    )
    assert stopped.clock.train_iterations == 3 * 2 * 3
    assert stopped.clock.train_exp_counter == 3
    assert toy.same(toy.weights(stopped.model), toy.weights(finish(blobs, module("naive")).model))


def test_a_module_that_is_not_ours_cannot_go_into_a_trainer(toy: SimpleNamespace) -> None:
    model = toy.mlp()
    with pytest.raises(UnsupportedError, match=r"engine 'trainer' needs a ContinualModule; wrap the model or"):
        LightningStrategy(model=model, optimizer=toy.sgd(model), engine="trainer", evaluator=None)


def test_the_module_comes_back_as_it_was_given(toy: SimpleNamespace, blobs: Benchmark) -> None:
    model = module("naive")
    driver = model.driver
    in_trainer, on_fabric = (
        finish(
            blobs,
            of,
            engine=engine,
            evaluator=toy.evaluator(accuracy_metrics(stream=True), loss_metrics(experience=True)),
        )
        for of, engine in ((model, "trainer"), (module("naive"), "fabric"))
    )
    assert model.driver is driver
    assert {p.device.type for p in model.parameters()} == {in_trainer.device.type}
    assert model.training
    metrics = in_trainer.eval(blobs.avalanche.test_stream)
    assert len(metrics) == 4 and metrics == on_fabric.eval(blobs.avalanche.test_stream)


class FollowsEpochs(lightning.Callback):
    """Tells the loader which epoch it is."""

    def __init__(self, loader: EpochLoader) -> None:
        self.loader = loader

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.loader.epoch = trainer.current_epoch


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # Lightning's own
@pytest.mark.parametrize("options", [{}, {"clip": 0.05, "scheduler": step_down}], ids=["plain", "clip and scheduler"])
@pytest.mark.parametrize("expression", ["naive", "er(memory=12)", "lwf", "er(memory=12) + lwf"])
def test_a_plain_trainer_trains_an_experience_to_the_same_weights(
    toy: SimpleNamespace, blobs: Benchmark, expression: str, options: dict[str, Any]
) -> None:
    """No strategy, no Avalanche: begin, fit, end."""
    model, past = module(expression, **options), ()
    for index, (samples, classes) in enumerate(zip(blobs.train, blobs.classes, strict=True)):
        model.begin(Experience(index, 3, classes, past, (), samples), epochs=2)
        loader = EpochLoader(samples, 10, shuffle=True, seed=3, experience=index)
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[FollowsEpochs(loader)],
        )
        trainer.fit(model, loader)
        model.end()
        past = (*past, *classes)
    with_strategy = finish(blobs, module(expression, **options))
    assert toy.same(toy.weights(model), toy.weights(with_strategy.model))
    assert model.learner.past == with_strategy.learner.past == tuple(range(6))
