"""Notes what a prediction costs after each training experience: its parts, who stops where, products by role."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.clock import Clock
from torch import Tensor

from clframe.accounting import (
    PHASES,
    Ledger,
    MacCounter,
    Predictions,
    count_parameters,
    module_bytes,
    process_peak_bytes,
)
from clframe.accounting.measurement import synchronize
from clframe.data.benchmark import Benchmark
from clframe.exits import ExitPolicy
from clframe.moe import Usage, counting
from clframe.moe.products import products_of
from clframe.training.checkpoint import nbytes
from clframe.training.learner import Learner
from clframe.training.prediction_cost import policy_of, prediction_cost, stops_B
from clframe.training.step_cost import Charges, answer_charges, declared, state_sizes, step_charges

if TYPE_CHECKING:
    from clframe.training.strategy import LightningStrategy


PROBES = 64
"""Samples on which products are looked at, spread over all test experiences: the same through a run."""


class PredictionWatch:
    """Counts at which exit the samples of an evaluation stop, and what a prediction costs.

    Args:
        learner: The model and who decides.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._benchmark: Benchmark | None = None
        self._policy: ExitPolicy | None = None
        self._stopped: dict[tuple[str, int], Tensor] = {}
        self._begun: set[str] = set()

    def begin(self, strategy: Any) -> None:
        """An evaluation starts, of one stream or more."""
        self._benchmark = strategy.benchmark
        self._policy = policy_of(self._learner)
        self._begun.clear()

    def count(self, strategy: Any) -> None:
        """Count one batch; nothing waits for the device."""
        stream, index = strategy.experience.origin_stream.name, int(strategy.experience.current_experience)
        if stream not in self._begun:
            self._begun.add(stream)
            self._stopped = {key: count_K for key, count_K in self._stopped.items() if key[0] != stream}
        scores = strategy.answers.logits
        exits, size = len(scores), len(scores[-1])
        if self._policy is None or not scores[-1].shape[1]:
            count_K = torch.tensor([0] * (exits - 1) + [size])
        else:
            stop_B = stops_B(scores, self._policy)
            count_K = (stop_B[:, None] == torch.arange(exits, device=stop_B.device)).sum(0)
        known_K = self._stopped.get((stream, index))
        self._stopped[stream, index] = count_K if known_K is None else known_K + count_K

    def note(self, predictions: Predictions, index: int) -> None:
        """Add what a prediction costs after training experience ``index``, whose evaluation has been counted."""
        benchmark = self._benchmark
        if benchmark is None:  # an evaluation on data of somebody else's
            return
        network = self._learner.network
        x = _probe(benchmark)
        x = network.place(x)
        cost = prediction_cost(self._learner, x[:1])
        for part in cost.parts:
            predictions.add_part(
                part.name, kind=part.kind, macs=part.macs, component=part.component, experience=index
            )
        stream = "test" if benchmark.evaluate == "test" else "valid"
        for (name, of), count_K in sorted(self._stopped.items()):
            if name == stream and of <= index:
                predictions.add_stops(
                    names=network.exit_names, cost_K=cost.cost_K, count_K=count_K.tolist(), of=of, experience=index
                )
        looked = products_of(network, x)
        for row in looked.products:
            predictions.add_products(
                row.role, macs=row.macs, effective_macs=row.effective_macs, samples=row.samples, experience=index
            )
        for experts in looked.experts:
            predictions.add_experts(replace(experts, experience=index))


def _probe(benchmark: Benchmark) -> Tensor:
    """The first test samples of as many experiences as there are probes, equally many of each."""
    parts = [samples for samples in benchmark.evaluation if len(samples)][:PROBES]
    each = -(-PROBES // len(parts))
    found = []
    for samples in parts:
        index = torch.arange(min(each, len(samples))) * len(samples) // min(each, len(samples))  # not one class alone
        found.append(samples.prepare(samples.raw(index)))
    return torch.cat(found)[:PROBES]


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
