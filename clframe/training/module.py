"""The Lightning module: a network and its strategy, trainable by any loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from clframe.avalanche_bridge.fabric import TrainerEngine
from clframe.core import Composition, Experience, compose, parse
from clframe.core.component import Component
from clframe.errors import UnsupportedError
from clframe.nn.network import Network
from clframe.nn.types import Output
from clframe.training.learner import Learner
from clframe.training.loop import iterate

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


class ContinualModule(LightningModule):
    """A network, the strategy that trains it, and the state of that strategy.

    As ``strategy.model`` it is what Avalanche's plugins expect: called, it returns logits_BC of the last
    exit. ``module.network(x)`` returns every exit. On its own it trains one experience under a plain
    Lightning Trainer::

        module.begin(experience, epochs=3)
        Trainer(max_epochs=3).fit(module, loader)
        module.end()

    Args:
        network: What learns.
        strategy: An expression such as ``"er + lwf"``, a component, or a composition.
        optimizer: Makes a fresh optimizer for every experience, e.g. ``partial(SGD, lr=0.1)``.
        scheduler: Makes its learning-rate scheduler, stepped once an epoch; None keeps the rate.
        seed: See :class:`~clframe.training.learner.Learner`.
        clip: Largest norm of the gradient; None never clips.
    """

    def __init__(
        self,
        network: Network,
        strategy: str | Component | Composition = "naive",
        *,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        seed: int | None = None,
        clip: float | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        composition = parse(strategy) if isinstance(strategy, str) else compose(strategy)
        self.network = network
        self.learner = Learner(network, composition, seed=seed)
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.clip = clip
        self.driver: TrainerDriver = PlainDriver(self)

    def forward(self, x: Tensor) -> Tensor:
        """logits_BC of the last exit."""
        output: Output = self.network(x)
        return output.last

    def begin(self, experience: Experience, *, epochs: int) -> None:
        """Start an experience: heads grow, components prepare."""
        self.learner.begin(experience, classes=experience.classes, epochs=epochs)

    def end(self) -> None:
        """Finish an experience: components consolidate."""
        self.learner.end()

    def configure_optimizers(self) -> Any:
        """Lightning's hook: the driver says which optimizer a fit uses."""
        return self.driver.configure()

    def on_train_epoch_start(self) -> None:
        """Lightning's hook."""
        self.driver.before_epoch(self.current_epoch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Lightning's hook: -1 skips the rest of the epoch when training was asked to stop."""
        return -1 if self.driver.stopping() else None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Lightning's hook: one call of the one loop body."""
        self.driver.train_on(batch)

    def on_train_epoch_end(self) -> None:
        """Lightning's hook."""
        self.driver.end_epoch()


class TrainerDriver:
    """What a :class:`ContinualModule` asks of whoever drives it under a Trainer."""

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainerDriver:
        """As for the learner: copies of the module do not fork the run."""
        return self

    def configure(self) -> Any:
        """What ``configure_optimizers`` returns."""
        raise NotImplementedError

    def before_epoch(self, epoch: int) -> None:
        """An epoch starts."""

    def stopping(self) -> bool:
        """Whether the rest of the epoch is to be skipped."""
        return False

    def train_on(self, batch: Any) -> None:
        """Train on one batch."""
        raise NotImplementedError

    def end_epoch(self) -> None:
        """An epoch ends."""


class PlainDriver(TrainerDriver):
    """Drives the loop body under a plain Trainer: no Avalanche, no foreign plugins."""

    def __init__(self, module: ContinualModule) -> None:
        self._module = module
        self._engine = TrainerEngine(module)
        self._scheduler: LRScheduler | None = None

    def configure(self) -> Optimizer:
        """A fresh optimizer for this fit."""
        module = self._module
        for component in module.learner.composition.acting_at("training_set"):
            raise UnsupportedError(
                f"ContinualModule: '{component.name}' changes what the loader serves, which a plain Trainer is given; "
                f"train with LightningStrategy, or let replay join each batch"
            )
        optimizer = module.make_optimizer(module.network.parameters())
        self._scheduler = None if module.make_scheduler is None else module.make_scheduler(optimizer)
        return optimizer

    def before_epoch(self, epoch: int) -> None:
        """Randomness and component generators of this epoch."""
        self._module.learner.before_epoch(epoch)

    def train_on(self, batch: Any) -> None:
        """The batch, extended by the owner of the slot, through the loop body."""
        x, y = batch[0], batch[1]
        self._batch = self._module.learner.make_batch(x, y)
        iterate(self)

    def end_epoch(self) -> None:
        """Step the learning rate."""
        if self._scheduler is not None:
            self._scheduler.step()

    def fire(self, event: str) -> None:
        """No foreign plugins here."""

    def clear_gradients(self) -> None:
        """Zero the gradients."""
        optimizer = self._module.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        self._loss = torch.zeros(1, device=self._module.device)

    def predict(self) -> None:
        """Every exit's logits."""
        self._output = self._module.network(self._batch.x, taps=self._module.learner.taps)

    def add_loss(self) -> None:
        """The mixed terms."""
        self._loss = self._loss + self._module.learner.loss(self._batch, self._output)

    def backward(self) -> None:
        """Backward, then the gradient's owner."""
        self._engine.backward(self._loss, retain_graph=False)
        self._module.learner.modify_gradients()

    def optimizer_step(self) -> None:
        """Clip and update."""
        self._engine.step(clip=self._module.clip)
        self._module.learner.after_step()
