"""Helpers of several verbs: config, seeds and device of a call, and notices about the data."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from clframe.errors import ConfigError, nearest
from clframe.printable import printable
from clframe.sweep import values

CONFIG = """\
CONFIG is a name from `clframe list configs` or a YAML file; files in ./configs/experiment are found by name.
KEY=VALUE overrides one key: lists and scalars are replaced, mappings are merged. backbone=NAME and benchmark=NAME
replace the whole block; NAME is a registered name (`clframe list backbones`) or a config file.
"""

_DEVICES = ("cpu", "cuda", "gpu", "mps", "auto")
_NOTICED = (
    "clframe.api", "clframe.config.load", "clframe.config_checks", "clframe.data", "clframe.execution",
    "clframe.planning", "clframe.targets.loading", "clframe.training.saver",
)  # fmt: skip
"""Loggers whose lines concern users of the command line."""


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every verb that takes a config."""
    parser.add_argument("--seed", metavar="N", help="short for seed=N")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 or mps; sets trainer.accelerator")


def parse_config(options: argparse.Namespace) -> tuple[str, list[str]]:
    """The name of the config and all overrides, with those of ``--device`` and ``--seed`` last."""
    name, *overrides = options.words or [""]
    if not name or ("=" in name and not name.endswith((".yaml", ".yml"))):
        found = f"found '{name}' instead of a config" if name else "found no config"
        raise ConfigError(f"{options.verb}: {found}; begin with one, such as clframe {options.verb} quickstart")
    for option, key in (("seed", "seed"), ("seeds", "seed"), ("name", "name"), ("output", "output")):
        refuse_twice(option, getattr(options, option, None), key, overrides)
    if getattr(options, "deterministic", False):
        refuse_twice("deterministic", "it", "trainer.deterministic", overrides)
    overrides += chosen_device(options.device, overrides)
    if options.seed is not None:
        overrides.append(f"seed={parse_seed(options.seed)}")
    return name, overrides


def parse_run(options: argparse.Namespace, *, then: str) -> tuple[str, list[str]]:
    """Return the run folder and the overrides of a verb that reads a run.

    Args:
        options: Those of the verb.
        then: What may follow the run, for the message about anything else.

    Raises:
        ConfigError: No run, or a word that is not an override.
    """
    run, *overrides = options.words or [""]
    if not run:
        raise ConfigError(f"{options.verb}: found no run; give a run folder, such as the one clframe run printed")
    for word in overrides:
        if "=" not in word:
            raise ConfigError(f"{options.verb}: found '{word}'; give one run, then {then}")
    return run, overrides


def parse_seed(text: str) -> int:
    """Parse ``--seed``.

    >>> parse_seed("3")
    3
    """
    if not values.is_seed(text):
        several = ", or several seeds with --seeds" if ".." in text or "," in text else ""
        raise ConfigError(f"--seed: found '{text}'; give a whole number from 0{several}")
    return int(text)


def parse_seeds(text: str) -> list[int]:
    """Parse ``--seeds``: ``"0..4"`` (both ends included), ``"0,3,7"``, or both.

    >>> parse_seeds("0..2"), parse_seeds("5,1")
    ([0, 1, 2], [5, 1])
    """
    return values.parse_seeds(text, where="--seeds")


def progress_line(progress: Any) -> str:
    """Describe the accuracies after an experience; those that were not evaluated are left out of the mean."""
    tally, index = progress.tallies[-1], progress.finished - 1
    seen = [a for j, a in enumerate(tally.accuracy_E) if j <= index and a == a]
    count = len(tally.accuracy_E)
    if tally.nats_E:
        from clframe.functional.language import perplexity  # here, because torch is slow to import

        nats = [n for n in tally.nll_E[: index + 1] if n == n]
        every = perplexity(sum(nats) / len(nats))
        return (
            f"experience {progress.finished}/{count}: perplexity {every:8.2f} over the domains so far, "
            f"{perplexity(tally.nll_E[index]):8.2f} on this one   ({progress.train_seconds:.1f} s training)"
        )
    gone = index + 1 - len(seen)
    return (
        f"experience {progress.finished}/{count}: {100 * sum(seen) / len(seen):5.1f} % over the experiences "
        f"so far{f' ({gone} not evaluated)' if gone else ''}, {100 * tally.accuracy_E[index]:5.1f} % on this one   "
        f"({progress.train_seconds:.1f} s training)"
    )


