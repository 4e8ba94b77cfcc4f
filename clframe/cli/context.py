"""What verbs share: config, seed and device of a call, and notices about the data."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from clframe.errors import ConfigError, nearest

CONFIG = """\
CONFIG is a name of `clframe list configs`, or a YAML file of yours; files in ./configs/experiment are found
by name. KEY=VALUE changes one key: lists and scalars replace, mappings merge; benchmark=NAME and
backbone=NAME take another file of that group.
"""

_DEVICES = ("cpu", "cuda", "gpu", "mps", "auto")


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Options of every verb that takes a config."""
    parser.add_argument("--seed", metavar="N", help="short for seed=N")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 or mps; sets trainer.accelerator")


def config_of(options: argparse.Namespace) -> tuple[str, list[str]]:
    """The config's name and all overrides, those of ``--device`` and ``--seed`` last."""
    from clframe.config.seeds import parse_seed

    name, *overrides = options.words or [""]
    if not name or ("=" in name and not name.endswith((".yaml", ".yml"))):
        found = f"found '{name}' in the place of a config" if name else "found no config"
        raise ConfigError(f"{options.verb}: {found}; begin with one, such as clframe {options.verb} quickstart")
    if options.device is not None:
        overrides += _device(options.device)
    if options.seed is not None:
        overrides.append(f"seed={parse_seed(options.seed)}")
    return name, overrides


def _device(name: str) -> list[str]:
    kind, colon, index = name.partition(":")
    indexed = kind in ("cuda", "gpu") and re.fullmatch("[0-9]{1,4}", index)
    if kind not in _DEVICES or (colon and not indexed):
        close = nearest(kind, _DEVICES) if kind not in _DEVICES else None
        advice = f"did you mean '{close}'?" if close else "give cpu, cuda, cuda:N, mps or auto"
        raise ConfigError(f"--device: found '{name}'; {advice}")
    if indexed:
        return [f"trainer.accelerator={kind}", f"trainer.devices=[{int(index)}]"]
    # An index in the config is that of a GPU.
    return [f"trainer.accelerator={kind}", *([] if kind in ("cuda", "gpu") else ["trainer.devices=1"])]


class Notices(logging.Handler):
    """What is said of the data, as plain lines on stderr, held back until nothing can refuse the call any more.

    So a call that is refused leaves warnings and its error. What several seeds have to say is said once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: list[logging.LogRecord] | None = []
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Hold a line back, or say it."""
        if self._held is None:
            self._say(record)
        else:
            self._held.append(record)

    def show(self, *, least: int = logging.NOTSET) -> None:
        """Say what was held back, from level ``least``, and from now on all at once."""
        held, self._held = self._held or [], None
        for record in held:
            if record.levelno >= least:
                self._say(record)

    def _say(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line not in self._said:
            self._said.add(line)
            print(line, file=sys.stderr, flush=True)


@contextmanager
def notices(*, quiet: bool) -> Iterator[Notices]:
    """The log of ``clframe.data`` goes to the terminal for the time of a verb; ``quiet`` lets warnings pass only."""
    logger, handler = logging.getLogger("clframe.data"), Notices()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        yield handler
    finally:
        handler.show(least=logging.WARNING)
        logger.removeHandler(handler)
        logger.setLevel(level)
