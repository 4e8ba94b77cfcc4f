"""Signals that stop a verb that trains."""

from __future__ import annotations

import signal
import threading
from typing import Any


class StopSignals:
    """Turns SIGTERM, SIGHUP and SIGUSR1 into a KeyboardInterrupt, so that they stop a run as cleanly as Ctrl-C.

    While it trains, a run handles them itself and saves first; see :mod:`clframe.training.stopping`.

    Signals that are ignored, as under nohup, stay ignored.
    """

    def __init__(self) -> None:
        self.received: int = signal.SIGINT
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python sets handlers in the main thread only
        for name in ("SIGTERM", "SIGHUP", "SIGUSR1"):  # Windows has only the first
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                self._previous[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        self.received = number
        raise KeyboardInterrupt
