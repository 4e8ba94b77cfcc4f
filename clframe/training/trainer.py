"""Experiences of a run inside Lightning Trainers, for their callbacks, loggers and profilers."""

from __future__ import annotations

import copy
import signal
import warnings
from typing import Any, Protocol

import torch

from clframe.avalanche_bridge.fabric import Engine, TrainerEngine, scaler_of
from clframe.avalanche_bridge.imports import MisconfigurationException, Trainer
from clframe.errors import UnsupportedError
from clframe.training.checkpoint import encode
from clframe.training.module import ContinualModule
from clframe.training.trainer_arguments import precision_plugins
from clframe.training.trainer_options import fresh_callbacks, make_trainer, refusal, without_banners


class FittedStrategy(Protocol):
    """The part of a ``LightningStrategy`` that a Trainer runs."""

    module: ContinualModule | None
    engine: Engine | None
    optimizer: Any
    dataloader: Any
    clock: Any
    device: torch.device
    fabric: Any
    train_epochs: int
    limit_batches: int | None
    trainer_options: dict[str, Any]
    epoch_metrics: dict[str, float]
    on_boundary: Any
    _stop_training: bool

    def reach(self, boundary: Any) -> None:
        """Reach a boundary at which the strategy may be saved."""

    def train_on(self, batch: Any) -> None:
        """Take one training step."""

    def _before_training_epoch(self, **kwargs: Any) -> None: ...

    def _after_training_epoch(self, **kwargs: Any) -> None: ...


class StrategyDriver:
    """Runs the epochs and steps of a strategy for a Trainer.

    Args:
        strategy: With the module that the Trainer fits.
        kwargs: Arguments of Avalanche's callbacks.
    """

    def __init__(self, strategy: FittedStrategy, kwargs: dict[str, Any]) -> None:
        self._strategy = strategy
        self._kwargs = kwargs
        self._stopped_before_epoch = False

    def __deepcopy__(self, memo: dict[int, Any]) -> StrategyDriver:
        """Return the driver itself: as with the learner, a copy of the module must not fork the run."""
        return self

    def configure(self) -> Any:
        """Return the strategy's optimizer."""
        return self._strategy.optimizer

    def before_epoch(self, epoch: int) -> None:
        """Call Avalanche's ``before_training_epoch``; early stopping takes effect here, as in Avalanche."""
        strategy = self._strategy
        strategy._before_training_epoch(**self._kwargs)
        assert strategy.module is not None
        trainer = strategy.module.trainer
        if strategy._stop_training:
            strategy._stop_training = False
            self._stopped_before_epoch = True
            trainer.should_stop = True
        elif strategy.limit_batches is None and len(strategy.dataloader) > trainer.num_training_batches:
            # A Trainer reads the length of its loader once and would cut the rest.
            raise UnsupportedError(
                f"engine 'trainer': a plugin replaced the loader of {trainer.num_training_batches} batches by one of "
                f"{len(strategy.dataloader)} at the start of an epoch; use engine 'fabric'"
            )

    def stop_requested(self) -> bool:
        """Whether a plugin asked to stop."""
        return bool(self._stopped_before_epoch or self._strategy._stop_training)

    def train_on(self, batch: Any) -> None:
        """Take one step of the strategy."""
        self._strategy.train_on(batch)

    def after_batch(self) -> None:
        """Reach the end of a step, where the strategy may be saved."""
        self._strategy.reach("step")

    def after_epoch(self) -> None:
        """Call Avalanche's ``after_training_epoch`` and log the epoch's metrics for Lightning's callbacks."""
        if self._stopped_before_epoch:
            return
        strategy = self._strategy
        strategy._after_training_epoch(**self._kwargs)
        assert strategy.module is not None
        if strategy.epoch_metrics:
            strategy.module.log_dict(strategy.epoch_metrics, on_step=False, on_epoch=True)


class _LoaderView:
    """The strategy's current loader as a plain iterable, into which Lightning injects no sampler."""

    def __init__(self, strategy: FittedStrategy) -> None:
        self._strategy = strategy

    def __len__(self) -> int:
        return len(self._strategy.dataloader)

    def __iter__(self) -> Any:
        # Lazily: before_training_epoch may still replace the loader, and sets the clock where the epoch is resumed.
        batches = int(self._strategy.clock.train_epoch_iterations)
        if batches:
            assert self._strategy.module is not None
            _continue_epoch(self._strategy.module.trainer, batches)
        yield from self._strategy.dataloader


def _share_scaler(trainer: Trainer, fabric: Any) -> None:
    """Scale the gradients of 16-bit mixed precision by Fabric's scaler, which lasts for the run: a Trainer's is new."""
    if scaler_of(trainer.precision_plugin) is not None:
        trainer.precision_plugin.scaler = scaler_of(fabric._precision)  # type: ignore[attr-defined]


