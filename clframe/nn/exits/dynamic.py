"""Dynamic inference that really skips: finished samples leave the batch, with all that is carried for them.

``static.select`` is the plain reference.

Shape suffixes: B batch, n samples still in it, C classes, K exits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clframe.errors import ConfigError, UnknownNameError, unknown_name
from clframe.nn.backbones.base import tap_of
from clframe.nn.exits.ensemble import Ensemble, Running, Single
from clframe.nn.exits.policies import ExitPolicy
from clframe.nn.exits.rows import Answers, Rows
from clframe.nn.exits.static import Answer
from clframe.nn.network import Network

BREAK_EVEN = 0.02
"""Share of a batch whose work up to the next exit takes as long as copying the whole of it, rounded up."""


class DynamicNetwork(nn.Module):
    """Runs a network's stages one after another and stops, sample by sample, at the exit that answers.

    The network is shared, not copied, and always answers as in evaluation, without gradients. Exits that
    cannot fire are not computed unless another one needs their logits (a cascade, boosting, an ensemble, the
    fallback ``confident``); with thresholds above 1 the bare backbone runs.

    The host waits for the device once at every exit whose threshold can fire, and at no other place.

    Args:
        network: What to run.
        policy: Which exit answers.
        compact: Smallest share of the batch that must have finished since samples last left it before they
            leave again; until then they are carried along and keep their answer. 0 for always, above 1 for
            never. The default is a break-even as measured by
            :func:`~clframe.nn.exits.break_even.measure_break_even`.
        exits: Numbers or names of the exits that may answer before the last, all if not given.

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
    ) -> None:
        super().__init__()
        if not compact >= 0:
            raise ConfigError(f"dynamic: found compact={compact}; give a share of 0 or more")
        self.network = network
        self.policy = policy
        self.compact = compact
        self.measure = policy.measure  # a module, as a gate is, moves between devices with this one
        count, names = len(network.heads), network.exit_names
        self.enabled = None if exits is None else frozenset(_number(exit, names) for exit in exits)
        policy.of_exits(count)
        self._basis: tuple[object, ...] | None = None
        self._made: tuple[tuple[_Stop, ...], ...] = ()

    @property
    def asked(self) -> tuple[int, ...]:
        """Numbers of the exits whose confidence counts."""
        return self.policy.asked(len(self.network.heads), among=self.enabled)

    @property
    def checked(self) -> tuple[int, ...]:
        """Numbers of the exits that may stop a sample; the host waits once at each."""
        thresholds = self.policy.of_exits(len(self.network.heads))
        return tuple(exit for exit in self.asked if exit < len(thresholds) and thresholds[exit] <= 1)

    @property
    def computed(self) -> tuple[int, ...]:
        """Numbers of the exits that classify the samples that get as far."""
        network, last = self.network, len(self.network.heads) - 1
        needed: set[int] = set()
        for exit in sorted({*self.asked, last}):
            needed.update(range(exit + 1) if network.boosted or _remembers(network.ensemble, exit) else (exit,))
        for exit in range(last, 0, -1):
            if exit in needed and network.heads[exit].cascades:
                needed.add(exit - 1)
        return tuple(sorted(needed))

    def forward(self, x: Tensor) -> Answer:
        """Scores and exit of each sample, in the order of the input.

        Args:
            x: Inputs, batch first.
        """
        with torch.no_grad():
            if not self.network.training:
                return self._run(x)
            with _evaluating(self.network):
                return self._run(x)

    def _run(self, x: Tensor) -> Answer:
        rows, answers = Rows(x), Answers()
        for stage, stops in zip(self.network.backbone.stages, self._stops(), strict=True):
            rows.value = stage(rows.value)
            for stop in stops:
                if self._visit(stop, rows, answers):
                    return answers.end(rows)
        return answers.end(rows)

    def _visit(self, stop: _Stop, rows: Rows, answers: Answers) -> bool:
        """Classify at one exit and let samples go; whether all have finished."""
        network, surest = self.network, self.policy.fallback == "confident"
        logits_nC = network.classify(stop.exit, tap_of(rows.value), rows.previous_nC)
        rows.previous_nC = logits_nC if stop.chained else None
        scores_nC, rows.ensembled = network.ensemble.step(stop.exit, logits_nC, rows.ensembled)
        if not stop.asked:
            if stop.last:
                rows.take(stop.exit, scores_nC, None)
            return False
        confidence_n, rows.measured = self.measure(stop.exit, scores_nC, rows.measured)
        fires_n = None if stop.threshold is None else confidence_n >= stop.threshold
        if surest:
            rows.take(stop.exit, scores_nC, rows.surer(confidence_n, fires_n))
        if fires_n is None:
            return False
        done_n = fires_n if rows.done_n is None else rows.done_n | fires_n
        keep_r = done_n.logical_not().nonzero()  # here the host waits, to know how many
        remaining, size = len(keep_r), len(done_n)
        if remaining == size and size:
            return False
        if not surest:
            rows.take(stop.exit, scores_nC, fires_n)
        rows.done_n = done_n
        if remaining and size - remaining >= self.compact * size:
            answers.put(rows)
            rows.keep(keep_r.squeeze(1))
        return not remaining

    def _stops(self) -> tuple[tuple[_Stop, ...], ...]:
        """For each stage, the exits to visit after it; made anew when the network's exits or ensemble change."""
        network = self.network
        basis = (network.heads, network.ensemble, network.boosted)  # compared by identity
        if basis != self._basis:
            self._basis, self._made = basis, tuple(map(self._stops_at, network.exits_at))
        return self._made

    def _stops_at(self, exits: Sequence[int]) -> tuple[_Stop, ...]:
        heads, boosted = self.network.heads, self.network.boosted
        thresholds, last = self.policy.of_exits(len(heads)), len(heads) - 1
        return tuple(
            _Stop(
                exit=exit,
                last=exit == last,
                asked=exit in self.asked,
                threshold=thresholds[exit] if exit in self.checked else None,
                chained=exit < last and bool(boosted or heads[exit + 1].cascades),
            )
            for exit in exits
            if exit in self.computed
        )


@dataclass(frozen=True)
class _Stop:
    """What there is to do at an exit."""

    exit: int
    last: bool
    asked: bool
    """Whether its confidence counts."""
    threshold: float | None
    """From when on it fires; None where it cannot."""
    chained: bool
    """Whether the next exit uses its logits."""


@contextmanager
def _evaluating(network: Network) -> Iterator[None]:
    """Evaluation mode for a while; what was in training mode is again afterwards."""
    learning = [part for part in network.modules() if part.training]
    for part in learning:
        part.training = False
    try:
        yield
    finally:
        for part in learning:
            part.training = True


def _remembers(ensemble: Ensemble, exit: int) -> bool:
    """Whether the scores of an exit depend on the exits before it."""
    if isinstance(ensemble, Running):
        return exit < ensemble.members
    return not isinstance(ensemble, Single)


def _number(exit: int | str, names: Sequence[str]) -> int:
    """Number of an exit given by number or name."""
    if isinstance(exit, int):
        if 0 <= exit < len(names):
            return exit
        raise ConfigError(f"dynamic: found exit {exit}; give 0 to {len(names) - 1}")
    if exit not in names:
        raise UnknownNameError(unknown_name("exit", exit, names))
    return names.index(exit)
