"""Dynamic inference that skips computation: finished samples leave the batch.

Shape suffixes: B batch, C classes, K exits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clframe.errors import ConfigError, UnknownNameError, unknown_name
from clframe.exits.decisions import Answer
from clframe.exits.ensembles import Running
from clframe.exits.policies import ExitPolicy
from clframe.nn.backbones.base import Flow, tap_of
from clframe.nn.network import Carried, Ensemble, Network, Single


@dataclass
class Rows:
    """The samples still in the batch and all that is carried for them, batch first."""

    value: Flow
    """What the last stage returned."""
    index_n: Tensor | None = None
    """Their places in the input; None while all are there."""
    previous_nC: Tensor | None = None
    """Logits of the exit before, where the next one uses them."""
    ensembled: Carried = ()
    measured: Carried = ()
    answer_nC: Tensor | None = None
    """The answers so far: final where done, else the surest yet or not yet of any meaning."""
    exit_n: Tensor | None = None
    best_n: Tensor | None = None
    """Confidence of the surest exit so far, where that counts."""
    done_n: Tensor | None = None
    """Finished samples that have not left yet; None where nobody has finished."""

    def take(self, exit: int, scores_nC: Tensor, takes_n: Tensor | None) -> None:
        """Make the scores the answer of the samples that take them, None for all, if not done already."""
        exit_n = scores_nC.new_full(scores_nC.shape[:1], exit, dtype=torch.long)
        if self.answer_nC is None or self.exit_n is None:
            self.answer_nC, self.exit_n = scores_nC, exit_n
            return
        if self.done_n is not None:
            takes_n = ~self.done_n if takes_n is None else takes_n & ~self.done_n
        if takes_n is None:
            self.answer_nC, self.exit_n = scores_nC, exit_n
            return
        self.answer_nC = torch.where(takes_n.unsqueeze(1), scores_nC, self.answer_nC)
        self.exit_n = torch.where(takes_n, exit_n, self.exit_n)

    def surer(self, confidence_n: Tensor, fires_n: Tensor | None) -> Tensor | None:
        """Where an exit fires or is the surest so far, None for everywhere; from now on it counts as such."""
        if self.best_n is None:
            self.best_n = confidence_n
            return None
        surer_n = confidence_n > self.best_n
        self.best_n = torch.maximum(self.best_n, confidence_n)
        return surer_n if fires_n is None else surer_n | fires_n

    def keep(self, keep_r: Tensor) -> None:
        """Go on with the rows of these numbers only."""
        self.value = rows_of_flow(self.value, keep_r)
        self.index_n = keep_r if self.index_n is None else self.index_n.index_select(0, keep_r)
        self.previous_nC = _optional_rows(self.previous_nC, keep_r)
        self.ensembled = tuple(_rows(carried, keep_r) for carried in self.ensembled)
        self.measured = tuple(_rows(carried, keep_r) for carried in self.measured)
        surest = self.best_n is not None  # otherwise the answers of those that stay have no meaning yet
        self.answer_nC = _optional_rows(self.answer_nC, keep_r) if surest else None
        self.exit_n = _optional_rows(self.exit_n, keep_r) if surest else None
        self.best_n = _optional_rows(self.best_n, keep_r)
        self.done_n = None


class Answers:
    """Answers in the order of the input, put down as samples leave."""

    def __init__(self) -> None:
        self._answer: Answer | None = None

    def put(self, rows: Rows) -> None:
        """Put down the answers of all rows, also those that will be overwritten because they go on."""
        assert rows.answer_nC is not None and rows.exit_n is not None
        if self._answer is None:
            self._answer = Answer(rows.answer_nC.clone(), rows.exit_n.clone())
            return
        assert rows.index_n is not None
        scores_BC, exit_B = self._answer
        dtype = torch.promote_types(scores_BC.dtype, rows.answer_nC.dtype)  # under autocast exits may differ
        scores_BC = scores_BC.to(dtype).index_copy_(0, rows.index_n, rows.answer_nC.to(dtype))
        self._answer = Answer(scores_BC, exit_B.index_copy_(0, rows.index_n, rows.exit_n))

    def end(self, rows: Rows) -> Answer:
        """The answers of the whole batch, now that the last rows have theirs."""
        assert rows.answer_nC is not None and rows.exit_n is not None
        if self._answer is None:
            return Answer(rows.answer_nC, rows.exit_n)
        self.put(rows)
        return self._answer


def rows_of_flow(value: Flow, keep_r: Tensor) -> Flow:
    """The rows of what goes from stage to stage, whatever travels with the tap."""
    return _rows(value, keep_r) if isinstance(value, Tensor) else tuple(_rows(part, keep_r) for part in value)


def _rows(values: Tensor, keep_r: Tensor) -> Tensor:
    """Rows of a tensor in its own memory format; ``index_select`` would give up channels-last, which is slow."""
    if values.dim() == 4 and not values.is_contiguous() and values.is_contiguous(memory_format=torch.channels_last):
        return values.permute(0, 2, 3, 1).index_select(0, keep_r).permute(0, 3, 1, 2)
    return values.index_select(0, keep_r)


def _optional_rows(values: Tensor | None, keep_r: Tensor) -> Tensor | None:
    return None if values is None else _rows(values, keep_r)


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
            :func:`~clframe.exits.break_even.measure_break_even`.
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
