"""Training steps as CUDA graphs: one launch in the place of hundreds.

A step of a small network on a GPU is bound by the launches of its kernels. Recorded once and replayed, the same kernels
run without Python in between. A graph holds the network with all exits, every loss term, the backward pass, clipping,
the update, and the running sums of the terms. Loading, augmentation, replay (``make_batch``) and ``after_step`` stay
outside, where they may draw random numbers and decide in Python; that work overlaps with the graph of the step before.

The first steps of each shape run eagerly, which lets cuDNN choose its algorithms; then the step is recorded, without
running it, and replayed from there on. So no step is taken twice. What changes between steps is written to the inputs
of the graph before each replay: the batch, the learning rate, the weight of each exit, and what components return from
``step_values``.
"""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, RMSprop

from clframe.avalanche_bridge.fabric import scaler_of
from clframe.core import Batch, Step
from clframe.errors import UnsupportedError, reason_of
from clframe.nn.graphs import Graphs
from clframe.nn.types import Output
from clframe.training.observer import Section, StepObserver
from clframe.training.step_inputs import StepInputs

_log = logging.getLogger(__name__)

Capture = Literal["auto"] | bool
"""``auto`` records where possible, True refuses a strategy whose steps cannot be recorded, False never records."""

WARM: Final = 3
"""Eager steps of each shape before it is recorded."""
FEWEST: Final = 24
"""Fewest further steps of a shape that are worth recording it."""
AFTER: Final = ("after_update", "after_training_iteration")
"""Events of plugins that follow the recorded work, whose results they find where an eager step leaves them."""
OPTIMIZERS: Final = (SGD, Adam, AdamW, RMSprop)
"""Optimizers whose update never waits for the device."""


@dataclass(frozen=True, eq=False)
class Recording:
    """A recorded step: how to run it, its inputs, and where its results are found afterwards."""

    replay: Callable[[], None]
    batch: Batch
    inputs: StepInputs
    rates: list[tuple[dict[str, Any], Tensor]]
    """Groups of a fused optimizer, with the tensors from which the update reads their learning rates."""
    output: Output
    loss: Tensor
    norm: Tensor | None
    step: Step
    sections: list[tuple[Section, str, int]]
    gradients: list[tuple[Tensor, Tensor]]


class _Sections(StepObserver):
    """Notes the sections of the recorded step, for the observer of its replays."""

    def __init__(self) -> None:
        self.found: list[tuple[Section, str, int]] = []

    def around(self, section: Section, component: str = "", samples: int = 0) -> AbstractContextManager[object]:
        """Note a section."""
        self.found.append((section, component, samples))
        return nullcontext()


