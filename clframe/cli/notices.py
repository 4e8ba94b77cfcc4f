"""What is said of the data while a verb is at work."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
