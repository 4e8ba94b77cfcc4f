"""Generation of text by a decoder with exits: greedy, with early exit per token, and self-speculative.

Shape suffixes: T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from clframe.errors import ConfigError
from clframe.nn.exit_ensemble import Carried
from clframe.nn.frozen import evaluating
from clframe.nn.lazy_decoder import LazyDecoder, graphs_for
from clframe.nn.network import Network
from clframe.options import convert_argument, format_value, require_count


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
    attended: tuple[int, ...]
    """Pairs of a position that a stage has computed and one that its pass has read, to which MACs of attention are
    proportional."""
    classified: tuple[int, ...]
    """Positions whose logits each exit has computed."""


class TokenRule(Protocol):
    """The rule by which exits decide the next token, one exit after the other."""

    @property
    def exits(self) -> Sequence[int]:
        """The exits before the last that may decide, in order; others are not computed."""

    def stops(self, exit: int, logits_1V: Tensor, carried: Carried) -> tuple[bool, Carried]:
        """Return whether the exit decides, and the values for the next exit."""

    def decide(self, logits: Sequence[Tensor]) -> int:
        """Return which of the computed exits decides, of ``exits`` and the last one, where none has stopped."""


@dataclass(frozen=True)
class LastExit:
    """The last exit decides every token."""

    exits: Sequence[int] = ()

    def stops(self, exit: int, logits_1V: Tensor, carried: Carried) -> tuple[bool, Carried]:
        """Return False."""
        return False, ()

    def decide(self, logits: Sequence[Tensor]) -> int:
        """Return the last one."""
        return len(logits) - 1


@dataclass(frozen=True)
class Threshold(LastExit):
    """The first exit whose largest probability reaches a threshold decides, otherwise the last one."""

    threshold: float = 1.0

    def stops(self, exit: int, logits_1V: Tensor, carried: Carried) -> tuple[bool, Carried]:
        """Compare the largest probability, in at least single precision."""
        return float(logits_1V.float().softmax(1).amax()) >= self.threshold, ()


def generate(
    network: Network, prompt: Sequence[int], tokens: int, *, threshold: float | None = None,
    rule: TokenRule | None = None, graphs: bool = True,
) -> Generation:  # fmt: skip
    """Generate the most likely next token, one after the other.

    Args:
        network: A network with the backbone ``decoder``.
        prompt: Ids to continue, at least one.
        tokens: Number of ids to generate.
        threshold: Probability of a token from which on an exit decides; None: the last exit decides all.
        rule: Another rule by which exits decide, in the place of a threshold.
        graphs: Whether CUDA graphs may be used on CUDA; tokens are the same up to rounding.

    Raises:
        ConfigError: A threshold outside of [0, 1], no prompt, one that is not ids of the vocabulary, or a number of
            tokens that is not one.
        DataError: More tokens than the context.
        UnsupportedError: See :class:`~clframe.nn.lazy_decoder.LazyDecoder`.
    """
    last = len(network.heads) - 1
    if threshold is not None and not 0 <= convert_argument(threshold, float, where="generate.threshold") <= 1:
        raise ConfigError(f"generate.threshold: found {threshold}; give a probability")
    if threshold is not None and rule is not None:
        raise ConfigError("generate: found a threshold and a rule; give one of them")
    rule = rule or (LastExit() if threshold is None else Threshold(range(last), threshold))
    with evaluating(network):
        state = _read(network, prompt, tokens, graphs)
        ids: list[int] = []
        chosen: list[int] = []
        for number in range(tokens):
            exit, logits_1V = _next_token(state, rule, last)
            ids.append(int(logits_1V.argmax()))
            chosen.append(exit)
            if number < tokens - 1:
                state.append(ids[-1:])
    return _result(state, ids, chosen)


def _next_token(state: LazyDecoder, rule: TokenRule, last: int) -> tuple[int, Tensor]:
    """The exit that decides the token after the last position, and its logits_1V."""
    computed: list[Tensor] = []
    carried: Carried = ()
    exits = [*rule.exits, last]
    for exit in exits:
        computed.append(state.logits(exit, len(state) - 1)[-1:])
        if exit < last:
            stops, carried = rule.stops(exit, computed[-1], carried)
            if stops:
                return exit, computed[-1]
    number = rule.decide(computed)
    return exits[number], computed[number]


def speculate(
    network: Network, prompt: Sequence[int], tokens: int, *, exit: int = 0, draft: int = 4, graphs: bool = True
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
        graphs: See :func:`generate`.

    Raises:
        ConfigError: An exit that is not before the last, or an empty draft.
    """
    last = len(network.heads) - 1
    if not 0 <= exit < last:
        raise ConfigError(f"speculate.exit: found {exit} of {last + 1} exits; give one before the last, from 0")
    require_count(draft, least=1, where="speculate.draft")
    with evaluating(network):
        state = _read(network, prompt, tokens, graphs)
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


def _read(network: Network, prompt: Sequence[int], tokens: int, graphs: bool) -> LazyDecoder:
    require_count(tokens, least=0, where="generate.tokens")
    ids = _whole_numbers(prompt)
    state = LazyDecoder(
        network, capacity=len(ids) + max(tokens, 1) - 1, graphs=graphs_for(network) if graphs else None
    )
    wrong = next((one for one in ids if not 0 <= one < network.vocabulary), None)
    if wrong is not None:
        raise ConfigError(
            f"generate.prompt: found id {wrong}; give ids from 0 to {network.vocabulary - 1}, those of the vocabulary"
        )
    state.append(ids)
    return state


def _whole_numbers(prompt: Any) -> tuple[int, ...]:
    listed = prompt.tolist() if isinstance(prompt, Tensor) else prompt
    try:
        ids: tuple[int, ...] = convert_argument(listed, tuple[int, ...], where="generate.prompt")
    except ConfigError:
        raise ConfigError(f"generate.prompt: found {format_value(listed)}; give the ids of one text") from None
    if not ids:
        raise ConfigError("generate.prompt: found no ids; give at least one")
    return ids


def _result(state: LazyDecoder, ids: Sequence[int], exits: Sequence[int]) -> Generation:
    return Generation(
        ids=tuple(ids), exits=tuple(exits), positions=tuple(state.positions), passes=tuple(state.passes),
        attended=tuple(state.attended), classified=tuple(state.classified),
    )  # fmt: skip
