"""State of a decoder with exits while it reads and writes one text, computed block by block on demand.

A token that stops at an exit leaves the keys and values of later blocks open. They are computed when a later token
needs them, for all open positions in one pass (recomputed, not copied from the exit): the state is that of a model
that computes every block for every token, and only the choice of the early tokens differs.

Shape suffixes: T positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clframe.errors import DataError, UnsupportedError
from clframe.nn.backbones.decoder import DecoderBlock, KeysValues, TokenEmbedding
from clframe.nn.network import Network, Single


class LazyDecoder:
    """State of a decoder while it reads and writes one text; stages compute a position when they are asked for it.

    Args:
        network: A network with the backbone ``decoder``, in evaluation mode.

    Raises:
        UnsupportedError: Another backbone, or exits whose scores depend on those of other exits.
    """

    def __init__(self, network: Network) -> None:
        first, *rest = network.backbone.stages
        self._blocks = [list(stage) if isinstance(stage, nn.Sequential) else [stage] for stage in rest]
        known = all(isinstance(parts[0], DecoderBlock) for parts in self._blocks)
        if not isinstance(first, TokenEmbedding) or not known:
            raise UnsupportedError("generate: found a network that is not a decoder; use backbone=decoder")
        joined = network.boosted or not isinstance(network.ensemble, Single)
        if joined or any(head.cascades for head in network.heads):
            raise UnsupportedError("generate: found exits that use the scores of others; use single exits, no cascade")
        self.network = network
        self._stage_of = network.exit_stages
        self.positions, self.passes = [0] * (1 + len(rest)), [0] * (1 + len(rest))
        self._embed = first.table
        nothing = self._embed.weight.new_zeros(0, network.backbone.features)
        self._states: list[Tensor] = [nothing for _ in self.positions]
        self._past: list[KeysValues | None] = [None] * len(rest)

    def __len__(self) -> int:
        return len(self._states[0])

    def append(self, ids: Sequence[int]) -> None:
        """Add tokens at the end.

        Raises:
            DataError: More tokens than the context, whose positions the model has not learned.
        """
        most = self.network.input_shape[0] - 1
        if len(self) + len(ids) > most:
            raise DataError(f"generate: found {len(self) + len(ids)} tokens for a context of {most}; give fewer")
        new_TD = self._embed(torch.tensor(ids, dtype=torch.long, device=self._embed.weight.device))
        self._add(0, new_TD)

    def truncate(self, length: int) -> None:
        """Remove all positions from ``length`` on."""
        self._states = [state[:length] for state in self._states]
        self._past = [None if past is None else (past[0][:, :, :length], past[1][:, :, :length]) for past in self._past]

    def logits(self, exit: int, first: int) -> Tensor:
        """Return logits_TV of an exit for the positions from ``first`` on; its stage and those before it catch up."""
        stage = self._stage_of[exit]
        for number in range(1, stage + 1):
            self._catch_up(number)
        tap_1TD = self._states[stage][None, first:]
        for part in self._blocks[stage - 1][1:] if stage else ():  # the normalization of the last stage
            tap_1TD = part(tap_1TD)
        return self.network.classify(exit, tap_1TD, None)

    def _catch_up(self, stage: int) -> None:
        """Compute the open positions of a stage in one pass."""
        open_1TD = self._states[stage - 1][None, len(self._states[stage]) :]
        if not open_1TD.shape[1]:
            return
        block = self._blocks[stage - 1][0]
        assert isinstance(block, DecoderBlock)
        out_1TD, self._past[stage - 1] = block.extend(open_1TD, self._past[stage - 1])
        self._add(stage, out_1TD[0])

    def _add(self, stage: int, new_TD: Tensor) -> None:
        self._states[stage] = torch.cat([self._states[stage], new_TD])
        self.positions[stage] += len(new_TD)
        self.passes[stage] += 1
