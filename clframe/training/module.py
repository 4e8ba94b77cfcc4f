"""The Lightning module: a network and its strategy, trainable by any loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from clframe.avalanche_bridge.fabric import TrainerEngine
from clframe.avalanche_bridge.imports import LightningModule
from clframe.core import Composition, Experience, compose, parse
from clframe.core.component import Component
from clframe.errors import ConfigError, UnsupportedError
from clframe.nn.network import Network
from clframe.nn.types import Output
from clframe.options import convert, convert_argument
from clframe.process_state import RandomStreams
from clframe.training.argument_types import require_functions, require_objects
from clframe.training.averaging import WeightAverage
from clframe.training.divergence import Action, DivergenceGuard, gradient_norm
from clframe.training.epochs import TRAIN_LOSS, MeanLoss, needs_metric, step_schedule
from clframe.training.learner import Learner
from clframe.training.loop import Driver, run_step, update

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
GroupsFactory = Callable[[Network, int], list[dict[str, Any]]]
"""Returns groups of the network's parameters with their options, for the experience with an index."""


class ContinualModule(LightningModule):
    """A network, the strategy that trains it, and the state of that strategy.

    As ``strategy.model`` it is the model that Avalanche's plugins expect: called, it returns logits_BC of the last
    exit. ``module.network(x)`` returns every exit. Without a strategy object it trains one experience under a plain
    Lightning Trainer::

        module.begin(experience, epochs=3)
        Trainer(max_epochs=3).fit(module, loader)
        module.end()

    With a seed it sets the global generators of torch, numpy and Python while it trains, and restores them at the end
    of each of these calls; after a ``fit`` that has raised an error, at the end of the next one.

    Args:
        network: The network to train.
        strategy: An expression such as ``"er + lwf"``, a component, or a composition.
        optimizer: Creates an optimizer for every experience, e.g. ``partial(SGD, lr=0.1)``.
        scheduler: Creates its learning-rate scheduler, stepped once an epoch; None keeps the rate.
        groups: Divides the parameters into groups with options for an experience; None: one group.
        seed: See :class:`~clframe.training.learner.Learner`.
        clip: Largest norm of the gradient; None never clips.
        on_nonfinite: See :class:`~clframe.training.divergence.DivergenceGuard`.
        average: Average of the weights with which the module evaluates; None evaluates with the weights.
    """

    def __init__(
        self,
        network: Network,
        strategy: str | Component | Composition = "naive",
        *,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        groups: GroupsFactory | None = None,
        seed: int | None = None,
        clip: float | None = None,
        on_nonfinite: Action = "stop",
        average: WeightAverage | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        composition = parse(strategy) if isinstance(strategy, str) else compose(strategy)
        where = "ContinualModule"
        if optimizer is None or isinstance(optimizer, Optimizer):
            raise ConfigError(
                f"{where}.optimizer: found {'none' if optimizer is None else 'an optimizer'}; give a function that "
                f"creates one for the parameters in each experience, such as partial(SGD, lr=0.1)"
            )
        require_functions({"optimizer": optimizer, "scheduler": scheduler, "groups": groups}, where=where)
        require_objects({"network": (network, Network), "average": (average, WeightAverage)}, where=where)
        if network is None:
            raise ConfigError(f"{where}.network: found none; give a Network")
        seed = convert_argument(seed, int | None, where=f"{where}.seed")
        clip = convert_argument(clip, float | None, where=f"{where}.clip")
        if clip is not None and clip <= 0:
            raise ConfigError(f"{where}.clip: found {clip:g}; give a number above 0, or None for no clipping")
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise UnsupportedError(
                "ContinualModule: found a network without trainable parameters, such as that of clframe.load(run), "
                "which is for prediction; learn more with clframe.load(run).extend(...) or clframe extend RUN, or use "
                "a new network"
            )
        self.network = network
        self.learner = Learner(network, composition, seed=seed)
        self.learner.average = average
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self._groups = groups
        self.clip = clip
        self.divergence = DivergenceGuard(convert(on_nonfinite, Action, where="ContinualModule.on_nonfinite"))
        self.norm_before_clipping: Tensor | None = None
        self.driver: Driver = PlainDriver(self)
        self.streams = RandomStreams()

    def new_optimizer(self) -> Optimizer:
        """Create the optimizer of the current experience; before any, that of the first."""
        experience, groups = self.learner.experience, self._groups
        if groups is None:
            return self.make_optimizer(self.network.parameters())
        return self.make_optimizer(groups(self.network, 0 if experience is None else experience.index))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits_BC of the last exit."""
        output: Output = self.network(x)
        return output.last

    def begin(self, experience: Experience, *, epochs: int) -> None:
        """Start an experience: heads grow, components prepare."""
        with self._own_streams("ContinualModule.begin"):
            self.learner.begin(experience, classes=experience.classes, epochs=epochs)

    def _own_streams(self, what: str) -> AbstractContextManager[None]:
        """The generators of its training instead of the caller's, if it has a seed."""
        return nullcontext() if self.learner.seed is None else self.streams.part(what)

    def on_fit_start(self) -> None:
        """Begin to use the generators of the training under a plain Trainer; a strategy does it around all it does."""
        if isinstance(self.driver, PlainDriver) and self.learner.seed is not None:
            self.streams.enter()

    def on_fit_end(self) -> None:
        """Restore the caller's generators."""
        if isinstance(self.driver, PlainDriver):
            self.streams.leave()

    def end(self, *, step: int | None = None) -> None:
        """Finish an experience: components consolidate.

        Args:
            step: Training steps so far, for the message about a diverged training.

        Raises:
            DivergenceError: The weights are not finite.
        """
        learner = self.learner
        # Before consolidation, which on such weights fails with messages about something else.
        self.divergence.check_updates(learner)
        self.divergence.check_weights(learner, step=step)
        with self._own_streams("ContinualModule.end"):
            learner.end()

    def configure_optimizers(self) -> Any:
        """Return the driver's optimizer."""
        return self.driver.configure()

    def on_train_epoch_start(self) -> None:
        """Begin an epoch of the driver."""
        self.driver.before_epoch(self.current_epoch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Return -1, which skips the rest of the epoch, when the driver was asked to stop."""
        return -1 if self.driver.stop_requested() else None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Take one training step."""
        self.driver.train_on(batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End a batch of the driver; Lightning's callbacks have been called."""
        self.driver.after_batch()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip here, where gradients of 16-bit mixed precision are unscaled already."""
        if self.clip is not None:
            self.norm_before_clipping = gradient_norm(optimizer)
            self.clip_gradients(optimizer, gradient_clip_val=self.clip, gradient_clip_algorithm="norm")

    def on_train_epoch_end(self) -> None:
        """End an epoch of the driver."""
        self.driver.after_epoch()


class PlainDriver:
    """Runs the training step under a plain Trainer, without Avalanche and its plugins."""

    def __init__(self, module: ContinualModule) -> None:
        self._module = module
        self._engine = TrainerEngine(module)
        self._scheduler: LRScheduler | None = None
        self._mean_loss: MeanLoss | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> PlainDriver:
        """Return the driver itself: as with the learner, a copy of the module must not fork the run."""
        return self

    def configure(self) -> Optimizer:
        """Return a new optimizer for this fit."""
        module = self._module
        for component in module.learner.composition.acting_at("training_set"):
            raise UnsupportedError(
                f"ContinualModule: '{component.name}' changes the samples of an epoch, but a plain Trainer is given "
                f"its loader; train with LightningStrategy, or let replay join each batch"
            )
        self._optimizer = optimizer = module.new_optimizer()
        self._scheduler = None if module.make_scheduler is None else module.make_scheduler(optimizer)
        self._mean_loss = MeanLoss() if needs_metric(self._scheduler) else None
        return optimizer

    def before_epoch(self, epoch: int) -> None:
        """Set the random states and components of this epoch."""
        steps = self._module.trainer.num_training_batches  # infinite for loaders without a length
        self._module.learner.before_epoch(epoch, steps=int(steps) if steps < float("inf") else 0)

    def stop_requested(self) -> bool:
        """Never: Lightning's own callbacks stop a plain Trainer."""
        return False

    def train_on(self, batch: Any) -> None:
        """Train on the batch, extended by the owner of the slot ``batch``."""
        x, y = batch[0], batch[1]
        self._batch = self._module.learner.make_batch(x, y)
        run_step(self)
        guard = self._module.divergence
        if self._mean_loss is not None and (guard.filter is None or guard.filter.loss_is_finite):
            self._mean_loss.add(self._loss)

    def after_batch(self) -> None:
        """Do nothing."""

    def after_epoch(self) -> None:
        """Step the learning rate."""
        if self._scheduler is not None:
            step_schedule(self._scheduler, {} if self._mean_loss is None else {TRAIN_LOSS: self._mean_loss.compute()})

    def call_plugins(self, event: str) -> None:
        """Do nothing: a plain Trainer has no plugins of Avalanche."""

    def clear_gradients(self) -> None:
        """Zero the gradients."""
        optimizer = self._module.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        self._loss = torch.zeros(1, device=self._module.device)
        if self._module.divergence.filter is not None:
            self._module.divergence.filter.before_batch(self._module.learner, first=True)

    def compute_output(self) -> None:
        """Compute every exit's logits."""
        learner = self._module.learner
        with learner.observer.around("forward", samples=len(self._batch.y)):
            self._output = self._module.network(self._batch.x, taps=learner.taps, parts=self._batch.parts)

    def add_loss(self) -> None:
        """Add the combined terms."""
        self._loss = self._loss + self._module.learner.loss(self._batch, self._output)

    def backward(self) -> None:
        """Run the backward pass, then the owner of the slot ``gradient``."""
        learner = self._module.learner
        with learner.observer.around("backward", samples=len(self._batch.y)):
            self._engine.backward(self._loss, retain_graph=False)
        filter = self._module.divergence.filter
        if filter is None or filter.check_batch(learner, self._loss, self._optimizer):
            learner.modify_gradients()

    def optimizer_step(self) -> None:
        """Clip and update."""
        learner = self._module.learner
        update(learner, self._engine, self._optimizer, self._module.divergence)
