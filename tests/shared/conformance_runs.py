"""Streams and networks of the conformance suites, which test every component there is; most are those of clframe.testing."""

from __future__ import annotations

from clframe.core import COMPONENTS, compose, parse
from clframe.testing import same, small_network, small_stream, with_memory

__all__ = ["NAMES", "NEEDS_TOKENS", "benchmark", "fed", "same", "untrained"]

NAMES = COMPONENTS.names()
NEEDS_TOKENS = {"l2p", "lora", "moe"}
"""Components that refuse a small MLP, or an exit on the first layer of two."""

benchmark = small_stream


def fed(strategy):
    """The strategy, with `er` added if a component needs a memory and none has one."""
    return with_memory(_composed(strategy))


def untrained(strategy, stream, *, exits=1, seed=3):
    """The network as it is before the strategy: a small MLP, or a transformer where a component needs tokens."""
    needs_tokens = bool({component.name for component in _composed(strategy)} & NEEDS_TOKENS)
    return small_network(stream, exits=exits, transformer=needs_tokens, seed=seed)


def _composed(strategy):
    return parse(strategy) if isinstance(strategy, str) else compose(strategy)
