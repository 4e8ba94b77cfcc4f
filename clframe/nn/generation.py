"""Generation of text by a decoder with exits: greedy, with early exit per token, and self-speculative.

A token that stops at an exit leaves the keys and values of later blocks open. They are computed when a later token
needs them, for all open positions in one pass (recomputed, not copied from the exit): the state is that of a model
that computes every block for every token, and only the choice of the early tokens differs.

Shape suffixes: T positions, D width, H heads, E width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clframe.errors import ConfigError, DataError, UnsupportedError
from clframe.nn.backbones.decoder import DecoderBlock, KeysValues, TokenEmbedding
from clframe.nn.frozen import evaluating
from clframe.nn.network import Network, Single


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Generated tokens and what they cost."""

    ids: tuple[int, ...]
    """Without the prompt."""
    exits: tuple[int, ...]
    """Exit that chose each token, from 0; of self-speculation the last one, which has confirmed it."""
    positions: tuple[int, ...]
    """Positions that each stage has computed, the prompt included: MACs are proportional to them."""
    passes: tuple[int, ...]
    """Calls of each stage; fewer calls with more positions each take less time."""


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
        self.stage_of = [s for s, exits in enumerate(network.exits_at) for _ in exits]
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
        stage = self.stage_of[exit]
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


def generate(
    network: Network, prompt: Sequence[int], tokens: int, *, threshold: float | None = None
) -> Generation:
    """Generate the most likely next token, one after the other.

    Args:
        network: A network with the backbone ``decoder``.
        prompt: Ids to continue, at least one.
        tokens: Number of ids to generate.
        threshold: Probability of a token from which on an exit decides; None: the last exit decides all.

    Raises:
        ConfigError: A threshold outside of [0, 1], or no prompt.
        DataError: More tokens than the context.
        UnsupportedError: See :class:`LazyDecoder`.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise ConfigError(f"generate.threshold: found {threshold}; give a probability")
    with evaluating(network):
        state = _read(network, prompt)
        last = len(network.heads) - 1
        ids: list[int] = []
        chosen: list[int] = []
        for number in range(tokens):
            for exit in range(last + 1) if threshold is not None else (last,):
                logits_V = state.logits(exit, len(state) - 1)[-1]
                if exit == last or float(logits_V.float().softmax(0).max()) >= float(threshold or 0.0):
                    break
            ids.append(int(logits_V.argmax()))
            chosen.append(exit)
            if number < tokens - 1:
                state.append(ids[-1:])
    return _result(state, ids, chosen)


def speculate(
    network: Network, prompt: Sequence[int], tokens: int, *, exit: int = 0, draft: int = 4
) -> Generation:
    """Generate the tokens of :func:`generate` without a threshold, drafting them at an exit.

    The exit writes up to ``draft`` tokens; the blocks after it then read all of them in one pass, and those tokens that
    the last exit would have chosen, up to the first other one, are kept, followed by its own choice. So the result is
    that of the last exit, up to rounding between passes of different length. Elhoushi et al., "LayerSkip: Enabling
    Early Exit Inference and Self-Speculative Decoding" (2024).

    Args:
        network: See :func:`generate`, as for ``prompt`` and ``tokens``.
        prompt: Ids to continue.
        tokens: Number of ids to generate.
        exit: The exit that drafts, before the last.
        draft: Most tokens of a draft.

    Raises:
        ConfigError: An exit that is not before the last, or an empty draft.
    """
    last = len(network.heads) - 1
    if not 0 <= exit < last:
        raise ConfigError(f"speculate.exit: found {exit} of {last + 1} exits; give one before the last, from 0")
    if draft < 1:
        raise ConfigError(f"speculate.draft: found {draft}; give at least 1 token")
    with evaluating(network):
        state = _read(network, prompt)
        ids: list[int] = []
        while len(ids) < tokens:
            start = len(state)
            guesses: list[int] = []
            for _ in range(min(draft, tokens - len(ids) - 1)):
                guesses.append(int(state.logits(exit, len(state) - 1)[-1].argmax()))
                state.append(guesses[-1:])
            own = state.logits(last, start - 1).argmax(1).tolist()
            agreed = next((n for n, (a, b) in enumerate(zip(guesses, own, strict=False)) if a != b), len(guesses))
            ids += own[: agreed + 1]
            state.truncate(start + agreed)
            if len(ids) < tokens:
                state.append(own[agreed : agreed + 1])
    return _result(state, ids, [last] * len(ids))


def _read(network: Network, prompt: Sequence[int]) -> LazyDecoder:
    if not len(prompt):
        raise ConfigError("generate.prompt: found no ids; give at least one")
    state = LazyDecoder(network)
    state.append(prompt)
    return state


def _result(state: LazyDecoder, ids: Sequence[int], exits: Sequence[int]) -> Generation:
    return Generation(
        ids=tuple(ids), exits=tuple(exits), positions=tuple(state.positions), passes=tuple(state.passes)
    )
