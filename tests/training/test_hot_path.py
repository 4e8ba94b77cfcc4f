"""A training step does what training needs and nothing else: no wait for the device, no idle call, no logging."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from sampled import sampled
from torch.utils._python_dispatch import TorchDispatchMode

from clframe.data.avalanche import import_avalanche
from clframe.data.benchmark import Benchmark, class_incremental
from clframe.data.epoch_loader import EpochLoader
from clframe.data.samples import TensorSamples
from clframe.data.source import Source
from clframe.nn import Network
from clframe.nn.backbones import mlp

import_avalanche()

from avalanche.core import SupervisedPlugin

from clframe.training.module import ContinualModule
from clframe.training.monitor import Monitor
from clframe.training.scores import Scores
from clframe.training.step_plugins import EVENTS
from clframe.training.strategy import LightningStrategy

BATCH, STEPS = 4, 5
"""Samples of a batch; steps of an epoch, the last one on a partial batch."""


@functools.cache
def bench() -> Benchmark:
    y = torch.arange(6).repeat_interleave(9)
    x = torch.randint(256, (len(y), 1, 2, 2), dtype=torch.uint8)
    scale = {"mean": (99.0,), "std": (50.0,)}
    source = Source("toy", TensorSamples(x, y, **scale), TensorSamples(x[::9], y[::9], **scale), classes=6)
    return class_incremental(source, experiences=3, order="sorted")


def strategy_for(expression: str, **options: Any) -> LightningStrategy:
    torch.manual_seed(0)
    network, sgd = Network(mlp((1, 2, 2), width=5)), functools.partial(torch.optim.SGD, lr=0.1)
    module = ContinualModule(network, expression, optimizer=sgd, seed=0, clip=1.0)
    return LightningStrategy(
        model=module, benchmark=bench(), train_mb_size=BATCH, train_epochs=2, evaluator=None, **options
    )


def train(strategy: LightningStrategy, experiences: int) -> None:
    for experience in bench().avalanche.train_stream[:experiences]:
        strategy.train(experience)


class NoSync(TorchDispatchMode):
    """Fails on operations that make the host wait for a device's result."""

    refused = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "_unique2", "bincount")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.refused or masks:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def _refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise AssertionError("reads a tensor on the host")


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Refuse every way to read a tensor's values on the host."""
    with pytest.MonkeyPatch.context() as patch, NoSync():
        for way in ("tolist", "numpy", "cpu", "__array__"):
            patch.setattr(torch.Tensor, way, _refuse)
        yield


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.sum().item(),
        lambda t: float(t.sum()),
        lambda t: bool(t.any()),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t[t > 0],
        lambda t: t.nonzero(),
        lambda t: torch.equal(t, t),
    ],
)
def test_the_guard_catches_every_read(read: Any) -> None:
    with pytest.raises(AssertionError, match="waits for the device|on the host"), no_sync():
        read(torch.ones(3))


STRATEGIES = [
    "naive", "er", "lwf", "er(memory=12, scale=0.5) + lwf", "joint", "cumulative", "gdumb(memory=12)",
    "der(memory=12)", "derpp(memory=12) + label_smoothing", "er + er_ace", "agem(memory=12, sample=4)",
]  # fmt: skip


@pytest.mark.parametrize("expression, engine", sampled(STRATEGIES, ["fabric", "trainer"]))
def test_steps_never_wait_for_the_device(expression: str, engine: Any) -> None:
    strategy = strategy_for(expression, engine=engine)
    guarded = strategy.train_on

    def train_on(batch: Any) -> None:
        with no_sync():
            guarded(batch)

    strategy.train_on = train_on  # type: ignore[method-assign]
    train(strategy, 3)
    assert strategy.clock.train_iterations >= 2 * STEPS


