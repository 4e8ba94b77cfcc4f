"""One experience of a run inside a Lightning Trainer, for people who want its callbacks and profilers."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch import loggers as lightning_loggers

from clframe.avalanche_bridge.fabric import TrainerEngine
from clframe.errors import ConfigError, UnknownNameError, UnsupportedError, unknown_name
from clframe.training.module import TrainerDriver


class StrategyDriver(TrainerDriver):
    """Lets a Trainer call the strategy's own epochs and steps."""

    def __init__(self, strategy: Any, kwargs: dict[str, Any]) -> None:
        self._strategy = strategy
        self._kwargs = kwargs
        self._stopped_before_epoch = False

    def configure(self) -> Any:
        """The strategy's optimizer."""
        return self._strategy.optimizer

    def before_epoch(self, epoch: int) -> None:
        """Avalanche's ``before_training_epoch``; early stopping takes effect here, as in Avalanche."""
        strategy = self._strategy
        strategy._before_training_epoch(**self._kwargs)
        assert strategy.module is not None
        trainer = strategy.module.trainer
        if strategy._stop_training:
            strategy._stop_training = False
            self._stopped_before_epoch = True
            trainer.should_stop = True
        elif strategy.limit_batches is None and len(strategy.dataloader) > trainer.num_training_batches:
            raise UnsupportedError(
                f"engine 'trainer': a plugin put {len(strategy.dataloader)} batches in place of "
                f"{trainer.num_training_batches} as an epoch began, which a Trainer would cut; use engine 'fabric'"
            )

    def stopping(self) -> bool:
        """Whether a plugin asked to stop."""
        return bool(self._stopped_before_epoch or self._strategy._stop_training)

    def train_on(self, batch: Any) -> None:
        """The strategy's step."""
        self._strategy.train_on(batch)

    def end_epoch(self) -> None:
        """Avalanche's ``after_training_epoch``."""
        if not self._stopped_before_epoch:
            self._strategy._after_training_epoch(**self._kwargs)


class _Batches:
    """The strategy's loader as Lightning sees it: a plain iterable, left alone."""

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy

    def __len__(self) -> int:
        return len(self._strategy.dataloader)

    def __iter__(self) -> Any:
        yield from self._strategy.dataloader  # lazily: before_training_epoch may still replace it


def make_trainer(options: Mapping[str, Any], **arguments: Any) -> Trainer:
    """A Trainer that shows and saves only what its options ask for.

    Raises:
        UnsupportedError: Lightning refuses the options.
    """
    callbacks = {type(callback).__name__ for callback in options.get("callbacks", ())}
    try:
        with _without_banners():
            return Trainer(
                **{
                    "devices": 1,
                    "logger": False,
                    "enable_checkpointing": any("Checkpoint" in name for name in callbacks),
                    "enable_model_summary": any(name.endswith("ModelSummary") for name in callbacks),
                    "enable_progress_bar": any(name.endswith("ProgressBar") for name in callbacks),
                    "use_distributed_sampler": False,
                    **arguments,
                    **options,
                }
            )
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        raise _refusal(error) from None


def _refusal(error: Exception) -> UnsupportedError:
    reason = " ".join(str(error).split())
    return UnsupportedError(f"trainer: Lightning refuses its callbacks or loggers ({reason}); change or remove them")


@contextmanager
def _without_banners() -> Iterator[None]:
    """A new Trainer per experience would repeat its banner each time."""
    notices = [logging.getLogger(f"lightning.pytorch{name}") for name in ("", ".utilities.rank_zero")]
    levels = [logger.level for logger in notices]
    for logger in notices:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(notices, levels, strict=True):
            logger.setLevel(level)


def fit_experience(strategy: Any, **kwargs: Any) -> None:
    """Train the current experience of ``strategy`` in a new Trainer."""
    module = strategy.module
    assert module is not None
    fabric_engine, plain_driver = strategy._engine, module.driver
    strategy._engine = TrainerEngine(module)
    module.driver = StrategyDriver(strategy, kwargs)
    try:
        with _without_banners(), warnings.catch_warnings():
            trainer = make_trainer(
                strategy.trainer_options,
                accelerator=strategy.device.type,
                max_epochs=strategy.train_epochs,
                limit_train_batches=strategy.limit_batches,
            )
            # Loaders, workers and intervals are ours to choose; Lightning advises on them at every fit.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            # Freezing parts is what some strategies do.
            warnings.filterwarnings("ignore", message="Found .* in eval mode at the start")
            warnings.filterwarnings("ignore", message="The number of training batches .* is smaller than the log")
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            # Lightning 2.6 asks torch's tree specs for their class, of which newer torch warns.
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            trainer.fit(module, _Batches(strategy))
    except (MisconfigurationException, RuntimeError) as error:
        # EarlyStopping says in a RuntimeError of its own that nobody logs what it monitors.
        if isinstance(error, MisconfigurationException) or "Early stopping conditioned" in str(error):
            raise _refusal(error) from None
        raise
    finally:
        module.driver = plain_driver
        strategy._engine = fabric_engine
        module.to(strategy.device)  # the Trainer's teardown has moved it to the CPU


def trainer_options(
    callbacks: Mapping[str, Any], loggers: Sequence[str], *, precision: str, folder: Path
) -> dict[str, Any]:
    """Keyword arguments of ``lightning.Trainer``.

    Args:
        callbacks: Options by class name of ``lightning.pytorch.callbacks``.
        loggers: Class names of ``lightning.pytorch.loggers``; each writes below ``folder``.
        precision: As Lightning names it.
        folder: The run folder.

    Raises:
        UnknownNameError: No such class; the message has the nearest name.
        ConfigError: Options that the class does not take.
    """
    options = {
        "callbacks": [
            _make(lightning_callbacks, name, options or {}, "trainer.callbacks")
            for name, options in callbacks.items()
        ],
        "logger": [
            _make(lightning_loggers, name, {"save_dir": str(folder / name)}, "trainer.loggers")
            for name in loggers
        ]
        or False,
        "precision": precision,
        "default_root_dir": str(folder),
    }
    make_trainer(options, accelerator="auto", max_epochs=1)  # refuse now what could not train later
    return options


def _make(module: Any, name: str, options: Any, where: str) -> Any:
    if name not in module.__all__:
        raise UnknownNameError(unknown_name("Lightning class", name, module.__all__, where=where))
    maker = getattr(module, name)
    accepted = inspect.signature(maker).parameters
    if not isinstance(options, dict):
        raise ConfigError(f"{where}.{name}: found {options!r}; give a mapping of options")
    for option in options:
        if option not in accepted:
            raise ConfigError(f"{where}.{name}.{option}: unknown option; options are {', '.join(accepted)}")
    try:
        return maker(**options)
    except Exception as error:  # whatever a class of Lightning's thinks of its options
        raise ConfigError(f"{where}.{name}: {' '.join(str(error).split())}; mend its options") from None
