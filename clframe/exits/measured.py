"""Dynamic inference that uses CUDA graphs where they are measured to be faster."""

from __future__ import annotations

import logging
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Final

import torch
from torch import Tensor

from clframe.accounting.measurement import synchronize
from clframe.exits.captured import CapturedNetwork
from clframe.exits.captured_segments import WARM
from clframe.exits.decisions import Prediction
from clframe.exits.dynamic import DynamicNetwork

_log = logging.getLogger(__name__)

AFTER: Final = 5.0
"""Seconds of plain inference before graphs are tried: about what recording them takes."""
REPEATS: Final = 5


class MeasuredNetwork:
    """Dynamic inference by a :class:`DynamicNetwork`, and by its graphs once they have been measured to be faster.

    Few batches are not worth a recording. So the plain network runs until it has taken ``after`` seconds; then graphs
    are recorded for the batch at hand, both are timed on it in turns, and the faster one runs from there on.
    Predictions are those of the plain network.

    Args:
        dynamic: The network and its policy.
        after: Seconds of plain inference before graphs are tried.
        make: Makes the runner for a batch size, :class:`~clframe.exits.captured.CapturedNetwork` if not given.

    Attributes:
        note: What was measured, for people; empty before.
    """

    def __init__(
        self,
        dynamic: DynamicNetwork,
        *,
        after: float = AFTER,
        make: Callable[[DynamicNetwork, int], CapturedNetwork] | None = None,
    ) -> None:
        self.dynamic, self.note = dynamic, ""
        self._after, self._spent = after, 0.0
        self._make = make or (lambda dynamic, batch: CapturedNetwork(dynamic, batch=batch))
        self._chosen: Callable[[Tensor], Prediction] | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Prediction:
        """Scores and exit of each sample of ``x``, in the order of the input."""
        if self._chosen is None and self._spent >= self._after and len(x):
            self._chosen = self._choose(x)
        if self._chosen is not None:
            return self._chosen(x)
        found, seconds = _timed(self.dynamic, x)
        self._spent += seconds
        return found

    def _choose(self, x: Tensor) -> Callable[[Tensor], Prediction]:
        graphs = self._make(self.dynamic, len(x))
        removals = graphs.choose_removals(x)
        for _ in range(WARM + 1):
            graphs(x)
        if graphs.failure:
            return self.dynamic  # the log has the reason
        turns = [(_timed(self.dynamic, x)[1], _timed(graphs, x)[1]) for _ in range(REPEATS)]
        plain, own = (1e3 * median(times) for times in zip(*turns, strict=True))
        names = ", ".join(self.dynamic.network.exit_names[exit] for exit in removals) or "no exit"
        self.note = (
            f"CUDA graphs: {own:.2f} ms for {len(x)} inputs, {plain:.2f} without; stopped inputs removed after {names}"
            if own < plain
            else f"no CUDA graphs: {own:.2f} ms with them for {len(x)} inputs, {plain:.2f} without"
        )
        _log.info("dynamic inference: %s", self.note)
        return graphs if own < plain else self.dynamic


def _timed(call: Callable[[Tensor], Prediction], x: Tensor) -> tuple[Prediction, float]:
    """Predictions, and the seconds until the device has computed them."""
    synchronize(x.device)
    start = perf_counter()
    found = call(x)
    synchronize(x.device)
    return found, perf_counter() - start