def _continue_steps(trainer: Trainer, steps: int) -> None:
    """Start the step that callbacks and loggers see at ``steps``: it rises over the experiences of a run.

    Lightning has no public way to start a fit at another step than that of a checkpoint.
    """
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = steps
    if trainer.max_steps == -1:  # which counts from 0
        loop.manual_optimization.optim_step_progress.total.completed = steps


def trainer_state(trainer: Trainer, *, inside_epoch: bool) -> dict[str, Any]:
    """Return the counters of a Trainer and the states of its callbacks.

    Args:
        trainer: While it fits.
        inside_epoch: Whether it is at the end of a batch, which its loop counts a moment later.
    """
    loop = trainer.fit_loop.epoch_loop
    updates = loop.manual_optimization.optim_step_progress.total
    return {
        "stepped": loop._batches_that_stepped + inside_epoch,
        "updates": [updates.ready, updates.completed],
        "callbacks": {callback.state_key: encode(callback.state_dict()) for callback in _stateful(trainer)},
    }


def _stateful(trainer: Trainer) -> list[Any]:
    return [callback for callback in getattr(trainer, "callbacks", ()) if callback.state_dict()]


def _continue_fit(trainer: Trainer, resumption: Any) -> None:
    """Set the counters of a new Trainer to those of the one that was interrupted, and restore its callbacks.

    Lightning's own way would need a checkpoint of its format, and skips or repeats batches of loaders that it cannot
    resume.
    """
    state, epochs = resumption.content["trainer"], resumption.position.epoch
    progress, loop = trainer.fit_loop.epoch_progress, trainer.fit_loop.epoch_loop
    for counts in (progress.current, progress.total):
        _set_counts(counts, epochs)
    loop._batches_that_stepped = state["stepped"]
    updates = loop.manual_optimization.optim_step_progress.total
    updates.ready, updates.completed = state["updates"]
    for callback in getattr(trainer, "callbacks", ()):
        if callback.state_key in state["callbacks"]:
            callback.load_state_dict(copy.deepcopy(state["callbacks"][callback.state_key]))
    if resumption.content["precision"]:
        trainer.precision_plugin.load_state_dict(resumption.content["precision"])


def _set_counts(counts: Any, number: int) -> None:
    """Set the counts of Lightning's progress as after ``number`` epochs or batches."""
    counts.ready = counts.started = counts.processed = counts.completed = number


def _continue_epoch(trainer: Trainer, batches: int) -> None:
    """Have the loop of a Trainer count the batches of the epoch from ``batches``."""
    _set_counts(trainer.fit_loop.epoch_loop.batch_progress.current, batches)
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    fetcher.fetched += batches


def fit_experience(strategy: FittedStrategy, *, resumption: Any = None, **kwargs: Any) -> None:
    """Train the current experience of ``strategy`` in a new Trainer, from where ``resumption`` says."""
    module = strategy.module
    assert module is not None
    fabric_engine, plain_driver, on_sigint = strategy.engine, module.driver, signal.getsignal(signal.SIGINT)
    strategy.engine = TrainerEngine(module)
    module.driver = StrategyDriver(strategy, kwargs)
    try:
        with without_banners(), warnings.catch_warnings():
            trainer = make_trainer(
                fresh_callbacks(strategy.trainer_options),
                accelerator=strategy.device.type,
                # Lightning refuses both a precision and a plugin that decides it.
                precision=None if precision_plugins(strategy.trainer_options) else strategy.fabric._precision.precision,
                max_epochs=strategy.train_epochs,
                limit_train_batches=strategy.limit_batches,
            )
            _share_scaler(trainer, strategy.fabric)
            _continue_steps(trainer, int(strategy.clock.train_iterations))
            if resumption is not None:
                _continue_fit(trainer, resumption)
            if strategy.on_boundary is not None:
                # The run has its own handlers, which save at the end of a step; Lightning's would raise before it.
                trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
            # Loaders, workers and intervals are ours to choose; Lightning advises on them at every fit.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            # Some strategies freeze modules.
            warnings.filterwarnings("ignore", message="Found .* in eval mode at the start")
            warnings.filterwarnings("ignore", message="The number of training batches .* is smaller than the log")
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            # Lightning 2.6 asks torch's tree specs for their class, of which newer torch warns.
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            trainer.fit(module, _LoaderView(strategy))
    except (MisconfigurationException, RuntimeError) as error:
        # EarlyStopping raises a RuntimeError for a metric that is not logged.
        if isinstance(error, MisconfigurationException) or "Early stopping conditioned" in str(error):
            raise refusal(error) from None
        raise
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            # A Trainer turns an interruption into sys.exit(1) and leaves SIGINT ignored.
            signal.signal(signal.SIGINT, on_sigint)
            raise error.__context__ from None
        raise
    finally:
        module.driver = plain_driver
        strategy.engine = fabric_engine
        module.to(strategy.device)  # the Trainer's teardown has moved it to the CPU


