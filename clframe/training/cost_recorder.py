"""Recorders of a run's costs: the ledger's entries for each experience, and what one prediction costs after it."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clframe.accounting import PHASES, Ledger, Predictions, count_parameters, module_bytes, process_peak_bytes
from clframe.avalanche_bridge.imports import Clock, EvaluationPlugin, SupervisedPlugin
from clframe.data.benchmark import Benchmark
from clframe.exits import ExitPolicy
from clframe.moe import Usage, count_usage
from clframe.moe.products import count_products
from clframe.training.checkpoint import nbytes
from clframe.training.learner import Learner
from clframe.training.prediction_cost import policy_of, prediction_cost, stops_B
from clframe.training.step_cost import REPLAYED, Charges, StepProfiler, declared_costs, state_sizes

PROBES = 64
"""Samples on which products are counted, spread over all test experiences: the same through a run."""


class PredictionRecorder:
    """Counts at which exit the samples of an evaluation stop, and what a prediction costs.

    Args:
        learner: The model and its policy.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._benchmark: Benchmark | None = None
        self._policy: ExitPolicy | None = None
        self._stopped: dict[tuple[str, int], Tensor] = {}
        self._begun: set[str] = set()

    def begin(self, strategy: Any) -> None:
        """Start an evaluation of one or more streams."""
        self._benchmark = strategy.benchmark
        self._policy = policy_of(self._learner)
        self._begun.clear()

    def count(self, strategy: Any) -> None:
        """Count one batch, without synchronizing with the device."""
        stream, index = strategy.experience.origin_stream.name, int(strategy.experience.current_experience)
        if stream not in self._begun:
            self._begun.add(stream)
            self._stopped = {key: count_K for key, count_K in self._stopped.items() if key[0] != stream}
        scores = strategy.adjusted.logits
        exits, size = len(scores), len(scores[-1])
        if self._policy is None or not scores[-1].shape[1]:
            count_K = torch.tensor([0] * (exits - 1) + [size])
        else:
            stop_B = stops_B(scores, self._policy)
            count_K = (stop_B[:, None] == torch.arange(exits, device=stop_B.device)).sum(0)
        known_K = self._stopped.get((stream, index))
        self._stopped[stream, index] = count_K if known_K is None else known_K + count_K

    def record(self, predictions: Predictions, index: int) -> None:
        """Add what a prediction costs after training experience ``index``, whose evaluation has been counted."""
        benchmark = self._benchmark
        if benchmark is None:  # evaluated on an Avalanche stream, whose samples the probe cannot read
            return
        network = self._learner.network
        x = network.to_device(_probe(benchmark))
        cost = prediction_cost(self._learner, x[:1])
        for part in cost.parts:
            predictions.add_part(
                part.name, kind=part.kind, macs=part.macs, component=part.component, experience=index
            )
        stream = "test" if benchmark.evaluate == "test" else "valid"
        seen = [count_K for (name, of), count_K in self._stopped.items() if name == stream and of <= index]
        if seen:
            count_K = torch.stack(seen).sum(0).tolist()
            predictions.add_stops(names=network.exit_names, cost_K=cost.cost_K, count_K=count_K, experience=index)
        found = count_products(network, x)
        for row in found.products:
            predictions.add_products(
                row.role, macs=row.macs, effective_macs=row.effective_macs, samples=row.samples, experience=index
            )
        for experts in found.experts:
            predictions.add_experts(replace(experts, experience=index))