@pytest.mark.parametrize("expression", ["naive", "er + exits", "icarl + er(memory=12)"])
def test_batches_of_an_evaluation_never_wait_for_the_device(expression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is read of an evaluation is transferred after its last batch, in as many pieces for 1 as for 5 batches."""
    transfers, cpu = [0], torch.Tensor.cpu

    def counted(self: torch.Tensor) -> torch.Tensor:
        transfers[0] += 1
        return cpu(self)

    found = []
    for batch in (2, 99):
        scores = Scores(bench())
        strategy = strategy_for(expression, plugins=[scores], eval_mb_size=batch)
        train(strategy, 2)
        read, loops = scores.after_eval, strategy.eval_epoch

        def guarded(loops: Any = loops, **kwargs: Any) -> None:
            with no_sync():
                loops(**kwargs)

        def after(of: Any, read: Any = read, **kwargs: Any) -> None:
            transfers[0] = 0
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "cpu", counted)
                read(of, **kwargs)

        monkeypatch.setattr(strategy, "eval_epoch", guarded)
        monkeypatch.setattr(scores, "after_eval", after)
        strategy.eval(bench().avalanche.test_stream)
        assert scores.tally is not None and scores.predictions is not None
        found.append((transfers[0], scores.tally, scores.predictions.correct_KN.tolist()))
    assert found[0] == found[1]
    assert found[0][0] > 0


def test_batches_are_made_without_waiting_for_the_device() -> None:
    loader = EpochLoader(bench().train[0], BATCH, shuffle=True)
    with no_sync():
        assert [len(y) for _, y in loader] == [4, 4, 4, 4, 2]


@pytest.mark.parametrize("options", [{}, {"engine": "trainer"}, {"accumulate": 2}])
def test_the_monitor_reads_the_losses_only_every_so_many_steps(tmp_path: Any, options: dict[str, Any]) -> None:
    strategy = strategy_for("er", **options)
    monitor = Monitor(tmp_path, experiences=3, tensorboard=False, log_every=3, progress=False)
    monitor.begin_experience(0, steps=0)
    looked, flush = [], monitor.flush

    def counted(of: Any) -> None:
        looked.append(strategy.clock.train_iterations)
        flush(of)

    def on_step(of: LightningStrategy) -> None:
        with contextlib.nullcontext() if of.clock.train_iterations % 3 == 0 else no_sync():
            monitor.on_step(of)

    monitor.flush = counted  # type: ignore[method-assign]
    strategy.on_step = on_step
    train(strategy, 1)
    assert looked == [3, 6, 9]


# --- calls -----------------------------------------------------------------------------------------------------------


def calls_in_a_step(strategy: LightningStrategy) -> Counter[tuple[str, str]]:
    """(module, function) of every Python function that runs during one step in the middle of training."""
    calls: Counter[tuple[str, str]] = Counter()

    def count(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            calls[frame.f_globals.get("__name__", ""), frame.f_code.co_name] += 1

    plain = strategy.train_on

    def train_on(batch: Any) -> None:
        if strategy.clock.train_iterations != 2:
            plain(batch)
            return
        sys.setprofile(count)
        try:
            plain(batch)
        finally:
            sys.setprofile(None)

    strategy.train_on = train_on  # type: ignore[method-assign]
    train(strategy, 1)
    return calls


def callbacks(calls: Counter[tuple[str, str]]) -> list[tuple[str, str]]:
    """The callbacks among the calls, each as often as it was called."""
    return sorted(call for call in calls.elements() if call[1] in EVENTS)


CLOCK = ("avalanche.training.plugins.clock", "after_training_iteration")
"""Avalanche's step counter, the one plugin that always acts."""


def test_absent_plugins_cost_no_call() -> None:
    assert callbacks(calls_in_a_step(strategy_for("er + lwf"))) == [CLOCK]


def test_a_plugin_is_called_where_it_acts_and_nowhere_else() -> None:
    class Two(SupervisedPlugin):
        def before_backward(self, strategy: Any, **kwargs: Any) -> None: ...

        def after_update(self, strategy: Any, **kwargs: Any) -> None: ...

    class Idle(SupervisedPlugin):
        """Acts between experiences only."""

        def after_training_exp(self, strategy: Any, **kwargs: Any) -> None: ...

    found = callbacks(calls_in_a_step(strategy_for("naive", plugins=[Idle(), Two(), Idle()])))
    assert found == sorted([CLOCK, (__name__, "after_update"), (__name__, "before_backward")])


def test_absent_components_cost_no_call() -> None:
    calls = calls_in_a_step(strategy_for("naive"))
    assert not {name for module, name in calls if module.startswith(("strategies", "clframe.core.component"))}
    assert calls["clframe.functional.losses", "total"] == 1


@pytest.mark.parametrize("engine", ["fabric", "trainer"])
def test_a_step_logs_nothing_and_warns_of_nothing(engine: Any) -> None:
    calls = calls_in_a_step(strategy_for("er + lwf", engine=engine))
    assert calls["clframe.training.loop", "run_step"] == 1
    logging = {f for m, f in calls if m == "logging" and f in ("_log", "makeRecord", "handle")}
    writing = {m for m, _ in calls if m.startswith(("tensorboard", "torch.utils.tensorboard", "tqdm", "csv"))}
    assert not logging and not writing
    assert not any(f in ("log", "log_dict", "warn", "print") for _, f in calls)


def test_plugins_that_may_touch_the_loss_find_zero_to_add_to() -> None:
    """With none of them the sum is left out of the graph; the number is the same."""

    class Adds(SupervisedPlugin):
        def before_forward(self, strategy: Any, **kwargs: Any) -> None:
            assert strategy.loss.shape == (1,) and strategy.loss.item() == 0
            strategy.loss += 1.0

    losses: dict[str, list[torch.Tensor]] = {"without": [], "with": []}
    for name, plugins in (("without", []), ("with", [Adds()])):
        strategy = strategy_for("er", plugins=plugins)
        strategy.on_step = lambda s, name=name: losses[name].append(s.loss.detach())  # type: ignore[misc]
        train(strategy, 2)
    assert all(loss.shape == (1,) for loss in losses["without"])
    assert len(losses["without"]) == 4 * STEPS
    for without, plus_one in zip(losses["without"], losses["with"], strict=True):
        torch.testing.assert_close(plus_one, without + 1)


# --- data ------------------------------------------------------------------------------------------------------------


def test_our_benchmark_is_served_from_memory() -> None:
    seen = []

    class Look(SupervisedPlugin):
        def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            seen.append(type(strategy.dataloader))

        def before_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
            seen.append(type(strategy.dataloader))

    strategy = strategy_for("naive", plugins=[Look()])
    train(strategy, 1)
    strategy.eval(bench().avalanche.test_stream)
    assert seen == [EpochLoader] * 5
