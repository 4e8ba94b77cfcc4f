"""Progress bars: tqdm with one set of options, hidden where the output is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from clframe.printable import printable

_hidden = 0  # depth of hide_progress, which may be nested


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
    return not _hidden and sys.stderr is not None and sys.stderr.isatty()


def progress_bar(label: str, *, total: int | None = None, unit: str = "it", **options: Any) -> Any:
    """Return a tqdm bar; it disappears when it is closed. ``options`` are further ones of tqdm."""
    from tqdm import tqdm

    # None: hidden where the output is not a terminal.
    hidden = True if _hidden else None
    label = printable(label)
    return tqdm(desc=label, total=total, unit=unit, disable=hidden, leave=False, dynamic_ncols=True, **options)


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
