"""Epochs of a strategy: the loop over an experience, budgets, metrics and schedules of its epochs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from clframe.errors import UnsupportedError
from clframe.nn.types import Output
from clframe.training.budget import TrainingPlan
from clframe.training.capture import StepCapture
from clframe.training.compiled import CompiledStages
from clframe.training.epochs import EarlyStopping, EpochMetrics, needs_metric, step_schedule
from clframe.training.inside import Boundary, Resumption
from clframe.training.learner import Learner
from clframe.training.module import ContinualModule
from clframe.training.step_plugins import StepPlugins
from clframe.training.trainer import fit_experience


class EpochLoop:
    """Mixin of a strategy: trains an experience, epoch by epoch, from its beginning or from where a run is resumed."""

    # Declared for readers; LightningStrategy, its other mixins and Avalanche's template provide them.
    agree: Callable[[Mapping[str, float]], dict[str, float]]
    check_replicas: Callable[[], None]
    clock: Any
    convert_input: Callable[[Any], Any]
    dataloader: Any
    device: torch.device
    early_stopping: EarlyStopping | None
    engine: Any
    engine_name: str
    epoch_metrics: dict[str, float]
    eval_mb_size: int
    experience: Any
    fabric: Any
    learner: Learner | None
    limit_batches: int | None
    mbatch: Any
    module: ContinualModule | None
    on_boundary: Callable[[Boundary], None] | None
    optimizer: Any
    plan: TrainingPlan | None
    plugins: list[Any]
    reach: Callable[[Boundary], None]
    resumption: Resumption | None
    run_shared: Callable[..., Output]
    stages: CompiledStages | None
    step_capture: StepCapture | None
    step_plugins: StepPlugins
    stop_training: Callable[[], None]
    train_epochs: int
    train_mb_size: int
    train_on: Callable[[Any], None]
    trainer_options: dict[str, Any]
    _averaged: Callable[[], AbstractContextManager[object]]
    _count_batches: Callable[[], int]
    _criterion: Any
    _epoch: int
    _given_criterion: Any
    _held_out: Callable[[Any], Any]
    _kwargs: dict[str, Any]
    _metrics: EpochMetrics | None
    _own_loader: Any
    _part: int
    _parts: int
    _planned: int | None
    _refuse_pool: Callable[[], None]
    _resumed_epoch: Resumption | None
    _scheduler: Any
    _sources: Callable[[], Any]
    _step_in_update: int
    _stop_training: bool

    def _new_metrics(self) -> EpochMetrics | None:
        """Epoch metrics, if something reads them: they cost a pass over held-out data per epoch."""
        observers = self.engine_name == "trainer" and (
            self.trainer_options.get("callbacks") or self.trainer_options.get("logger")
        )
        if self.early_stopping is not None:
            self.early_stopping.reset()
        if not (observers or self.early_stopping or needs_metric(self._scheduler)):
            return None
        assert self.learner is not None
        network = self.learner.network
        return EpochMetrics(
            network,
            lambda x: self.run_shared(self.convert_input(x)),
            self._held_out(self.experience)[-1:],
            batch_size=self.eval_mb_size or self.train_mb_size,
            limit_batches=self.limit_batches,
            by_token=bool(network.vocabulary),
        )

    def _train_exp(self, experience: Any, eval_streams: Any = None, **kwargs: Any) -> None:
        if not self._sources():
            return
        if self.learner is not None and self._criterion is not self._given_criterion:
            name = type(self._criterion).__name__
            raise UnsupportedError(
                f"LightningStrategy: a plugin has set the criterion {name}, but the loss of a ContinualModule is "
                f"that of its components; use the plugin with a plain module"
            )
        self._kwargs = kwargs
        self.step_plugins = StepPlugins(self.plugins)
        resumption, self.resumption = self.resumption, None
        self._resumed_epoch = resumption
        self.reach("begin")
        if resumption is not None:
            resumption.restore()
        if resumption is None or not resumption.position.trained:
            if self.engine_name == "trainer":
                fit_experience(self, resumption=resumption, **kwargs)
            elif resumption is None:
                super()._train_exp(experience, eval_streams, **kwargs)  # type: ignore[misc]
            else:
                self._train_remaining_epochs(**kwargs)
        self.reach("trained")

    def _train_remaining_epochs(self, **kwargs: Any) -> None:
        """Run the epochs from the one of the clock on, as Avalanche runs all of them."""
        for _ in range(int(self.clock.train_exp_epochs), self.train_epochs):
            self._before_training_epoch(**kwargs)
            if self._stop_training:
                self._stop_training = False
                break
            self.training_epoch(**kwargs)
            self._after_training_epoch(**kwargs)

    def begin_plan(self, index: int) -> None:
        """Train for as many epochs of experience ``index`` as its budget affords."""
        if self.plan is not None:
            assert self.module is not None
            self.train_epochs = self.plan.experiences[index].epochs
            self.module.make_scheduler = self.plan.schedule(self.train_epochs)

    def _plan_epoch(self, *, resumed: bool) -> None:
        """Set the batches of the epoch that begins, or is resumed, from what the experience has cost before it."""
        assert self.plan is not None and self.learner is not None
        planned = self.plan.experiences[int(self.experience.current_experience)]
        observer = self.learner.observer
        spent = observer.spent_before_epoch() if resumed else observer.spent()
        self._planned = None
        batches = planned.batches_of(self._epoch, whole=self._count_batches(), spent=spent)
        self._planned = int(self.agree({"batches": batches})["batches"])

    def _before_training_epoch(self, **kwargs: Any) -> None:
        resumption, self._resumed_epoch = self._resumed_epoch, None
        if resumption is None and self.clock.train_exp_epochs:
            self.reach("epoch")
        self._epoch = self._part * self.train_epochs + self.clock.train_exp_epochs
        if self.plan is not None:
            self._plan_epoch(resumed=resumption is not None and bool(resumption.position.batch))
        if self.learner is not None:
            self.learner.before_epoch(self._epoch, steps=self._count_batches())
        if self._own_loader is not None:
            self._own_loader.epoch = self._epoch
        self._step_in_update = 0
        super()._before_training_epoch(**kwargs)  # type: ignore[misc]
        if self.dataloader is not self._own_loader:
            self._refuse_pool()
        self.step_plugins = StepPlugins(self.plugins)  # a plugin may have added or removed others
        if self.stages is not None:
            assert self.module is not None
            self.stages.watch(self.module.network)
        if self.step_capture is not None:
            self.step_capture.begin_epoch()
        if resumption is not None and resumption.position.batch:
            resumption.restore()
            assert self._own_loader is not None
            self._own_loader.skip(resumption.position.batch, resumption.content["augmentation"])

    def _after_training_epoch(self, **kwargs: Any) -> None:
        self.check_replicas()
        if self._metrics is not None:
            with self._averaged():
                self.epoch_metrics = self.agree(self._metrics.compute())
        if self._scheduler is not None:
            step_schedule(self._scheduler, self.epoch_metrics)
        super()._after_training_epoch(**kwargs)  # type: ignore[misc]
        # Avalanche would carry a request in the last epoch over to the next experience.
        more = self.clock.train_exp_epochs < self.train_epochs
        if self.early_stopping is not None and self.early_stopping.should_stop(self.epoch_metrics) and more:
            self.stop_training()

    def training_epoch(self, **kwargs: Any) -> None:
        """Run one epoch."""
        with nullcontext() if self.step_capture is None else self.step_capture.epoch():
            self._train_on_batches()

    def _train_on_batches(self) -> None:
        done = int(self.clock.train_epoch_iterations)  # above 0 where the epoch is resumed
        left = None if self.limit_batches is None and self.plan is None else self._count_batches() - done
        for batch in itertools.islice(self.dataloader, left):
            self.mbatch = batch
            if self._stop_training:
                break
            self.train_on(batch)
            if self.on_boundary is not None:
                self.on_boundary("step")
