"""MACs of training steps, counted on the steps themselves: the first of each kind runs under the counter.

Two steps are of one kind when the same parameters and exits learn and their batches have the same size; they cost the
same, so every later one only adds 1 to a table. Where a buffer admits samples after every step, what its component
computes from it is also counted for each size of the buffer. Nothing runs twice and nothing of the run changes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import torch
from torch import Tensor

from clframe.accounting import PHASES, MacCounter
from clframe.accounting.measurement import synchronize
from clframe.core import Component, State
from clframe.errors import ConfigError
from clframe.moe import count_usage
from clframe.nn.network import Network
from clframe.process_state import preserve_generators
from clframe.training.learner import Learner
from clframe.training.observer import UNOBSERVED, Section, StepObserver
from clframe.training.prediction_cost import every_expert

Charges = dict[tuple[str, str], int]
"""MACs by phase and component."""

Kind = tuple[int, str, str, int]
"""Kind of a section: what learns (a number for each combination, and for each size of a buffer that admits samples
after every step), the section, its component, the batch size."""

REPLAYED: Final = "replayed"
"""Key of ``extra_cost``: samples of the replay buffer that each step runs through the network, next to its batch."""

_OWN_PHASES: Final = {"forward": "forward", "backward": "backward", "task_loss": "forward"}
"""Phases of sections that belong to the network."""
_STEP: Final = frozenset({"make_batch", "losses", "combine_losses", "modify_gradients", "after_step", *_OWN_PHASES})
_USE_BUFFER: Final = frozenset({"make_batch", "after_step"})
"""Sections whose cost may depend on the size of the buffer; neither is in CUDA graphs."""
_BETWEEN: Final = frozenset({"before_experience", "after_experience"})
_PREDICTION: Final = frozenset({"adjust_logits", "predict"})


class StepProfiler(StepObserver):
    """Counts what a learner runs in one experience; assign it to ``learner.observer``.

    Args:
        learner: The learner to count.

    Attributes:
        between: ``(phase, component, MACs)`` of every ``before_experience`` and ``after_experience``, in order.
        between_seconds: Wall time of these.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._growing = frozenset(component.name for component in growing_buffers(learner))
        self._probe: Callable[[], int] | None = None
        self._probed: Charges = {}
        self._counter: MacCounter | None = None
        self._elsewhere = self._before_share = 0
        self._share_begun = False
        self.reset()

    def reset(self) -> None:
        """Forget everything; called when an experience begins."""
        self._learning = 0
        self._before_epoch = 0
        self._combinations: dict[Any, int] = {}
        self._runs: Counter[Kind] = Counter()
        self._costs: dict[Kind, tuple[str, int, dict[str, int]]] = {}
        self._declared: dict[Kind, dict[tuple[str, str], int]] = {}
        self._replaying: set[str] = set()
        self.between: list[tuple[str, str, int]] = []
        self.between_seconds = 0.0
        self._between_gaps: Counter[str] = Counter()

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of the experience so far."""
        return {
            "learning": self._learning,
            "before_epoch": self._before_epoch,
            "combinations": dict(self._combinations),
            "runs": dict(self._runs),
            "costs": dict(self._costs),
            "declared": dict(self._declared),
            "replaying": sorted(self._replaying),
            "between": list(self.between),
            "between_seconds": self.between_seconds,
            "between_gaps": dict(self._between_gaps),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._learning, self._before_epoch = state["learning"], state.get("before_epoch", 0)
        self._combinations = dict(state["combinations"])
        self._runs = Counter(state["runs"])
        self._costs, self._declared = dict(state["costs"]), dict(state["declared"])
        self._replaying = set(state["replaying"])
        self.between, self.between_seconds = list(state["between"]), state["between_seconds"]
        self._between_gaps = Counter(state["between_gaps"])

    def before_epoch(self) -> None:
        """Note which parameters learn, which exits have a loss in the epoch that begins, and what was spent before."""
        self._before_epoch = self.spent()
        network, weight_K = self._learner.network, self._learner.weight_K
        # Only zero weights change the cost: an exit without a loss has no backward pass.
        weighed = () if weight_K is None else tuple((weight_K != 0).tolist())
        combination = (tuple(p.requires_grad for p in network.parameters()), weighed)
        self._learning = self._combinations.setdefault(combination, len(self._combinations))

    # --- observing --------------------------------------------------------------------------------

    def around(self, section: Section, component: str = "", samples: int = 0) -> AbstractContextManager[object]:
        """Count a section if it is the first of its kind."""
        if section in _STEP:
            kind = self._combination(section, component), section, component, samples
            self._runs[kind] += 1
            return UNOBSERVED if kind in self._costs else self._count(kind)
        if section in _BETWEEN:
            return self._count_between(component)
        if section in _PREDICTION and self._probe is not None:
            return self._count_prediction(component, self._probe)
        return UNOBSERVED

    def _combination(self, section: Section, component: str) -> int:
        """Return the number of what the cost of a section depends on besides its batch."""
        if section not in _USE_BUFFER or component not in self._growing:
            return self._learning
        found = self._learning, component, stored_samples(self._learner.state[component])
        return self._combinations.setdefault(found, len(self._combinations))

    @contextmanager
    def _count(self, kind: Kind) -> Iterator[None]:
        _, section, component, _ = kind
        if section == "forward":
            self._declared[kind] = found = declared_costs(self._learner)
            self._replaying = {owner for (owner, key), count in found.items() if key == REPLAYED and count}
        self._elsewhere = 0
        with MacCounter(keep_kernels=True) as counter:
            self._counter = counter
            try:
                yield
            finally:
                self._counter = None
        macs = counter.macs + self._elsewhere
        self._costs[kind] = self._phase(section, component), macs, counter.uncounted()

    @contextmanager
    def sharing(self, *, rows: int, of: int) -> Iterator[None]:
        """Add the MACs of the other processes' shares to the section that is counted."""
        counter = self._counter
        self._share_begun, self._before_share = False, 0 if counter is None else counter.macs
        yield
        if counter is not None:
            own = counter.macs - self._before_share
            self._elsewhere += own * of // rows - own  # MACs are proportional to rows

    def begin_share(self) -> None:
        """Leave out what has been counted of the section so far, the first time it is called in :meth:`sharing`."""
        if self._counter is not None and not self._share_begun:
            self._share_begun, self._before_share = True, self._counter.macs

    @contextmanager
    def _count_between(self, component: str) -> Iterator[None]:
        device = self._learner.network.final.weight.device
        synchronize(device)
        start = time.perf_counter()
        with MacCounter(keep_kernels=True) as counter:
            yield
        synchronize(device)
        self.between_seconds += time.perf_counter() - start
        phase = next(c.phase for c in self._learner.composition if c.name == component)
        self.between.append((phase, component, counter.macs))
        self._between_gaps.update(counter.uncounted())

    @contextmanager
    def _count_prediction(self, component: str, macs: Callable[[], int]) -> Iterator[None]:
        before = macs()
        yield
        place = ("evaluation", component)
        self._probed[place] = self._probed.get(place, 0) + macs() - before

    def _phase(self, section: str, component: str) -> str:
        if not component or section in ("forward", "backward"):
            return _OWN_PHASES[section]
        if section == "make_batch" or component in self._replaying:
            return "replay"
        return "teachers" if _networks(self._learner.state[component]) else "auxiliary"

    # --- results ----------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Batches trained on."""
        return sum(count for (_, section, _, _), count in self._runs.items() if section == "forward")

    @property
    def rows(self) -> int:
        """Samples of these batches, new and replayed ones."""
        return sum(count * kind[3] for kind, count in self._runs.items() if kind[1] == "forward")

    def spent(self) -> int:
        """Return the MACs of the experience so far."""
        return sum(self.charges().values()) + sum(macs for _, _, macs in self.between)

    def spent_before_epoch(self) -> int:
        """Return the MACs of the experience before its current epoch."""
        return self._before_epoch

    def charges(self) -> Charges:
        """Return the MACs of all steps, by phase and component, those that components declare included."""
        totals: Charges = {}
        for kind, count in self._runs.items():
            if kind in self._costs:  # an interrupted section has none
                phase, macs, _ = self._costs[kind]
                _charge(totals, (phase, kind[2]), macs * count)
            for (component, key), macs in self._declared.get(kind, {}).items():
                phase = "auxiliary" if key == "macs" else key
                if phase in PHASES:
                    _charge(totals, (phase, component), macs * count)
        return totals

    def replayed(self) -> dict[str, int]:
        """Return the samples that components replayed next to the batches, by component."""
        found: Counter[str] = Counter()
        for kind, declared in self._declared.items():
            for (component, key), count in declared.items():
                if key == REPLAYED:
                    found[component] += count * self._runs[kind]
        return {component: count for component, count in found.items() if count}

    def uncounted(self) -> dict[str, int]:
        """Return the calls of operators that could not be counted, by name."""
        calls = self._between_gaps.copy()
        for kind, (_, _, gaps) in self._costs.items():
            calls.update({name: count * self._runs[kind] for name, count in gaps.items()})
        return dict(calls)

    def prediction_charges(self, x: Tensor) -> tuple[Charges, dict[str, int]]:
        """Predict ``x`` and return its MACs in evaluation and the operators that could not be counted.

        Every exit runs, then what components make of their logits, then the policy. Experts and their routers are left
        out: which of them run depends on the sample.
        """
        learner, self._probed = self._learner, {}
        everyone, used = every_expert(learner.network), count_usage(learner.network)
        try:
            with preserve_generators(), torch.no_grad(), everyone, used as usage, MacCounter() as counter:
                self._probe = lambda: counter.macs
                learner.predict(learner.adjust_logits(learner.network(x, taps=learner.taps)))
        finally:
            self._probe = None
        charges = {place: macs for place, macs in self._probed.items() if macs}
        experts = sum(layer.dense_macs for layer in usage().values())
        charges["evaluation", ""] = counter.macs - experts - sum(charges.values())
        return charges, counter.uncounted()


