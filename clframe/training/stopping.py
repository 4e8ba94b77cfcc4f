"""Signals that end a run: a training step is finished and saved first."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Final

SIGNALS: Final = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
"""Handled signals. SLURM sends SIGTERM at its time limit, and what ``sbatch --signal`` names before it."""


class DeferredSignals:
    """Defers the signals that end a run to the end of a training step, in a ``with`` block.

    While :attr:`deferring`, a signal sets :attr:`requested`; the loop then saves and calls :meth:`stop`. Otherwise, and
    on a second SIGINT, it acts immediately: the handler that was installed before is called, or KeyboardInterrupt is
    raised where that is the system's default. Ignored signals, as under nohup, stay ignored.

    Attributes:
        deferring: Whether the loop will ask soon.
        requested: Number of the signal that has been received; None so far.
    """

    def __init__(self) -> None:
        self.deferring = False
        self.requested: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> DeferredSignals:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python sets handlers in the main thread only
        for name in SIGNALS:
            number = getattr(signal, name, None)  # Windows has two of them
            if number is None or signal.getsignal(number) in (signal.SIG_IGN, None):
                continue
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def stop(self) -> None:
        """End the run as the requested signal would have without being deferred."""
        assert self.requested is not None
        self._act(self.requested, None)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.requested is not None
        self.requested = number
        if not self.deferring or (again and number == signal.SIGINT):
            self._act(number, frame)
        elif not again:
            # Not print: the signal may have come while a buffer of stderr is being written.
            os.write(2, b"\nclframe: finishing this step and saving; press Ctrl-C again to stop immediately\n")

    def _act(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous.get(number)
        if callable(previous):
            previous(number, frame)
        raise KeyboardInterrupt