class StepCapture:
    """Takes the training steps of a strategy: by a graph where the same step comes often enough, else eagerly.

    Args:
        strategy: A :class:`~clframe.training.strategy.LightningStrategy` with a learner.
        graphs: What records.
        required: Refuse a strategy whose steps cannot be recorded, rather than run them eagerly.

    Attributes:
        recorded: Number of graphs recorded in this experience.
        seconds: Time it took to record them.
    """

    def __init__(self, strategy: Any, *, graphs: Graphs, required: bool = False) -> None:
        self._strategy, self._graphs, self.required = strategy, graphs, required
        self._recordings: dict[Any, Recording] = {}
        self._seen: Counter[Any] = Counter()
        self._structure: Any = None
        self._replayed: Recording | None = None
        self._obstacle = self._failure = ""
        self._reported: set[str] = set()
        self.recorded, self.seconds = 0, 0.0

    def begin_experience(self) -> None:
        """Forget the graphs of the experience before: heads have grown and states have changed."""
        self.forget()
        self.recorded, self.seconds, self._failure = 0, 0.0, ""
        for group in self._strategy.optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True

    def end_experience(self) -> None:
        """Forget the graphs before components consolidate; say where recording was required and did not happen."""
        if self.required and not self.recorded:
            _log.warning(
                "trainer.capture: found true, but no step of the experience was recorded: none of its shapes occurs "
                "%d times; train longer, or set trainer.capture=auto", WARM + FEWEST,
            )  # fmt: skip
        self.forget()

    def begin_epoch(self) -> None:
        """Look for what prevents recording, and forget graphs if what a step computes has changed.

        Raises:
            UnsupportedError: Something prevents it, and recording is required.
        """
        self._obstacle = find_obstacle(self._strategy) or self._failure
        if self._obstacle:
            self._report(self._obstacle)
        structure = _structure(self._strategy)
        if structure != self._structure:
            self.forget()
            self._structure = structure

    @contextmanager
    def epoch(self) -> Iterator[None]:
        """Run an epoch, on the stream of the graphs if steps can be recorded."""
        if self._obstacle:
            yield
            return
        with self._graphs.epoch():
            yield
            self._release_autograd()

    def _release_autograd(self) -> None:
        """Keep the results of the last step without its autograd graph, which belongs to the stream of the graphs."""
        strategy, step = self._strategy, self._strategy.learner.step
        if strategy.output is not None and step is not None:
            strategy.output = _detach(strategy.output)
            strategy.mb_output, strategy.loss = strategy.output.last, strategy.loss.detach()
            strategy.learner.step = replace(step, output=strategy.output)

    def forget(self) -> None:
        """Drop all graphs and free their memory."""
        strategy, held = self._strategy, bool(self._recordings)
        self._recordings, self._replayed, self._structure = {}, None, None
        self._seen.clear()
        strategy.learner.loss_sums.in_place = False
        if held:
            self._graphs.release()

    def take_step(self) -> None:
        """Take one training step on the strategy's batch."""
        strategy = self._strategy
        if self._obstacle:
            strategy.run_step()
            return
        key = _shapes(strategy.batch)
        recording = self._recordings.get(key)
        if recording is None and self._seen[key] >= WARM and self._comes_often():
            recording = self._record_everywhere()
        if recording is not None:
            self._recordings[key] = recording
            self._replay(recording)
            return
        self._seen[key] += 1
        self._replayed = None
        strategy.learner.loss_sums.in_place = True
        strategy.run_step()

    def _comes_often(self) -> bool:
        """Whether enough steps of the present shape are left in this experience: one an epoch, or all but one."""
        strategy = self._strategy
        parts = strategy._parts - strategy._part  # of an online stream
        batches, number = strategy._count_batches(), int(strategy.clock.train_epoch_iterations)
        epochs = int(strategy.train_epochs) * parts - int(strategy.clock.train_exp_epochs)
        left: int = epochs if number + 1 == batches else epochs * (batches - 1) - number
        return left >= FEWEST

    def _record_everywhere(self) -> Recording | None:
        """Record a step in all processes of the run; None in all where one of them cannot record it."""
        recording, group = self._record(), self._strategy.group
        if group is None or group.total(int(recording is None)) == 0:
            return recording
        if recording is not None:
            self.recorded -= 1
            self._failure = self._obstacle = "another process cannot record the step"
            self._report(self._obstacle)
        return None

    def _record(self) -> Recording | None:
        """Record a step; None where it cannot be recorded, which is reported."""
        start = time.perf_counter()
        strategy, learner, optimizer = self._strategy, self._strategy.learner, self._strategy.optimizer
        _drop_results(strategy)  # of the last eager step, whose autograd graph must not be in use
        current, observer = strategy.batch, learner.observer
        batch, device = _clone(current), current.y.device
        inputs = learner.inputs().on(device)
        groups = optimizer.param_groups
        rates = [group["lr"] for group in groups]
        in_tensors = [
            (group, torch.tensor(float(group["lr"]), dtype=torch.float32, device=device))
            for group in groups
            if group.get("fused")
        ]
        before, terms, draws = learner.step_counts(), set(learner.loss_sums.sums), _random_states(learner)
        optimizer.zero_grad()
        try:
            strategy.batch, learner.observer, learner.static_inputs = batch, _Sections(), inputs
            for group, rate in in_tensors:
                group["lr"] = rate
            strategy.use_batch()
            replay = self._graphs.record(strategy.compute_update)
            sections = learner.observer.found
            output = _detach(strategy.output)
            recording = Recording(
                replay, batch, inputs, in_tensors, output, strategy.loss.detach(), strategy.engine.norm,
                replace(learner.step, output=output), sections,
                [(p, p.grad) for group in groups for p in group["params"] if p.grad is not None],
            )  # fmt: skip
            if _random_states(learner) != draws:
                raise UnsupportedError("a loss draws random numbers in Python")
            if set(learner.loss_sums.sums) != terms:
                raise UnsupportedError("its loss terms are not those of the steps before it")
            _drop_results(strategy)
        except (RuntimeError, UnsupportedError) as error:
            # What a failed recording has allocated is garbage: neither gradients nor results may refer to it.
            _drop_results(strategy)
            optimizer.zero_grad()
            learner.loss_sums.restrict(terms)
            self._failure = self._obstacle = f"the step cannot be recorded ({reason_of(error, most=160)})"
            self._report(self._obstacle)
            return None
        finally:
            strategy.batch, learner.observer, learner.static_inputs = current, observer, None
            strategy.use_batch()
            learner.set_step_counts(before)
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
        self.recorded += 1
        self.seconds += time.perf_counter() - start
        return recording

    def _replay(self, recording: Recording) -> None:
        """Take a step by a graph: write its inputs, run it, and leave the state as an eager step does."""
        strategy, learner = self._strategy, self._strategy.learner
        batch, static = strategy.batch, recording.batch
        for found, tensor in _tensors(batch, static):
            tensor.copy_(found, non_blocking=True)
        recording.inputs.fill(learner.inputs())
        for group, tensor in recording.rates:
            tensor.fill_(group["lr"])
        recording.replay()
        if self._replayed is not recording:  # another graph, or an eager step, has set other gradients
            for parameter, gradient in recording.gradients:
                parameter.grad = gradient
            self._replayed = recording
        for section in recording.sections:
            with learner.observer.around(*section):
                pass
        static.stored = batch.stored
        strategy.output, strategy.mb_output = recording.output, recording.output.last
        strategy.loss = recording.loss
        learner.count_replayed(recording.step)
        strategy.finish_update(recording.norm)
        for event in AFTER:
            strategy.call_plugins(event)

    def _report(self, obstacle: str) -> None:
        """Say once what prevents recording.

        Raises:
            UnsupportedError: Recording is required.
        """
        if self.required:
            raise UnsupportedError(
                f"trainer.capture: found true, but {obstacle}; set trainer.capture=auto, which runs such steps eagerly"
            )
        if obstacle not in self._reported:
            self._reported.add(obstacle)
            _log.info("steps run one kernel at a time: %s (trainer.capture=false silences this)", obstacle)