def declared_costs(learner: Learner) -> dict[tuple[str, str], int]:
    """Return the costs that components declare in ``extra_cost``, by component and key.

    Raises:
        ConfigError: A cost that is not a whole number of at least 0.
    """
    found = {}
    for component in learner.composition.acting_at("extra_cost"):
        for key, count in component.extra_cost(learner.network, learner.state[component.name]).items():
            if not isinstance(count, int) or count < 0:
                raise ConfigError(
                    f"{component.name}: extra_cost() returned {key}={count!r}; return whole numbers of at least 0"
                )
            found[component.name, key] = count
    return found


def growing_buffers(learner: Learner) -> tuple[Component, ...]:
    """Return the components whose replay buffer admits samples after every step."""
    return tuple(component for component in learner.composition.acting_at("after_step") if component.keeps_memory)


def stored_samples(state: State) -> int:
    """Return the number of samples in a replay buffer."""
    return 0 if state["y"] is None else len(state["y"])


def buffer_size(state: State) -> tuple[int, int]:
    """Return the number of samples in a replay buffer and the bytes that grow with it, buffers within it included.

    These are the tensors with a row for each sample; a teacher next to them has the same size however many there are.
    """
    stored = samples = stored_samples(state)
    bytes_of_rows = 0
    for value in state.values():
        if isinstance(value, Mapping) and {"x", "y"} <= value.keys():
            more, rows = buffer_size(value)
            samples, bytes_of_rows = samples + more, bytes_of_rows + rows
        elif isinstance(value, Tensor) and value.ndim and len(value) == stored:
            bytes_of_rows += value.nbytes
    return samples, bytes_of_rows


def state_sizes(component: Component, state: State, total: int) -> dict[str, int]:
    """Return the bytes of a component's state, ``total`` in all, by kind of the ledger."""
    teachers = sum(t.nbytes for network in _networks(state) for t in network.state_dict().values())
    rest = "memory" if component.keeps_memory else "components"
    return {kind: count for kind, count in (("teachers", teachers), (rest, total - teachers)) if count}


def _charge(totals: Charges, place: tuple[str, str], macs: int) -> None:
    if macs:
        totals[place] = totals.get(place, 0) + macs


def _networks(state: Any) -> list[Network]:
    if isinstance(state, Network):
        return [state]
    if isinstance(state, Mapping):
        return [network for part in state.values() for network in _networks(part)]
    if isinstance(state, (list, tuple)):
        return [network for part in state for network in _networks(part)]
    return []
