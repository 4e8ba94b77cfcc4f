"""Experiences of a run inside Lightning Trainers, for their callbacks, loggers and profilers."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from clframe.avalanche_bridge.fabric import Engine, TrainerEngine
from clframe.avalanche_bridge.imports import (
    Callback,
    MisconfigurationException,
    Trainer,
    lightning_callbacks,
    lightning_loggers,
)
from clframe.errors import ConfigError, UnknownNameError, UnsupportedError, unknown_name
from clframe.own_code import is_dotted, load_class
from clframe.training.checkpoint import encode
from clframe.training.epochs import EarlyStopping, metric_names
from clframe.training.module import ContinualModule

Named = Sequence[tuple[str, Mapping[str, Any]]]
"""Class names with their options."""

_REFUSED = {
    "StochasticWeightAveraging": "its extra epoch for batch normalization would train, as optimization is manual here",
    "GradientAccumulationScheduler": "it needs automatic optimization; set trainer.accumulate",
    "BatchSizeFinder": "its trial fits would train the model; set trainer.batch_size",
    "LearningRateFinder": "its trial fits would train the model; set optimizer.lr",
    "BaseFinetuning": "it changes the optimizer that the strategy creates; use the component 'freeze'",
    "ModelPruning": "it renames parameters, which checkpoints and components find by name",
}
"""Lightning callbacks that spoil a run here, by class name, and why."""
_REFUSED_LOGGERS = {
    "WandBLogger": "Avalanche's logger calls wandb.util.generate_id, which current wandb lacks; use WandbLogger, "
    "Lightning's, with trainer.engine=trainer",
}
"""Loggers of Avalanche that people may name, and why not."""


class FittedStrategy(Protocol):
    """The part of a ``LightningStrategy`` that a Trainer runs."""

    module: ContinualModule | None
    engine: Engine | None
    optimizer: Any
    dataloader: Any
    clock: Any
    device: torch.device
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


def make_trainer(options: Mapping[str, Any], **arguments: Any) -> Trainer:
    """Return a Trainer that shows and saves only what its options ask for.

    Raises:
        UnsupportedError: Lightning refuses the options.
    """
    names = {type(callback).__name__ for callback in _callbacks(options)}
    try:
        with _without_banners():
            return Trainer(
                **{
                    "devices": 1,
                    "logger": False,
                    "enable_checkpointing": any("Checkpoint" in name for name in names),
                    "enable_model_summary": any(name.endswith("ModelSummary") for name in names),
                    "enable_progress_bar": any(name.endswith("ProgressBar") for name in names),
                    "use_distributed_sampler": False,
                    **arguments,
                    **options,
                }
            )
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        raise _refusal(error) from None


def check_callbacks(options: Mapping[str, Any]) -> None:
    """Refuse callbacks of Lightning that would spoil a run.

    Raises:
        UnsupportedError: One of them; the message gives the reason.
    """
    for callback in _callbacks(options):
        for base in type(callback).__mro__:
            if base.__name__ in _REFUSED and base.__module__.startswith("lightning."):
                raise UnsupportedError(
                    f"trainer.callbacks: {type(callback).__name__} cannot work with manual optimization, one fit per "
                    f"experience: {_REFUSED[base.__name__]}"
                )


def _callbacks(options: Mapping[str, Any]) -> list[Any]:
    found = options.get("callbacks") or ()
    return [found] if isinstance(found, Callback) else list(found)


def _refusal(error: Exception) -> UnsupportedError:
    reason = " ".join(str(error).split())
    return UnsupportedError(f"trainer: Lightning refuses its callbacks or loggers ({reason}); change or remove them")


@contextmanager
def _without_banners() -> Iterator[None]:
    """Silence the banner that Lightning prints for each new Trainer, one per experience."""
    notices = [logging.getLogger(f"lightning.pytorch{name}") for name in ("", ".utilities.rank_zero")]
    levels = [logger.level for logger in notices]
    for logger in notices:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(notices, levels, strict=True):
            logger.setLevel(level)


def _fresh_callbacks(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with deep copies of the callbacks: their state, such as a best score, is of one experience."""
    try:
        return {**options, "callbacks": [copy.deepcopy(callback) for callback in _callbacks(options)]}
    except Exception as error:  # whatever __deepcopy__ and __reduce__ of a foreign class raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnsupportedError(
            f"trainer.callbacks: a callback cannot be copied ({reason}), but each experience gets a fresh one; give it "
            f"a __deepcopy__ (returning itself shares it)"
        ) from None


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


def refuse_to_save(options: Mapping[str, Any]) -> str:
    """Return the names of callbacks whose state cannot be stored inside an experience; empty if all can."""
    found = []
    for callback in _callbacks(options):
        try:
            encode(callback.state_dict())
            plain = type(callback).on_save_checkpoint is Callback.on_save_checkpoint
        except Exception:  # whatever a foreign class raises
            plain = False
        if not plain:
            found.append(type(callback).__name__)
    return ", ".join(found)


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
        with _without_banners(), warnings.catch_warnings():
            trainer = make_trainer(
                _fresh_callbacks(strategy.trainer_options),
                accelerator=strategy.device.type,
                max_epochs=strategy.train_epochs,
                limit_train_batches=strategy.limit_batches,
            )
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
            raise _refusal(error) from None
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