def refuse_twice(option: str, value: str | None, key: str, overrides: Sequence[str]) -> None:
    """Refuse an option together with an override of the key that it sets.

    Args:
        option: Its name, without dashes.
        value: Its value; None where it is not given.
        key: The key.
        overrides: All overrides.

    Raises:
        ConfigError: Both are given.
    """
    given = [text for text in overrides if text.partition("=")[0].strip() == key]
    if given and value is not None:
        raise ConfigError(f"--{option}: found {value} together with {given[-1]}; give one of them")


def chosen_device(name: str | None, overrides: Sequence[str]) -> list[str]:
    """Overrides of ``--device``, next to others.

    Args:
        name: Its value; None where it is not given.
        overrides: All other overrides.

    Raises:
        ConfigError: No such device, or one together with an override of the same key.
    """
    if name is None:
        return []
    chosen = device_overrides(name)
    refuse_twice("device", name, "trainer.accelerator", overrides)
    if any(text.partition("=")[0].strip() == "trainer.devices" for text in overrides):
        if ":" in name:
            raise ConfigError(f"--device: found {name} together with trainer.devices; give one of them")
        chosen = chosen[:1]  # the accelerator
    return chosen


def device_overrides(name: str) -> list[str]:
    """Overrides that select the device ``name``."""
    kind, colon, index = name.partition(":")
    indexed = kind in ("cuda", "gpu") and re.fullmatch("[0-9]{1,4}", index)
    if kind not in _DEVICES or (colon and not indexed):
        close = nearest(kind, _DEVICES) if kind not in _DEVICES else None
        advice = f"did you mean '{close}'?" if close else "give cpu, cuda, cuda:N, mps or auto"
        raise ConfigError(f"--device: found '{name}'; {advice}")
    if indexed:
        return [f"trainer.accelerator={kind}", f"trainer.devices=[{int(index)}]"]
    # A device index in the config is that of a GPU: reset it for other devices.
    return [f"trainer.accelerator={kind}", *([] if kind in ("cuda", "gpu") else ["trainer.devices=1"])]


class Notices(logging.Handler):
    """Prints log lines about the data on stderr, buffered until :meth:`show`.

    A call that is refused thus prints its warnings and the error only. A line that several seeds repeat is printed
    once, and one that was dropped never.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffer: list[logging.LogRecord] | None = []
        self._done: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Buffer a record, or print it after :meth:`show`."""
        if self._buffer is None:
            self._print(record)
        else:
            self._buffer.append(record)

    def show(self, *, least: int = logging.NOTSET) -> None:
        """Print the buffered records of at least level ``least``, drop the others; print later ones immediately."""
        buffered, self._buffer = self._buffer or [], None
        for record in buffered:
            if record.levelno >= least:
                self._print(record)
            else:
                self._done.add(record.getMessage())

    def _print(self, record: logging.LogRecord) -> None:
        line = printable(record.getMessage(), lines=True)
        if line not in self._done:
            self._done.add(line)
            print(line, file=sys.stderr, flush=True)


@contextmanager
def notices(*, quiet: bool) -> Iterator[Notices]:
    """Print the log about data and checkpoints on stderr while active; ``quiet`` prints warnings only."""
    loggers, handler = [logging.getLogger(name) for name in _NOTICED], Notices()
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        yield handler
    finally:
        handler.show(least=logging.WARNING)
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
