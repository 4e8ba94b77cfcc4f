"""Fills the ledger while a session runs: a table of costs times counts of steps.

Each kind of step (so many samples, so many parts that learn) is measured once an experience, by
:mod:`clframe.training.step_cost`; after that a step adds one to a count. What components do before the first and
after the last epoch of an experience runs under the counter as it happens. What a prediction costs is noted after each
evaluation, by :mod:`clframe.training.prediction_watch`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.clock import Clock

from clframe.accounting import PHASES, Ledger, MacCounter, count_parameters, module_bytes, process_peak_bytes
from clframe.accounting.timing import synchronize
from clframe.nn.moe import Usage, counting
from clframe.training.checkpoint import nbytes
from clframe.training.learner import Learner
from clframe.training.prediction_watch import PredictionWatch
from clframe.training.step_cost import Charges, answer_charges, declared, state_sizes, step_charges

if TYPE_CHECKING:
    from clframe.training.strategy import LightningStrategy

Kind = tuple[int, int]
"""What learns (a number for each set of parts, and of exits whose losses weigh), and the samples of the batch."""


class CostWatch(SupervisedPlugin):
    """Counts what a session's strategy does.

    Args:
        learner: Whose steps are counted.
        ledger: Where costs go.
        on_step: Called after every step.
    """

    supports_distributed = True

    def __init__(self, learner: Learner, ledger: Ledger, *, on_step: Callable[[Any], None]) -> None:
        super().__init__()
        self.ledger = ledger
        self.seconds = 0.0
        """Time spent on measuring steps, which is no training."""
        self._learner, self._on_step = learner, on_step
        learner.around = self.around
        self._predictions = PredictionWatch(learner)
        self._index: int | None = None
        self._between = 0.0
        self._counting = ExitStack()
        self._usage: Callable[[], dict[str, Usage]] = dict
        self._experts_ran = 0
        self._evaluated: Counter[tuple[str, int]] = Counter()
        self._per_sample: dict[int, Charges] = {}
        self._table: dict[Kind, tuple[Charges, dict[str, int]]] = {}
        self._steps: Counter[Kind] = Counter()
        self._sets: dict[Any, int] = {}
        self._learning = self._new = self._updates = self._before_epoch = 0
        self._mixed = False

    # --- the session ------------------------------------------------------------------------------

    def begin(self, index: int) -> None:
        """An experience starts; components prepare."""
        self._book_evaluations()  # of the untrained network
        self._index = index
        self._reset()

    def book(self) -> None:
        """Write the costs of a finished experience to the ledger."""
        self._book_steps()
        self._book_evaluations()
        self._book_sizes()
        assert self._index is not None
        start = time.perf_counter()
        self._predictions.note(self.ledger.predictions, self._index)
        self.ledger.add_time("accounting", seconds=time.perf_counter() - start, experience=self._index)

    @contextmanager
    def around(self, hook: str, component: str) -> Iterator[None]:
        """Count and time what a component does at ``prepare`` or ``advance``; see :class:`Learner`."""
        device = self._learner.network.final.weight.device
        synchronize(device)
        start = time.perf_counter()
        with MacCounter() as counter:
            yield
        synchronize(device)
        self._between += time.perf_counter() - start
        if counter.macs:
            phase: Any = next(c.phase for c in self._learner.composition if c.name == component)
            self.ledger.add(phase, macs=counter.macs, experience=self._index, component=component)
        self.ledger.add_uncounted(counter.uncounted())

    def on_step(self, strategy: LightningStrategy) -> None:
        """After a training step: one more of its kind."""
        kind = self._learning, len(strategy.batch.y)
        if kind not in self._steps:
            start = time.perf_counter()
            self._table[kind] = step_charges(strategy)
            self.seconds += time.perf_counter() - start
        self._steps[kind] += 1
        self._on_step(strategy)

    # --- Avalanche's callbacks, none of them inside a step ----------------------------------------

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """What learns is settled now, and what the epoch runs over."""
        network, weight_K = self._learner.network, self._learner._weight_K
        weights = () if weight_K is None else tuple((weight_K != 0).tolist())  # how much they weigh costs nothing
        learning = (tuple(p.requires_grad for p in network.parameters()), weights)
        self._learning = self._sets.setdefault(learning, len(self._sets))
        new = len(strategy.adapted_dataset)
        if strategy.limit_batches is not None:
            new = min(new, strategy.limit_batches * strategy.train_mb_size)
            self._mixed = strategy._pool_owner is not None  # nobody knows how many of the first ones are new
        self._new += new
        self._before_epoch = sum(self._steps.values())

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """What the epoch came to in updates."""
        batches = sum(self._steps.values()) - self._before_epoch
        self._updates += -(-batches // strategy.accumulate)
        self.ledger.add_uncounted({f"plugin {name}": batches for name in _foreign(strategy)})

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Samples are counted anew, and the experts that run."""
        self._predictions.begin(strategy)
        self._counting.close()  # of an evaluation that broke off
        self._usage = self._counting.enter_context(counting(self._learner.network))

    def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Where the samples of a batch stop."""
        self._predictions.count(strategy)

    def after_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        """One experience has been evaluated: samples times what one of them costs."""
        samples = len(strategy.experience.dataset)
        if strategy.limit_batches is not None:
            samples = min(samples, strategy.limit_batches * strategy.eval_mb_size)
        size = count_parameters(self._learner.network)
        if size not in self._per_sample:
            self._per_sample[size], gaps = answer_charges(self._learner, strategy.mb_x[:1])
            self.ledger.add_uncounted(gaps)
        for (_, component), macs in self._per_sample[size].items():
            self._evaluated[component, macs] += samples

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Experts cost what they really computed."""
        self._experts_ran += sum(layer.executed_macs for layer in self._usage().values())
        self._counting.close()

    # --- books ------------------------------------------------------------------------------------

    def _reset(self) -> None:
        self._table, self._steps, self._sets, self._per_sample = {}, Counter(), {}, {}
        self._mixed, self._between = False, 0.0
        self._learning = self._new = self._updates = self._before_epoch = 0

    def _book_steps(self) -> None:
        totals: Charges = {}
        for kind, count in self._steps.items():
            charges, gaps = self._table[kind]
            for place, macs in charges.items():
                totals[place] = totals.get(place, 0) + macs * count
            self.ledger.add_uncounted({name: calls * count for name, calls in gaps.items()})
        rows = sum(size * count for (_, size), count in self._steps.items())
        old = self._replayed(rows)
        for direction in ("forward", "backward"):  # both are proportional to samples
            part = totals.get((direction, ""), 0) * old // max(rows, 1)
            if part:
                totals[direction, ""] -= part
                totals["replay", ""] = totals.get(("replay", ""), 0) + part
        totals.setdefault(("forward", ""), 0)
        if old:
            totals.setdefault(("replay", ""), 0)
        seen = {("forward", ""): rows - old, ("replay", ""): old}
        for (phase, component), macs in totals.items():
            self.ledger.add(
                phase,  # type: ignore[arg-type]  # charges have phases of the ledger
                macs=macs,
                experience=self._index,
                component=component,
                samples=seen.get((phase, component), 0),
                steps=self._updates if (phase, component) == ("forward", "") else 0,
            )

    def _replayed(self, rows: int) -> int:
        """Samples that came from a memory; none where a component serves a choice of old and new ones."""
        return 0 if self._mixed else max(0, rows - self._new)

    def _book_evaluations(self) -> None:
        samples, totals = 0, Counter[str]()
        for (component, macs), count in self._evaluated.items():
            totals[component] += macs * count
            samples += count if component == "" else 0
        if samples:
            totals[""] += self._experts_ran
        self._experts_ran = 0
        self._evaluated.clear()
        for component, macs in totals.items():
            self.ledger.add(
                "evaluation", macs=macs, experience=self._index, component=component,
                samples=0 if component else samples,
            )  # fmt: skip

    def _book_sizes(self) -> None:
        learner, ledger, index = self._learner, self.ledger, self._index
        ledger.add_bytes("parameters", bytes=module_bytes(learner.network), experience=index)
        for component in learner.composition:
            state = learner.state[component.name]
            for kind, count in state_sizes(component, state, nbytes(state)).items():
                ledger.add_bytes(kind, bytes=count, component=component.name, experience=index)
        for (component_name, key), count in declared(learner).items():
            if key != "macs" and key not in PHASES:
                ledger.add_figure(key, value=count, component=component_name, experience=index)
        if self._between:
            ledger.add_time("components", seconds=self._between, experience=index)
        peak = process_peak_bytes()
        if peak is not None:
            ledger.add_bytes("process_peak", bytes=peak, experience=index)


def _foreign(strategy: LightningStrategy) -> set[str]:
    """Avalanche's plugins that act inside a step, whose own passes nobody counts."""
    acting = {call.__self__ for calls in strategy._calls.values() for call in calls if hasattr(call, "__self__")}
    return {type(plugin).__name__ for plugin in acting if not isinstance(plugin, (Clock, EvaluationPlugin))}
