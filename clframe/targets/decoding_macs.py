"""MACs of generated text, from the positions that stages and exits have computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from clframe.accounting import MacCounter
from clframe.nn.frozen import evaluating
from clframe.nn.generation import Generation
from clframe.nn.lazy_decoder import LazyDecoder
from clframe.nn.network import Network


class DecodingMacs:
    """MACs of generation by a network without experts, whose MACs do not depend on the tokens.

    Stage ``s`` takes ``a_s`` for a position and ``b_s`` for each position that it reads in attention, an exit ``h_e``
    for the logits of a position: ``sum_s (a_s positions_s + b_s attended_s) + sum_e h_e classified_e``. The numbers are
    counted on two tokens, with the present adapters. Work of CUDA graphs, which no counter sees, is included.

    Args:
        network: A decoder.
    """

    def __init__(self, network: Network) -> None:
        passes: list[list[int]] = []
        with evaluating(network):
            state = LazyDecoder(network, capacity=2)
            for _ in range(min(2, network.input_shape[0] - 1)):
                state.append([0])
                passes.append([_count(partial(state.compute, stage)) for stage in range(1, len(state.positions))])
            logits = partial(state.logits, first=len(state) - 1)
            self._logits = [_count(partial(logits, exit)) for exit in range(len(network.heads))]
        # In a context of one token every position reads one.
        self._attention = [more - less for less, more in zip(passes[0], passes[-1], strict=True)]
        self._position = [less - each for less, each in zip(passes[0], self._attention, strict=True)]

    def of(self, found: Generation) -> int:
        """Return the MACs of a generation, the prompt included."""
        macs = (*self._position, *self._attention, *self._logits)
        counts = (*found.positions[1:], *found.attended[1:], *found.classified)
        return sum(each * count for each, count in zip(macs, counts, strict=True))


def _count(call: Callable[[], object]) -> int:
    with MacCounter() as counter:
        call()
    return counter.macs
