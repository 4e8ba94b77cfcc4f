"""What experts cost in MACs, by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Macs:
    """MACs of a token.

    Attributes:
        expert: Of one expert.
        experts: How many there are.
        router: Of the router.
    """

    expert: int
    experts: int
    router: int

    @property
    def dense(self) -> int:
        """Of all experts, without a router: of the dense network."""
        return self.expert * self.experts

    @property
    def router_share(self) -> float:
        """The router's part of the dense network's."""
        return self.router / self.dense


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one layer did while it was counted.

    Attributes:
        tokens: How many it saw.
        ran_E: How often each expert ran.
        macs: Of one token.
        routed: For how many of them the router was asked.
        computed: How many (token, expert) pairs were computed, those that the gate had left out among them: all where
            that is faster, and neighbors of those that run where experts are too small to be run one by one.
    """

    tokens: int
    ran_E: tuple[int, ...]
    macs: Macs
    routed: int
    computed: int

    @property
    def experts_per_token(self) -> float:
        """Mean number of experts that ran; NaN before any token."""
        return sum(self.ran_E) / self.tokens if self.tokens else float("nan")

    @property
    def router_macs(self) -> int:
        """Of the router."""
        return self.routed * self.macs.router

    @property
    def total_macs(self) -> int:
        """Of all (token, expert) pairs that the gate let run, and of the router: what routing promises."""
        return sum(self.ran_E) * self.macs.expert + self.router_macs

    @property
    def executed_macs(self) -> int:
        """Of all pairs that were computed, and of the router: what was paid."""
        return self.computed * self.macs.expert + self.router_macs

    @property
    def dense_macs(self) -> int:
        """Of the dense network for the same tokens."""
        return self.tokens * self.macs.dense

    @property
    def share(self) -> float:
        """``total_macs`` over the dense network's; NaN before any token."""
        return self.total_macs / self.dense_macs if self.tokens else float("nan")
