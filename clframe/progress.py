"""Progress bars: tqdm with one set of options, hidden where the output is not a terminal.

A process that another one started may send the states of its bars there instead: see :func:`relay_progress`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from clframe.printable import printable

_hidden = 0  # depth of hide_progress, which may be nested
_send: Callable[[BarState | None], None] | None = None
_PERIOD = 0.25  # least seconds between two states of one bar


class BarState(NamedTuple):
    """Content of a bar."""

    label: str
    done: int
    total: int | None
    note: str


@contextmanager
def relay_progress(send: Callable[[BarState | None], None]) -> Iterator[None]:
    """Draw no bars while active; call ``send`` with their states instead, and with None when one is closed.

    >>> states = []
    >>> with relay_progress(states.append):
    ...     bar = progress_bar("epoch", total=2)
    ...     bar.update(2)
    ...     bar.close()
    >>> states
    [BarState(label='epoch', done=2, total=2, note=''), None]
    """
    global _send
    before, _send = _send, send
    try:
        yield
    finally:
        _send = before


@contextmanager
def hide_progress(hidden: bool = True) -> Iterator[None]:
    """Show no bars while active, as ``--quiet`` asks for; ``hidden=False`` changes nothing.

    >>> with hide_progress():
    ...     progress_bar("epoch").disable, is_shown()
    (True, False)
    """
    global _hidden
    _hidden += hidden
    try:
        yield
    finally:
        _hidden -= hidden


def is_shown() -> bool:
    """Whether a bar can be seen; stderr is None in a process without a console."""
    return not _hidden and (_send is not None or (sys.stderr is not None and sys.stderr.isatty()))


def progress_bar(label: str, *, total: int | None = None, unit: str = "it", **options: Any) -> Any:
    """Return a tqdm bar; it disappears when it is closed. ``options`` are further ones of tqdm."""
    if _send is not None and not _hidden:
        return _RelayedBar(_send, printable(label), total=total, initial=options.get("initial", 0))
    from tqdm import tqdm

    # None: hidden where the output is not a terminal.
    hidden = True if _hidden else None
    label = printable(label)
    return tqdm(desc=label, total=total, unit=unit, disable=hidden, leave=False, dynamic_ncols=True, **options)


class _RelayedBar:
    """The part of tqdm's interface that this package uses."""

    disable = False

    def __init__(self, send: Callable[[BarState | None], None], label: str, *, total: int | None, initial: int) -> None:
        self._send, self._label, self._note = send, label, ""
        self.total, self.n = total, initial
        self._sent = -_PERIOD

    def update(self, count: int = 1) -> None:
        self.n += count
        self.refresh()

    def refresh(self) -> None:
        now = time.monotonic()
        if now - self._sent >= _PERIOD:
            self._sent = now
            self._send(BarState(self._label, self.n, self.total, self._note))

    def set_description_str(self, label: str, refresh: bool = True) -> None:
        self._label = printable(label)
        if refresh:
            self.refresh()

    def set_postfix_str(self, note: str, refresh: bool = True) -> None:
        self._note = note
        if refresh:
            self.refresh()

    def close(self) -> None:
        self._send(None)

    def __enter__(self) -> _RelayedBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def progress_bars(*, unit: str = "it") -> Iterator[Callable[[str, int, int | None], None]]:
    """Yield ``show(step, done, total)``, which draws one bar per step; a new step closes the bar before it."""
    bars: dict[str, Any] = {}

    def show(step: str, done: int, total: int | None) -> None:
        if step not in bars:
            for bar in bars.values():
                bar.close()
            bars[step] = progress_bar(step, total=total, unit=unit)
        bar = bars[step]
        bar.total = total
        bar.update(done - bar.n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()
