"""Dynamic inference that skips computation: samples that have stopped are removed from the batch.

Shape suffixes: B batch, n samples still in the batch, r rows of it, C classes, K exits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from clframe.errors import ConfigError, UnknownNameError, unknown_name
from clframe.exits.active_samples import ActiveSamples, PredictionBuffer
from clframe.exits.decisions import Prediction
from clframe.exits.ensembles import RunningEnsemble
from clframe.exits.policies import ExitPolicy
from clframe.nn.backbones.stages import tap_of
from clframe.nn.exit_ensemble import Ensemble, Single
from clframe.nn.frozen import evaluating
from clframe.nn.network import Network
from clframe.options import format_value

BREAK_EVEN = 0.02
"""Share of a batch whose computation up to the next exit takes as long as copying the batch, rounded up."""

AdjustLogits = Callable[[int, Tensor, Mapping[str, Tensor]], Tensor]
"""``(exit, logits_nC, taps) -> logits_nC``: correction of one exit's logits; ``taps`` has the exit's own tap."""


class DynamicNetwork(nn.Module):
    """Run a network stage by stage and stop each sample at the exit that the policy selects.

    The network is shared, not copied, and runs in evaluation mode without gradients. Exits that cannot fire are not
    computed unless another one needs their logits (a cascade, boosting, an ensemble, the fallback ``confident``);
    with thresholds above 1 the bare backbone runs. Predictions equal those of :func:`~clframe.exits.select` on the
    scores of all exits.

    The host synchronizes with the device once at every exit whose threshold can fire, and nowhere else.

    Args:
        network: The network to run.
        policy: The exit policy.
        compact: Smallest share of the batch that must have stopped since samples were last removed before stopped
            samples are removed again; until then they stay in the batch with their predictions unchanged. 0 removes
            them always, a value above 1 never. The default is a break-even as measured by
            :func:`~clframe.exits.break_even.measure_break_even`.
        exits: Indices or names of the exits that may stop a sample before the last, all if not given.
        adjust: Correction of each exit's logits before its ensemble and confidence, such as bias correction or
            nearest class means; None for none.

    Raises:
        ConfigError: Thresholds, exits or ``compact`` that do not fit the network.

    >>> from clframe.nn import GrowingLinear
    >>> from clframe.nn.backbones import mlp
    >>> network = Network(mlp((4,), width=8), exits=[("layer1", GrowingLinear(8))])
    >>> network.grow([0, 1, 2])
    True
    >>> scores_BC, exit_B = DynamicNetwork(network, ExitPolicy(thresholds=0.0))(torch.zeros(2, 4))
    >>> scores_BC.shape, exit_B
    (torch.Size([2, 3]), tensor([0, 0]))
    """

    def __init__(
        self,
        network: Network,
        policy: ExitPolicy,
        *,
        compact: float = BREAK_EVEN,
        exits: Sequence[int | str] | None = None,
        adjust: AdjustLogits | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(network, Network) or not isinstance(policy, ExitPolicy):
            wrong, kind = (policy, "ExitPolicy") if isinstance(network, Network) else (network, "Network")
            raise ConfigError(f"dynamic: found a {type(wrong).__name__}; give the {kind}")
        share: Any = compact
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not share >= 0:
            raise ConfigError(f"dynamic: found compact={compact}; give a share of 0 or more")
        if adjust is not None and not callable(adjust):
            raise ConfigError(f"dynamic: found adjust={adjust}; give a function of exit, logits and taps")
        if exits is not None and (isinstance(exits, str) or not isinstance(exits, Collection)):
            raise ConfigError(f"dynamic: found exits {format_value(exits)}; give a list of indices or names")
        self.network = network
        self.policy = policy
        self.compact = compact
        self.adjust = adjust
        self.measure = policy.measure  # registered, so that a fitted measure moves between devices with this module
        count, names = len(network.heads), network.exit_names
        self.enabled = None if exits is None else frozenset(_exit_index(exit, names) for exit in exits)
        policy.of_exits(count)
        self._cache_key: tuple[object, ...] | None = None
        self._cached_stops: tuple[tuple[Stop, ...], ...] = ()

    @property
    def confidence_exits(self) -> tuple[int, ...]:
        """Indices of the exits whose confidence is needed."""
        return self.policy.confidence_exits(len(self.network.heads), among=self.enabled)

    @property
    def answering_exits(self) -> tuple[int, ...]:
        """Indices of the exits that may give a sample's prediction because of their confidence."""
        return self.policy.answering_exits(len(self.network.heads), among=self.enabled)

    @property
    def stopping_exits(self) -> tuple[int, ...]:
        """Indices of the exits that may stop a sample; the host synchronizes once at each."""
        thresholds = self.policy.of_exits(len(self.network.heads))
        return tuple(exit for exit in self.answering_exits if exit < len(thresholds) and thresholds[exit] <= 1)

    @property
    def computed_exits(self) -> tuple[int, ...]:
        """Indices of the exits whose logits are computed for the samples that reach them."""
        network, last = self.network, len(self.network.heads) - 1
        needed: set[int] = set()
        for exit in sorted({*self.confidence_exits, last}):
            earlier = network.boosted or _uses_earlier(network.ensemble.inner, exit)
            needed.update(range(exit + 1) if earlier else (exit,))
        for exit in range(last, 0, -1):
            if exit in needed and network.heads[exit].cascades:
                needed.add(exit - 1)
        return tuple(sorted(needed))

    def forward(self, x: Tensor) -> Prediction:
        """Scores and exit of each sample of ``x``, in the order of the input."""
        with torch.no_grad():
            if not self.network.training:
                return self._run(x)
            with evaluating(self.network):
                return self._run(x)

    def _run(self, x: Tensor) -> Prediction:
        rows, predictions = ActiveSamples(x), PredictionBuffer()
        for stage, stops in zip(self.network.backbone.stages, self.stops(), strict=True):
            rows.value = stage(rows.value)
            for stop in stops:
                if self._visit(stop, rows, predictions):
                    return predictions.finish(rows)
        return predictions.finish(rows)

    def _visit(self, stop: Stop, rows: ActiveSamples, predictions: PredictionBuffer) -> bool:
        """Classify at one exit and remove samples that stop; True if all have stopped."""
        scores_nC, fires_n = self.classify(stop, rows)
        if fires_n is None:
            return False
        done_n = fires_n if rows.done_n is None else rows.done_n | fires_n
        keep_r = done_n.logical_not().nonzero()  # synchronizes: the number of rows must be known on the host
        remaining, size = len(keep_r), len(done_n)
        if remaining == size and size:
            return False
        if self.policy.fallback != "confident":
            rows.take(stop.exit, scores_nC, fires_n)
        rows.done_n = done_n
        if remaining and size - remaining >= self.compact * size:
            predictions.write(rows)
            rows.keep(keep_r.squeeze(1))
        return not remaining

    def classify(self, stop: Stop, rows: ActiveSamples) -> tuple[Tensor, Tensor | None]:
        """Classify at one exit: its scores_nC, and whether it fires, None where it cannot stop a sample.

        Never synchronizes. Where an exit fires and the fallback is ``last``, the caller sets the scores of samples that
        stop (:meth:`ActiveSamples.take`): only it knows whether there are some.
        """
        network, confident = self.network, self.policy.fallback == "confident"
        tap = tap_of(rows.value)
        logits_nC = network.classify(stop.exit, tap, rows.previous_nC)
        rows.previous_nC = logits_nC if stop.chained else None
        if self.adjust is not None:
            logits_nC = self.adjust(stop.exit, logits_nC, {stop.tap: tap})
        scores_nC, rows.ensembled = network.ensemble.step(stop.exit, logits_nC, rows.ensembled)
        if not stop.has_confidence:
            if stop.last:
                rows.take(stop.exit, scores_nC, None)
            return scores_nC, None
        confidence_n, rows.measured = self.measure(stop.exit, scores_nC, rows.measured)
        fires_n = None if stop.threshold is None else confidence_n >= stop.threshold
        if confident and stop.answers:
            rows.take(stop.exit, scores_nC, rows.update_best(confidence_n, fires_n))
        return scores_nC, fires_n

    def stops(self) -> tuple[tuple[Stop, ...], ...]:
        """For each stage, the exits to visit after it; cached until the network's exits or ensemble change."""
        network = self.network
        key = (network.heads, network.ensemble, network.boosted)  # modules compare by identity
        if key != self._cache_key:
            self._cache_key, self._cached_stops = key, tuple(map(self._stops_at, network.exits_at))
        return self._cached_stops

    def _stops_at(self, exits: Sequence[int]) -> tuple[Stop, ...]:
        heads, boosted = self.network.heads, self.network.boosted
        thresholds, last = self.policy.of_exits(len(heads)), len(heads) - 1
        return tuple(
            Stop(
                exit=exit,
                tap=self.network.exit_taps[exit],
                last=exit == last,
                has_confidence=exit in self.confidence_exits,
                answers=exit in self.answering_exits,
                threshold=thresholds[exit] if exit in self.stopping_exits else None,
                chained=exit < last and bool(boosted or heads[exit + 1].cascades),
            )
            for exit in exits
            if exit in self.computed_exits
        )


@dataclass(frozen=True)
class Stop:
    """Operations at one exit."""

    exit: int
    tap: str
    last: bool
    has_confidence: bool
    """Whether its confidence is needed."""
    answers: bool
    """Whether its confidence may make it the exit of a sample."""
    threshold: float | None
    """Confidence from which the exit fires; None where it cannot."""
    chained: bool
    """Whether the next exit uses its logits."""


def _uses_earlier(ensemble: Ensemble, exit: int) -> bool:
    """Whether the scores of an exit depend on earlier exits."""
    if isinstance(ensemble, RunningEnsemble):
        return exit < ensemble.members
    return not isinstance(ensemble, Single)


def _exit_index(exit: Any, names: Sequence[str]) -> int:
    """Index of an exit given by index or name."""
    if not isinstance(exit, (str, Integral)) or isinstance(exit, bool):
        raise ConfigError(f"dynamic: found exit {format_value(exit)}; give its index or name")
    if isinstance(exit, Integral):
        index = int(exit)  # of numpy
        if 0 <= index < len(names):
            return index
        raise ConfigError(f"dynamic: found exit {exit}; give 0 to {len(names) - 1}")
    if exit not in names:
        raise UnknownNameError(unknown_name("exit", exit, names))
    return names.index(exit)
