"""Progress bars: tqdm with one set of options, hidden where the output is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def progress_bar(label: str, *, total: int | None = None, unit: str = "it") -> Any:
    """Return a tqdm bar; it disappears when it is closed."""
    from tqdm import tqdm

    return tqdm(desc=label, total=total, unit=unit, disable=None, leave=False, dynamic_ncols=True)


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