def find_obstacle(strategy: Any) -> str:
    """Return what prevents a strategy's steps from being recorded, or an empty text."""
    learner, fabric = strategy.learner, strategy.fabric
    components = [component.name for component in learner.composition if not component.capturable]
    calls = {event: found for event, found in strategy.step_plugins.calls.items() if event not in AFTER}
    acting = sorted({type(call.__self__).__name__ for found in calls.values() for call in found})
    scaled = scaler_of(fabric._precision) is not None
    skips = strategy.module.divergence.filter is not None
    found = {
        "engine trainer calls Lightning's hooks in every step": strategy.engine_name != "fabric",
        "gradients of several batches are accumulated": strategy.accumulate > 1,
        "on_nonfinite: skip looks at every loss and gradient": skips,
        "the loss scaler of 16-mixed decides on the host": scaled,
        f"{type(strategy.optimizer).__name__} may wait for the device": not isinstance(strategy.optimizer, OPTIMIZERS),
        f"plugins act inside every step ({', '.join(acting)})": bool(acting),
        f"{', '.join(components)} cannot be recorded": bool(components),
    }
    return next((reason for reason, prevents in found.items() if prevents), "")


def _structure(strategy: Any) -> Any:
    """Values that decide which operations a step consists of, apart from the shapes of its batch."""
    learner = strategy.learner
    network, weight_K = learner.network, learner.weight_K
    options = [
        # Fused optimizers read the learning rate from a tensor; in others it is a constant of the recorded step.
        {k: v for k, v in group.items() if k not in ("params", "initial_lr") and not (k == "lr" and group.get("fused"))}
        for group in strategy.optimizer.param_groups
    ]
    return (
        id(strategy.optimizer),
        str(options),
        tuple(parameter.requires_grad for parameter in network.parameters()),
        tuple(module.training for module in network.modules()),
        network.gradient,
        None if weight_K is None else tuple((weight_K != 0).tolist()),
    )


def _shapes(batch: Batch) -> Any:
    """Shapes, types and layouts of a batch, and which of its optional values it has."""
    named = {"x": batch.x, "y": batch.y, "weight": batch.weight_B, **batch.extras}
    shapes = [(name, v.shape, v.dtype, v.stride()) for name, v in named.items() if v is not None]
    return tuple(shapes), batch.parts


def _tensors(batch: Batch, static: Batch) -> list[tuple[Tensor, Tensor]]:
    """Tensors of a batch with those of another one of the same shapes."""
    pairs = [(batch.x, static.x), (batch.y, static.y), *((batch.extras[k], v) for k, v in static.extras.items())]
    if batch.weight_B is not None and static.weight_B is not None:
        pairs.append((batch.weight_B, static.weight_B))
    return pairs


def _clone(batch: Batch) -> Batch:
    """Return a copy of the batch's tensors, in the same memory format."""
    weight_B = None if batch.weight_B is None else batch.weight_B.clone()
    extras = {name: value.clone() for name, value in batch.extras.items()}
    return replace(batch, x=batch.x.clone(), y=batch.y.clone(), weight_B=weight_B, extras=extras)


def _detach(output: Output) -> Output:
    """Return the output without its autograd graph, which would keep the recorded one in use."""
    taps = {name: tap.detach() for name, tap in output.taps.items()}
    return output._replace(logits=tuple(logits_BC.detach() for logits_BC in output.logits), taps=taps)


def _random_states(learner: Any) -> list[Any]:
    """States of the generators of the CPU, Python and NumPy and of the components, to notice draws."""
    generators = [torch.default_generator, *learner.generators()]
    drawn = [generator.get_state().numpy().tobytes() for generator in generators]
    return [*drawn, random.getstate(), str(np.random.get_state())]


def _drop_results(strategy: Any) -> None:
    """Drop references to the results of the last step."""
    strategy.learner.step = None
    strategy.output = strategy.adjusted = strategy.mb_output = strategy.loss = None
