"""The rows of what a prediction costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PartKind = Literal["stage", "head", "ensemble", "policy", "answers"]
"""Of what a part is: a stage of the backbone; the classifier of an exit; what joins the exits; the confidence by which
a sample may stop; what a component does to the answers of all exits."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a prediction, in the order in which they run."""

    name: str
    kind: PartKind
    macs: int
    """Of one sample, all experts run."""
    component: str = ""
    """Whose it is; empty for the backbone and its own classifier."""
    experience: int | None = None


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Samples that go no further than one exit."""

    exit: str
    macs: int
    """Of one sample up to there: stages, heads and policy passed on the way included."""
    samples: int
    of: int | None = None
    """The test experience they are from."""
    experience: int | None = None


@dataclass(frozen=True, kw_only=True)
class Products:
    """Multiply-adds of all layers in one role, over a few real samples."""

    role: str
    macs: int
    effective_macs: int
    """Without products of a zero among the layer's inputs; of experts, those of the pairs that ran."""
    samples: int
    experience: int | None = None


@dataclass(frozen=True, kw_only=True)
class Experts:
    """What one layer of experts did, over a few real samples."""

    layer: str
    experts: int
    samples: int
    tokens: int
    routed: int
    """Tokens that the router was asked for."""
    pairs: int
    """(token, expert) pairs that ran; each is gathered and added back once, which counts no MACs."""
    expert_macs: int
    """Of one pair."""
    router_macs: int
    """Of one token."""
    part: str = ""
    """Name of the part that the layer is in."""
    experience: int | None = None

    @property
    def macs(self) -> int:
        """All that was computed: pairs, and the router."""
        return self.pairs * self.expert_macs + self.routed * self.router_macs

    @property
    def dense_macs(self) -> int:
        """Of the same tokens, with all experts and without a router."""
        return self.tokens * self.experts * self.expert_macs