def _probe(benchmark: Benchmark) -> Tensor:
    """Return prepared test samples of as many experiences as there are probes, equally many of each."""
    parts = [samples for samples in benchmark.evaluation if len(samples)][:PROBES]
    each = -(-PROBES // len(parts))
    found = []
    for samples in parts:
        # Evenly spaced, because data sets are often sorted by class.
        index = torch.arange(min(each, len(samples))) * len(samples) // min(each, len(samples))
        found.append(samples.prepare(samples.raw(index)))
    return torch.cat(found)[:PROBES]


class CostRecorder(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]  # Avalanche takes it
    """Writes what training and evaluating a learner cost to a ledger, experience by experience.

    Steps are counted by a :class:`~clframe.training.step_cost.StepProfiler`, which becomes the learner's observer;
    epochs and evaluations are counted in Avalanche's callbacks, none of which is inside a step.

    Args:
        learner: The learner to count.
        ledger: Where costs are written.
    """

    def __init__(self, learner: Learner, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self._learner = learner
        self.profiler = StepProfiler(learner)
        learner.observer = self.profiler
        self._predictions = PredictionRecorder(learner)
        self._index: int | None = None
        self._counting = ExitStack()
        self._usage: Callable[[], dict[str, Usage]] = dict
        self._executed_experts = 0
        self._evaluated: Counter[tuple[str, int]] = Counter()
        self._per_sample: dict[tuple[int, int | None], Charges] = {}
        self._mixed = False
        self._new = self._updates = self._before_epoch = 0

    # --- called by the session --------------------------------------------------------------------

    def begin(self, index: int) -> None:
        """Start an experience, before its components prepare."""
        self._add_evaluations()  # those of the untrained network
        self._index = index
        self._reset()

    def state_dict(self) -> dict[str, Any]:
        """Return what has been counted in the experience so far and is not in the ledger yet."""
        return {
            "profiler": self.profiler.state_dict(),
            "executed_experts": self._executed_experts,
            "evaluated": dict(self._evaluated),
            "per_sample": dict(self._per_sample),
            "mixed": self._mixed,
            "new": self._new,
            "updates": self._updates,
            "before_epoch": self._before_epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`, after :meth:`begin` of the same experience."""
        self.profiler.load_state_dict(state["profiler"])
        self._executed_experts = state["executed_experts"]
        self._evaluated = Counter(state["evaluated"])
        self._per_sample = dict(state["per_sample"])
        self._mixed, self._new = state["mixed"], state["new"]
        self._updates, self._before_epoch = state["updates"], state["before_epoch"]

    def finish(self, *, skipped: int = 0) -> None:
        """Write the costs of a finished and evaluated experience to the ledger.

        Args:
            skipped: Its updates that were due and not made, see ``trainer.on_nonfinite``.
        """
        self._add_steps(skipped)
        self._add_evaluations()
        self._add_sizes()
        assert self._index is not None
        start = time.perf_counter()
        self._predictions.record(self.ledger.predictions, self._index)
        self.ledger.add_time("accounting", seconds=time.perf_counter() - start, experience=self._index)

    # --- Avalanche's callbacks --------------------------------------------------------------------

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Note what learns in this epoch, and how many new samples it has."""
        self.profiler.before_epoch()
        new = len(strategy.adapted_dataset)
        if strategy.drop_last:
            new -= new % getattr(strategy.dataloader, "batch_size", strategy.train_mb_size)
        if strategy.limit_batches is not None:
            new = min(new, strategy.limit_batches * strategy.train_mb_size)
            # Of new and replayed samples in one shuffled set, how many new ones the first batches hold is unknown.
            self._mixed = bool(self._learner.composition.acting_at("training_set"))
        self._new += new
        self._before_epoch = self.profiler.steps

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        """Note the updates of the epoch, and plugins whose passes could not be counted."""
        batches = self.profiler.steps - self._before_epoch
        self._updates += -(-batches // strategy.accumulate)
        calls = itertools.chain.from_iterable(strategy.step_plugins.calls.values())
        plugins = [call.__self__ for call in calls if hasattr(call, "__self__")]
        foreign = {type(p).__name__ for p in plugins if not isinstance(p, (Clock, EvaluationPlugin))}
        self.ledger.add_uncounted({f"plugin {name}": batches for name in foreign})

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Start counting samples by exit, and the experts that run."""
        self._predictions.begin(strategy)
        self._counting.close()  # left open by an evaluation that was interrupted
        self._usage = self._counting.enter_context(count_usage(self._learner.network))

    def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Count the exits at which the samples of a batch stop."""
        self._predictions.count(strategy)

    def after_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Count the samples of an evaluated experience, by the cost of one of them."""
        samples = len(strategy.experience.dataset)
        if strategy.limit_batches is not None:
            samples = min(samples, strategy.limit_batches * strategy.eval_mb_size)
        network = self._learner.network
        domain = None if network.choice is None else network.choice.domain  # its adapter
        key = count_parameters(network), domain
        if key not in self._per_sample:
            self._per_sample[key], gaps = self.profiler.prediction_charges(strategy.mb_x[:1])
            self.ledger.add_uncounted(gaps)
        for (_, component), macs in self._per_sample[key].items():
            self._evaluated[component, macs] += samples

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Add the MACs of the experts that really ran, in every process."""
        executed = sum(layer.executed_macs for layer in self._usage().values())
        self._executed_experts += executed if strategy.group is None else strategy.group.total(executed)
        self._counting.close()

    # --- writing ----------------------------------------------------------------------------------

    def _reset(self) -> None:
        self.profiler.reset()
        self._per_sample = {}
        self._mixed = False
        self._new = self._updates = self._before_epoch = 0

    def _add_steps(self, skipped: int) -> None:
        profiler, ledger = self.profiler, self.ledger
        ledger.add_uncounted(profiler.uncounted())
        for phase, component, macs in profiler.between:
            if macs:
                ledger.add(phase, macs=macs, experience=self._index, component=component)  # type: ignore[arg-type]
        totals, rows = profiler.charges(), profiler.rows
        # New and replayed samples cannot be distinguished if a component mixes them in one set that is then cut off.
        old = 0 if self._mixed else max(0, rows - self._new)
        for direction in ("forward", "backward"):  # both are proportional to samples
            part = totals.get((direction, ""), 0) * old // max(rows, 1)
            if part:
                totals[direction, ""] -= part
                totals["replay", ""] = totals.get(("replay", ""), 0) + part
        totals.setdefault(("forward", ""), 0)
        seen = {("forward", ""): rows - old}
        if old:
            seen["replay", ""] = old
        for component, samples in profiler.replayed().items():
            seen["replay", component] = samples
        for (phase, component), macs in {**dict.fromkeys(seen, 0), **totals}.items():
            ledger.add(
                phase,  # type: ignore[arg-type]  # charges have phases of the ledger
                macs=macs,
                experience=self._index,
                component=component,
                samples=seen.get((phase, component), 0),
                steps=self._updates - skipped if (phase, component) == ("forward", "") else 0,
            )

    def _add_evaluations(self) -> None:
        samples, totals = 0, Counter[str]()
        for (component, macs), count in self._evaluated.items():
            totals[component] += macs * count
            samples += count if component == "" else 0
        if samples:
            totals[""] += self._executed_experts
        self._executed_experts = 0
        self._evaluated.clear()
        for component, macs in totals.items():
            self.ledger.add(
                "evaluation", macs=macs, experience=self._index, component=component,
                samples=0 if component else samples,
            )  # fmt: skip

    def _add_sizes(self) -> None:
        learner, ledger, index = self._learner, self.ledger, self._index
        ledger.add_bytes("parameters", bytes=module_bytes(learner.network), experience=index)
        for component in learner.composition:
            state = learner.state[component.name]
            for kind, count in state_sizes(component, state, nbytes(state)).items():
                ledger.add_bytes(kind, bytes=count, component=component.name, experience=index)
        for (component_name, key), count in declared_costs(learner).items():
            if key not in ("macs", REPLAYED, *PHASES):
                ledger.add_figure(key, value=count, component=component_name, experience=index)
        if self.profiler.between_seconds:
            ledger.add_time("components", seconds=self.profiler.between_seconds, experience=index)
        peak = process_peak_bytes()
        if peak is not None:
            ledger.add_bytes("process_peak", bytes=peak, experience=index)
