"""What hidden neurons and experts do after each training experience, kept for results.json.

Shape suffixes: E experiences seen so far.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerActivity:
    """The hidden neurons of one layer, measured on the same few samples of each experience every time.

    Shares are rounded to four decimals, finer than a few hundred samples tell.
    """

    neurons: int
    sparsity: float
    """Share of neurons that a token leaves inactive, mean over the experiences so far."""
    sparsity_E: tuple[float, ...]
    """On each experience."""
    overlap_E: tuple[float, ...]
    """Jaccard overlap of the newest experience's active neurons with each one's, all in the network as it is now."""
    kept_E: tuple[float, ...]
    """Jaccard overlap of each experience's active neurons with those when it had just been learnt; NaN where the layer
    was another one then."""

    @property
    def overlap(self) -> float:
        """Mean overlap of the newest experience with the earlier ones; NaN before the second."""
        return _mean(self.overlap_E[:-1])

    @property
    def kept(self) -> float:
        """Mean of ``kept_E`` over the earlier experiences; NaN before the second."""
        return _mean(self.kept_E[:-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertActivity:
    """The experts of one layer, measured on the same samples."""

    experts: int
    per_token: float
    """Experts that run for a token, mean over the experiences so far."""
    per_token_E: tuple[float, ...]
    """On each experience."""
    unused: int
    """Experts that no token of any experience used."""
    macs_share: float
    """What the layer computes, its router included, over the same layer with all experts; mean over experiences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivityRecord:
    """Hidden neurons and experts by layer; both empty for a network that has none."""

    samples_E: tuple[int, ...] = ()
    """Samples of each experience that were looked at."""
    layers: Mapping[str, LayerActivity] = field(default_factory=dict)
    experts: Mapping[str, ExpertActivity] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Mean over layers; NaN where there are none."""
        return _mean([layer.sparsity for layer in self.layers.values()])

    @property
    def experts_per_token(self) -> float:
        """Mean over layers; NaN where there are none."""
        return _mean([layer.per_token for layer in self.experts.values()])

    @property
    def overlap_E(self) -> tuple[float, ...]:
        """Mean over layers of :attr:`LayerActivity.overlap_E`."""
        return tuple(map(_mean, zip(*(layer.overlap_E for layer in self.layers.values()), strict=True)))

    @property
    def kept_E(self) -> tuple[float, ...]:
        """Mean over layers of :attr:`LayerActivity.kept_E`."""
        return tuple(map(_mean, zip(*(layer.kept_E for layer in self.layers.values()), strict=True)))

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> ActivityRecord:
        """The record that ``dataclasses.asdict`` took apart."""
        return cls(
            samples_E=tuple(content["samples_E"]),
            layers={name: LayerActivity(**layer) for name, layer in content["layers"].items()},
            experts={name: ExpertActivity(**layer) for name, layer in content["experts"].items()},
        )


def _mean(values: Sequence[float]) -> float:
    """Of those that are numbers; NaN where none is."""
    found = [value for value in values if not math.isnan(value)]
    return math.fsum(found) / len(found) if found else float("nan")
