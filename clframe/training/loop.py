"""The training step: one loop body, and the contracts of what runs it.

Three levels, each with one contract:

* :class:`Driver`: the epochs of a fit in a Lightning Trainer, called by the hooks of a ``ContinualModule``.
* :class:`TrainingStep`: the parts of one step. :func:`run_step` calls them in Avalanche's order, whichever loop runs
  it: Avalanche's loop on Fabric, Avalanche's loop inside a Trainer, or a plain Trainer.
* :class:`~clframe.avalanche_bridge.fabric.Engine`: backward pass and update, on Fabric or in a Trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from clframe.avalanche_bridge.fabric import Engine
from clframe.errors import UnsupportedError
from clframe.functional.language import next_token_targets
from clframe.nn.network import Network
from clframe.nn.types import Output
from clframe.training.compiled import CompiledStages
from clframe.training.divergence import DivergenceGuard, UpdateFilter, gradient_norm
from clframe.training.epochs import EpochMetrics
from clframe.training.learner import Learner
from clframe.training.step_plugins import StepPlugins


class Driver(Protocol):
    """The epochs of one fit, as the hooks of a ``ContinualModule`` call them."""

    def configure(self) -> Any:
        """Return the optimizer of this fit, as ``configure_optimizers`` does."""

    def before_epoch(self, epoch: int) -> None:
        """Prepare epoch ``epoch``."""

    def stop_requested(self) -> bool:
        """Whether the rest of the epoch is to be skipped."""

    def train_on(self, batch: Any) -> None:
        """Train on one batch."""

    def after_batch(self) -> None:
        """Finish a batch: everything that observes it has been called."""

    def after_epoch(self) -> None:
        """Finish an epoch."""


class TrainingStep(Protocol):
    """The parts of one training step."""

    def call_plugins(self, event: str) -> None:
        """Call the plugins that act at ``event``."""

    def clear_gradients(self) -> None:
        """Zero the gradients at the first batch of an update."""

    def compute_output(self) -> None:
        """Run the model on the current batch."""

    def add_loss(self) -> None:
        """Add the combined loss terms of the current batch."""

    def backward(self) -> None:
        """Run the backward pass, then the owner of the slot ``gradient``."""

    def optimizer_step(self) -> None:
        """Clip and update, if an update is due."""


def run_step(step: TrainingStep) -> None:
    """Train on the current batch, in the order of Avalanche's ``SGDUpdate.training_epoch``."""
    step.call_plugins("before_training_iteration")
    step.clear_gradients()
    step.call_plugins("before_forward")
    step.compute_output()
    step.call_plugins("after_forward")
    step.add_loss()
    step.call_plugins("before_backward")
    step.backward()
    step.call_plugins("after_backward")
    step.call_plugins("before_update")
    step.optimizer_step()
    step.call_plugins("after_update")
    step.call_plugins("after_training_iteration")


def update(learner: Learner, engine: Engine, optimizer: Any, guard: DivergenceGuard, *, plugins: bool = False) -> bool:
    """Update the weights and the states of components; returns False where the update was skipped.

    Args:
        learner: The learner.
        engine: Makes the update, unless its scaler finds gradients that are not finite.
        optimizer: Of the weights.
        guard: Its filter, if it has one, skips updates that are not finite.
        plugins: Whether a plugin may have changed the gradients.
    """
    filter = guard.filter
    if filter is not None and not filter.admit(
        learner, engine, optimizer, changed=plugins or learner.changes_gradients
    ):
        return False
    made = engine.step()
    if filter is None:
        guard.count_update(learner, made=made)
    if made:
        learner.after_step()
    return made


def _check_dtype(x: Tensor, network: Network) -> None:
    """Raise UnsupportedError for inputs in another floating-point type than the weights."""
    dtype = network.final.weight.dtype
    if x.is_floating_point() and x.dtype != dtype:
        raise UnsupportedError(
            f"LightningStrategy: found a network with weights of {dtype} for inputs of {x.dtype}; convert it, as by "
            f"network.to({x.dtype}), or pass a Fabric with the precision of the weights, such as '64-true'"
        )


