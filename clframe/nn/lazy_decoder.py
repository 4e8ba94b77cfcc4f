"""State of a decoder with exits while it reads and writes one text, computed block by block on demand.

A token that stops at an exit leaves the keys and values of later blocks open. They are computed when a later token
needs them, for all open positions in one pass (recomputed, not copied from the exit): the state is that of a model
that computes every block for every token, and only the choice of the early tokens differs.

On CUDA a pass over a single position is recorded as a CUDA graph when it comes for the third time, since launching the
kernels of a small step one by one takes several times as long as running them.

Shape suffixes: T positions, C capacity, D width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor, nn

from clframe.errors import DataError, UnsupportedError, reason_of
from clframe.nn.backbones.decoder import DecoderBlock, TokenEmbedding
from clframe.nn.backbones.key_value_cache import KeyValueCache
from clframe.nn.exit_ensemble import Single
from clframe.nn.graphs import CudaGraphs, Graphs
from clframe.nn.network import Network

_log = logging.getLogger(__name__)

WARM: Final = 2
"""Passes of a kind before it is recorded: libraries allocate memory and choose algorithms in them."""
LEAST: Final = 8
"""Positions that must be left for a recording, which takes about as long as two passes."""


class LazyDecoder:
    """State of a decoder while it reads and writes one text; stages compute a position when they are asked for it.

    Weights must stay those of the beginning.

    Args:
        network: A network with the backbone ``decoder``, in evaluation mode.
        capacity: Largest number of tokens; None: the context.
        graphs: Records passes over single positions; None: nothing is recorded.

    Attributes:
        positions: Positions that each stage has computed.
        passes: Calls of each stage.
        attended: Pairs of a computed position and a position to which it may attend or that its pass masks, by stage.
        classified: Positions whose logits each exit has computed.

    Raises:
        UnsupportedError: Another backbone, or exits whose scores depend on those of other exits.
    """

    def __init__(self, network: Network, *, capacity: int | None = None, graphs: Graphs | None = None) -> None:
        first, *rest = network.backbone.stages
        self._blocks = [list(stage) if isinstance(stage, nn.Sequential) else [stage] for stage in rest]
        known = all(isinstance(parts[0], DecoderBlock) for parts in self._blocks)
        if not isinstance(first, TokenEmbedding) or not known:
            raise UnsupportedError("generate: found a network that is not a decoder; use backbone=decoder")
        joined = network.boosted or not isinstance(network.ensemble, Single)
        if joined or any(head.cascades for head in network.heads):
            raise UnsupportedError("generate: found exits that use the scores of others; use single exits, no cascade")
        self.network, self._graphs = network, graphs
        self._stage_of = network.exit_stages
        stages = 1 + len(rest)
        self.positions, self.passes, self.attended = [0] * stages, [0] * stages, [0] * stages
        self.classified = [0] * len(network.heads)
        self._embed, self._context = first.table, network.input_shape[0] - 1
        self._capacity = self._context if capacity is None else min(capacity, self._context)
        weight = self._embed.weight
        self._lengths = [0] * stages
        self._states = [weight.new_zeros(self._capacity, network.backbone.features) for _ in range(stages)]
        self._caches = [KeyValueCache(self._capacity) for _ in rest]
        self._position_1 = torch.zeros(1, dtype=torch.long, device=weight.device)
        self._recorded: dict[tuple[int, int], tuple[Callable[[], None], Tensor]] = {}
        self._seen: Counter[tuple[int, int]] = Counter()

    def __len__(self) -> int:
        return self._lengths[0]

    def append(self, ids: Sequence[int]) -> None:
        """Add tokens at the end.

        Raises:
            DataError: More tokens than the context, whose positions the model has not learned, or than the capacity.
        """
        length, most = len(self) + len(ids), self._capacity
        if length > most:
            kind = "context" if most == self._context else "capacity"
            raise DataError(f"generate: found {length} tokens for a {kind} of {most}; give fewer")
        new_TD = self._embed(torch.tensor(ids, dtype=torch.long, device=self._embed.weight.device))
        self._states[0][len(self) : length] = new_TD
        self._count(0, len(ids))

    def truncate(self, length: int) -> None:
        """Remove all positions from ``length`` on."""
        self._lengths = [min(each, length) for each in self._lengths]

    def compute(self, stage: int) -> None:
        """Compute the open positions of a stage, from 1, and of those before it, each in one pass."""
        for number in range(1, stage + 1):
            first = self._lengths[number]
            last = self._lengths[number - 1]
            if first < last:
                positions_T = torch.arange(first, last, device=self._position_1.device)
                self._extend(number, positions_T, last)
                self._count(number, last - first)

    def logits(self, exit: int, first: int) -> Tensor:
        """Return logits_TV of an exit for the positions from ``first`` on; its stage and those before it catch up.

        Those of a recorded pass are overwritten by the next one of the same exit.
        """
        self.classified[exit] += len(self) - first
        start = self._first_of_single_step(exit, first)
        if start is not None and self._graphs is not None:
            recorded = self._recorded.get((start, exit)) or self._record(start, exit)
            if recorded is not None:
                replay, logits_1V = recorded
                self._position_1.fill_(first)
                replay()
                for stage in range(start, self._stage_of[exit] + 1):
                    self._count(stage, 1)
                return logits_1V
        self.compute(self._stage_of[exit])
        return self._classify(exit, self._states[self._stage_of[exit]][first : len(self)])

    def _classify(self, exit: int, tap_TD: Tensor) -> Tensor:
        stage, tap_1TD = self._stage_of[exit], tap_TD[None]
        for part in self._blocks[stage - 1][1:] if stage else ():  # the normalization of the last stage
            tap_1TD = part(tap_1TD)
        return self.network.classify(exit, tap_1TD, None)

    def _extend(self, stage: int, positions_T: Tensor, length: int) -> None:
        """Compute positions of a stage, which attend to the first ``length`` ones."""
        block = self._blocks[stage - 1][0]
        assert isinstance(block, DecoderBlock)
        open_1TD = self._states[stage - 1].index_select(0, positions_T)[None]
        out_1TD = block.extend(open_1TD, self._caches[stage - 1], positions_T, length)
        self._states[stage].index_copy_(0, positions_T, out_1TD[0])

    def _count(self, stage: int, new: int) -> None:
        self._lengths[stage] += new
        self.positions[stage] += new
        self.attended[stage] += new * self._lengths[stage]
        self.passes[stage] += 1

    def _first_of_single_step(self, exit: int, first: int) -> int | None:
        """The first stage that must compute the last position for an exit; None if another position or none is open."""
        stages = range(1, self._stage_of[exit] + 1)
        start = next((stage for stage in stages if self._lengths[stage] < len(self)), None)
        alone = first == len(self) - 1 and all(self._lengths[stage] >= first for stage in stages)
        return start if alone else None

    def _record(self, start: int, exit: int) -> tuple[Callable[[], None], Tensor] | None:
        """Record the pass of a single position from a stage to an exit; None before its time, or if it cannot be."""
        key = start, exit
        self._seen[key] += 1
        if self._graphs is None or self._seen[key] <= WARM or self._capacity - len(self) < LEAST:
            return None
        found: list[Tensor] = []

        def work() -> None:
            for stage in range(start, self._stage_of[exit] + 1):
                self._extend(stage, self._position_1, self._capacity)
            tap_1D = self._states[self._stage_of[exit]].index_select(0, self._position_1)
            found.append(self._classify(exit, tap_1D))

        try:
            self._recorded[key] = self._graphs.record(work), found[0]
        except RuntimeError as error:
            _log.warning("generate: CUDA graphs are not used, as the network cannot be recorded (%s)",
                         reason_of(error, most=160))  # fmt: skip
            self._graphs = None
            return None
        return self._recorded[key]


def graphs_for(network: Network) -> Graphs | None:
    """Return what records the passes of a network: CUDA graphs; None on another device or under autocast."""
    device = next(network.parameters()).device
    if device.type != "cuda" or torch.is_autocast_enabled("cuda"):  # whose casts of weights would be recorded
        return None
    return CudaGraphs(device)
