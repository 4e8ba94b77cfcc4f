"""Dynamic inference that uses CUDA graphs where they are measured to be faster."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Final

import torch
from torch import Tensor

from clframe.accounting.measurement import time_call
from clframe.exits.captured import REPEATS, CapturedNetwork
from clframe.exits.captured_segments import WARM
from clframe.exits.decisions import Prediction
from clframe.exits.dynamic import DynamicNetwork

_log = logging.getLogger(__name__)

AFTER: Final = 5.0
"""Seconds of plain inference before graphs are tried: about what recording them takes."""


class MeasuredNetwork:
    """Dynamic inference by a :class:`DynamicNetwork`, and by its graphs once they have been measured to be faster.

    Few batches are not worth a recording. So the plain network runs until it has taken ``after`` seconds; then graphs
    are recorded for the largest batch so far, both are timed in turns on the next batch of at least half its size, and
    the faster one runs from there on. Batches that are larger than that run on the plain network, and are measured in
    the same way once they have taken ``after`` seconds. Predictions are those of the plain network.

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
        self._largest = self._measured = 0
        self._make = make or (lambda dynamic, batch: CapturedNetwork(dynamic, batch=batch))
        self._chosen: Callable[[Tensor], Prediction] | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Prediction:
        """Scores and exit of each sample of ``x``, in the order of the input."""
        self._largest = max(self._largest, len(x))
        if self._largest > self._measured and self._spent >= self._after and 2 * len(x) >= self._largest:
            self._chosen = self._choose(x)
            self._measured, self._spent = self._largest, 0.0
        if self._chosen is not None and len(x) <= self._measured:
            return self._chosen(x)
        found: tuple[Prediction, float] = time_call(partial(self.dynamic, x), x.device)
        self._spent += found[1]
        return found[0]

    def _choose(self, x: Tensor) -> Callable[[Tensor], Prediction]:
        self._chosen = None  # frees the memory of smaller graphs
        graphs = self._make(self.dynamic, self._largest)
        removals = graphs.choose_removals(x)
        for _ in range(WARM + 1):
            graphs(x)
        if graphs.failure:
            return self.dynamic  # the log has the reason
        runners = (self.dynamic, graphs)
        turns = [[time_call(partial(runner, x), x.device)[1] for runner in runners] for _ in range(REPEATS)]
        plain, own = (1e3 * median(times) for times in zip(*turns, strict=True))
        names = ", ".join(self.dynamic.network.exit_names[exit] for exit in removals) or "no exit"
        self.note = (
            f"CUDA graphs: {own:.2f} ms for {len(x)} inputs, {plain:.2f} without; stopped inputs removed after {names}"
            if own < plain
            else f"no CUDA graphs: {own:.2f} ms with them for {len(x)} inputs, {plain:.2f} without"
        )
        _log.info("dynamic inference: %s", self.note)
        return graphs if own < plain else self.dynamic