class StrategyStep:
    """Mixin: the training step, forward and loss of an Avalanche strategy with a ``ContinualModule`` or another module.

    The step of a ``ContinualModule`` is that of its learner; of another module it is Avalanche's.
    """

    # Declared for readers; LightningStrategy and Avalanche's template provide them.
    learner: Learner | None
    engine: Any
    fabric: Any
    optimizer: Any
    experience: Any
    clock: Any
    dataloader: Any
    device: torch.device
    mbatch: Any
    mb_x: Tensor
    mb_y: Tensor
    mb_output: Any
    loss: Tensor
    retain_graph: bool
    is_training: bool
    accumulate: int
    channels_last: bool
    step_capture: Any
    stages: CompiledStages | None
    batch: Any
    output: Output | None
    adjusted: Output | None
    on_step: Callable[[Any], None] | None
    step_plugins: StepPlugins
    begin_average: Callable[[], None]
    average_gradients: Callable[[], None]
    note_batch: Callable[[], None]
    run_shared: Callable[..., Output]
    sharing: Callable[[], AbstractContextManager[object]]
    in_precision: Callable[[Callable[[], Any]], Any]
    refresh_engine: Callable[[], None]
    _criterion: Callable[..., Any]
    _filter: UpdateFilter | None
    _guard: DivergenceGuard | None
    _is_last_batch: Callable[[], bool]
    _kwargs: dict[str, Any]
    _make_empty_loss: Callable[[], Tensor]
    _metrics: EpochMetrics | None
    _own_loader: Any
    _gradient_norm: float | Tensor | None
    _step_in_update: int
    _unpack_minibatch: Callable[[], None]

    def train_on(self, batch: Any) -> None:
        """Take one training step on ``batch``."""
        self.mbatch = batch
        self._unpack_minibatch()
        if self.learner is not None:
            x, y, loader = self.mbatch[0], self.mbatch[1], self._own_loader
            stored = None
            if loader is not None and self.dataloader is loader:
                stored = partial(loader.stored, int(self.clock.train_epoch_iterations), len(y))
            self.batch = joined = self.learner.make_batch(x, y, stored=stored)
            joined.x = self.convert_input(joined.x)
            if self.learner.step_counts()[0] == 0:
                _check_dtype(joined.x, self.learner.network)
            self.use_batch()
            self.note_batch()
        if self.step_capture is None:
            run_step(self)
        else:
            self.step_capture.take_step()
        filter = self._filter
        if self._metrics is not None and (filter is None or filter.loss_is_finite):
            self._metrics.add_loss(self.loss)
        if self.on_step is not None:
            self.on_step(self)

    def run_step(self) -> None:
        """Take the step kernel by kernel."""
        run_step(self)

    def use_batch(self) -> None:
        """Make :attr:`batch` the one that Avalanche's properties show."""
        self.mbatch[0], self.mbatch[1] = self.batch.x, self.batch.y

    def compute_update(self) -> None:
        """Run the part of a step that a CUDA graph can hold: from the network to the update."""
        self.compute_output()
        self.add_loss()
        self.backward()
        self.engine.step()

    def finish_update(self, norm: Tensor | None) -> None:
        """Do what follows the work of :meth:`compute_update` in a step.

        Args:
            norm: Norm of the gradient before it was clipped; None without clipping.
        """
        assert self.learner is not None
        self.learner.after_step()
        self._step_in_update, self._gradient_norm = 0, norm

    def call_plugins(self, event: str) -> None:
        """Call the plugins that act at ``event``."""
        for call in self.step_plugins.calls[event]:
            call(self, **self._kwargs)

    def clear_gradients(self) -> None:
        """Zero the gradients at the first batch of an update."""
        if self._step_in_update == 0:
            self.optimizer.zero_grad()
        if self._filter is not None:
            assert self.learner is not None
            self._filter.before_batch(self.learner, first=self._step_in_update == 0)
        if self.learner is None or self.step_plugins.touch_loss:
            self.loss = self._make_empty_loss()

    def compute_output(self) -> None:
        """Compute every exit's logits; Avalanche's plugins get the last exit's."""
        self.mb_output = self.forward()

    def add_loss(self) -> None:
        """Add the components' terms, or the criterion of a foreign module."""
        loss = self.criterion()
        if self.learner is None or self.step_plugins.touch_loss:
            self.loss += loss
        else:  # the same number without a sum in the graph
            self.loss = loss if loss.ndim else loss.reshape(1)

    def backward(self) -> None:
        """Run the backward pass, then the owner of the slot ``gradient``."""
        loss = self.loss if self.accumulate == 1 else self.loss / self.accumulate
        if self.learner is None:
            self.engine.backward(loss, retain_graph=self.retain_graph)
            return
        averages = self._filter is not None or self.learner.changes_gradients or self._is_update_due()
        if averages:
            self.begin_average()
        with self.learner.observer.around("backward", samples=len(self.mb_y)), self.sharing():
            self.engine.backward(loss, retain_graph=self.retain_graph)
        if averages:
            self.average_gradients()
        if self._filter is None or self._filter.check_batch(self.learner, self.loss, self.optimizer):
            self.learner.modify_gradients()
            if self.learner.changes_gradients:  # by sums that a GPU may round differently in each process
                self.average_gradients()

    def optimizer_step(self) -> None:
        """Update once ``accumulate`` batches, or the last ones of the epoch, have been added up."""
        due = self._is_update_due()
        self._step_in_update += 1
        if due:
            self.refresh_engine()
            self._step_in_update = 0
            if self.learner is None:
                self.engine.step()
                return
            plugins = self.step_plugins.touch_gradients
            assert self._guard is not None
            updated = update(self.learner, self.engine, self.optimizer, self._guard, plugins=plugins)
            self._gradient_norm = self.engine.norm if updated else math.nan
            if self.accumulate > 1 and self._gradient_norm is None:
                # By the next log entry the gradients may already be those of another update.
                self._gradient_norm = gradient_norm(self.optimizer)

    def _is_update_due(self) -> bool:
        """Whether the current batch is the last one before an update."""
        return self.accumulate == 1 or self._step_in_update + 1 == self.accumulate or self._is_last_batch()

    def gradient_norm(self) -> float | None:
        """Return the norm of the gradient of the last update; synchronizes with the device.

        The total L2 norm over all parameters that the optimizer updates, in the scale of the loss: after the owner of
        the slot ``gradient`` has changed the gradient and before it is clipped; under accumulation, of the mean over
        the batches of the update. NaN where that update was skipped; None before the first one of an experience.
        """
        if self._gradient_norm is None and self.accumulate == 1:
            self._gradient_norm = gradient_norm(self.optimizer)
        if self._gradient_norm is not None:
            self._gradient_norm = float(self._gradient_norm)
        return self._gradient_norm

    # --- forward and loss -------------------------------------------------------------------------

    def forward(self, **kwargs: Any) -> Any:
        """Return the logits that Avalanche reads; ``output`` holds those of all exits."""
        if self.learner is None:
            return super().forward(**kwargs)  # type: ignore[misc]
        if self.is_training:
            with self.learner.observer.around("forward", "", len(self.mb_x)):
                self.output = output = self.run_shared(self.mb_x, parts=self.batch.parts)
            return output.last
        self.output = output = self.run_shared(self.mb_x)
        self.adjusted = self.learner.adjust_logits(output)
        scores = self.learner.predict(self.adjusted)
        # Before the first experience no class has a column, but Avalanche's metrics take an arg-max.
        return scores if scores.shape[1] else scores.new_full((len(scores), 1), float("-inf"))

    def run_network(self, network: Callable[..., Output], x: Tensor, *, parts: tuple[int, ...] = ()) -> Output:
        """Return the output of ``network`` with the taps that components ask for, in the strategy's precision."""
        assert self.learner is not None
        taps = self.learner.taps
        output: Output = self.in_precision(lambda: network(x, taps=taps, parts=parts, stages=self.stages))
        if taps and output.last.dtype != self.learner.network.final.weight.dtype:
            # Fabric converts outputs to single precision, but components run taps through layers of the network.
            place = self.learner.network.to_device
            return output._replace(taps={name: place(tap) for name, tap in output.taps.items()})
        return output

    def criterion(self) -> Tensor:
        """Return the combined loss terms in training; in evaluation the criterion on known classes."""
        if self.learner is None:
            loss: Tensor = super().criterion()  # type: ignore[misc]
            return loss
        if self.is_training:
            assert self.output is not None
            with self.engine.autocast():
                return self.learner.loss(self.batch, self.output)
        known = self.mb_output.shape[1]
        if self.learner.network.vocabulary:
            return self._criterion(self.mb_output, next_token_targets(self.mb_x))  # type: ignore[no-any-return]
        if max(self.experience.classes_in_this_experience) < known:
            return self._criterion(self.mb_output, self.mb_y)  # type: ignore[no-any-return]
        # The loss on a class without a column is undefined.
        return torch.full((), float("nan"), device=self.device)

    def convert_input(self, x: Any) -> Any:
        """Return inputs in the dtype, and images in the memory format, of the weights."""
        x = super().convert_input(x)  # type: ignore[misc]
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.ndim == 4 else x