def trainer_options(callbacks: Mapping[str, Any], loggers: Named, *, precision: str, folder: Path) -> dict[str, Any]:
    """Return keyword arguments of ``lightning.Trainer``.

    Args:
        callbacks: Options by class name of ``lightning.pytorch.callbacks``.
        loggers: Class names of ``lightning.pytorch.loggers`` with options; each writes below ``folder``.
        precision: As Lightning names it.
        folder: The run folder.

    Raises:
        UnknownNameError: No such class; the message has the nearest name.
        ConfigError: Options that the class does not take.
        UnsupportedError: A class that cannot work here.
    """
    options = {
        "callbacks": [
            _make(lightning_callbacks, name, options or {}, "trainer.callbacks") for name, options in callbacks.items()
        ],
        "logger": [_make_logger(name, options, folder) for name, options in loggers] or False,
        "precision": precision,
        "default_root_dir": str(folder),
    }
    check_callbacks(options)
    make_trainer(options, accelerator="auto", max_epochs=1)  # refuse now what could not train later
    return options


def early_stopping(callbacks: Mapping[str, Any]) -> EarlyStopping | None:
    """Return what ``trainer.callbacks.EarlyStopping`` asks for, where no Trainer runs Lightning's callback.

    Raises:
        ConfigError: Options that it does not take.
    """
    options = callbacks.get("EarlyStopping")
    if options is None:
        return None
    found = _instantiate(EarlyStopping, options, "trainer.callbacks.EarlyStopping")
    assert isinstance(found, EarlyStopping)
    return found


def check_monitors(callbacks: Mapping[str, Any], *, validation: bool) -> None:
    """Refuse callbacks that follow a metric which no epoch has.

    Args:
        callbacks: Options by class name.
        validation: Whether data is held out.

    Raises:
        ConfigError: The metric's name, and those that exist.
    """
    metrics = metric_names(validation=validation)
    for name, options in callbacks.items():
        monitor = options.get("monitor") if isinstance(options, Mapping) else None
        if monitor is not None and monitor not in metrics:
            validated = monitor in metric_names(validation=True)
            advice = "set benchmark.validation=0.1" if validated else f"metrics are {', '.join(metrics)}"
            raise ConfigError(f"trainer.callbacks.{name}.monitor: found '{monitor}'; {advice}")


def _make_logger(name: str, options: Mapping[str, Any], folder: Path) -> Any:
    where = "trainer.loggers"
    if name in _REFUSED_LOGGERS:
        raise UnsupportedError(f"{where}: {name} cannot work: {_REFUSED_LOGGERS[name]}")
    kind = getattr(lightning_loggers, name, object)
    if is_dotted(name):
        kind = load_class(name, (lightning_loggers.Logger,), where=where)
    takes = inspect.signature(kind).parameters
    home = {"save_dir": str(folder / name)} if "save_dir" in takes else {}
    logger = _make(lightning_loggers, name, {**home, **options}, where)
    if name == "WandbLogger":
        _check_wandb_key(options)
    return logger


def _check_wandb_key(options: Mapping[str, Any]) -> None:
    """Refuse before training what wandb would raise on the first value logged."""
    import wandb

    offline = options.get("offline") or options.get("mode", os.environ.get("WANDB_MODE")) in ("offline", "disabled")
    if offline:
        return
    if "prompt" in inspect.signature(wandb.login).parameters:
        found = wandb.login(prompt=False, verify=False)
    else:  # before wandb 0.31
        found = wandb.api.api_key is not None
    if not found:
        raise ConfigError(
            "trainer.loggers.WandbLogger: found no API key of Weights & Biases; run `wandb login`, set WANDB_API_KEY, "
            "or use trainer.loggers=[{WandbLogger: {offline: true}}]"
        )


def _make(module: Any, name: str, options: Any, where: str) -> Any:
    if is_dotted(name):
        base = Callback if module is lightning_callbacks else module.Logger
        return _instantiate(load_class(name, (base,), where=where), options, f"{where}.{name}")
    if name not in module.__all__:
        raise UnknownNameError(unknown_name("Lightning class", name, module.__all__, where=where))
    return _instantiate(getattr(module, name), options, f"{where}.{name}")


def _instantiate(maker: Any, options: Any, where: str) -> Any:
    accepted = inspect.signature(maker).parameters
    if not isinstance(options, Mapping):
        raise ConfigError(f"{where}: found {options!r}; give a mapping of options")
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        for option in options:
            if option not in accepted:
                raise ConfigError(f"{where}.{option}: unknown option; options are {', '.join(accepted)}")
    try:
        return maker(**options)
    except Exception as error:  # whatever a foreign class raises on its options
        raise ConfigError(f"{where}: {' '.join(str(error).split())}; change its options") from None
