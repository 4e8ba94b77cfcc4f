"""``LightningStrategy``: Avalanche's loop, Lightning's engine, clframe's components.

``strategy.train(experience)``, ``strategy.eval(stream)``, ``plugins=[...]`` and ``evaluator=...`` mean what
they mean in Avalanche; every callback fires in Avalanche's order.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from avalanche.benchmarks import OnlineCLExperience
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.templates import SupervisedTemplate
from avalanche.training.templates.base_sgd import PeriodicEval
from lightning import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from clframe.avalanche_bridge.fabric import OnFabric
from clframe.avalanche_bridge.repairs import refuse_schedulers
from clframe.data.avalanche import classes_in, describe
from clframe.data.benchmark import Benchmark
from clframe.errors import UnsupportedError
from clframe.nn.types import Output
from clframe.training.loaders import Serving
from clframe.training.loop import EVENTS, iterate
from clframe.training.module import ContinualModule
from clframe.training.trainer import fit_experience


class LightningStrategy(Serving, OnFabric, SupervisedTemplate):
    """An Avalanche strategy whose model is a :class:`ContinualModule` (or any module at all).

    With a :class:`ContinualModule` its components act on the timetable and, where no ``optimizer`` is given,
    each experience gets a fresh one. With any other module this is Avalanche's ``Naive`` with
    plugins, on Fabric: same seed, same weights.

    Args:
        model: What learns.
        optimizer: Kept through the run, as in Avalanche; None asks the module for a new one each experience.
        criterion: Loss of a foreign module, and the loss that evaluation reports.
        benchmark: Serves its experiences from memory; experiences of other benchmarks go through
            Avalanche's loaders.
        fabric: Launched Fabric; None makes one for ``device``.
        engine: ``"fabric"``, or ``"trainer"`` to run every experience inside a Lightning Trainer.
        trainer: Keyword arguments of that Trainer (callbacks, loggers, profiler ...).
        accumulate: Batches whose gradients are added up before each update.
        limit_batches: Batches of an epoch, and of an evaluation, after which the rest is left out.
        channels_last: Keep the model's weights and batches of images with their channels last in memory.
        train_mb_size: Samples per training batch.
        train_epochs: Epochs per experience.
        eval_mb_size: Samples per evaluation batch.
        device: Where to run if no ``fabric`` is given.
        plugins: Avalanche plugins.
        evaluator: Avalanche's metrics and loggers.
        eval_every: As in Avalanche.
        peval_mode: As in Avalanche.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        criterion: Any = None,
        benchmark: Benchmark | None = None,
        fabric: Fabric | None = None,
        engine: Literal["fabric", "trainer"] = "fabric",
        trainer: dict[str, Any] | None = None,
        accumulate: int = 1,
        limit_batches: int | None = None,
        channels_last: bool = False,
        train_mb_size: int = 1,
        train_epochs: int = 1,
        eval_mb_size: int | None = 1,
        device: str | torch.device = "cpu",
        plugins: Sequence[Any] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] | None = default_evaluator,
        eval_every: int = -1,
        peval_mode: str = "epoch",
    ) -> None:
        self.module = model if isinstance(model, ContinualModule) else None
        self._fresh_optimizer = optimizer is None
        if optimizer is None:
            if self.module is None:
                raise UnsupportedError(
                    "LightningStrategy: no optimizer given for a model that makes none; pass optimizer= or a "
                    "ContinualModule"
                )
            optimizer = self.module.make_optimizer(self.module.network.parameters())
        if engine == "trainer" and self.module is None:
            raise UnsupportedError(
                "LightningStrategy: engine 'trainer' needs a ContinualModule; wrap the model or use 'fabric'"
            )
        super().__init__(
            model=model,
            optimizer=optimizer,
            criterion=nn.CrossEntropyLoss() if criterion is None else criterion,
            train_mb_size=train_mb_size,
            train_epochs=train_epochs,
            eval_mb_size=eval_mb_size,
            device=device,
            plugins=plugins,
            evaluator=evaluator,
            eval_every=eval_every,
            peval_mode=peval_mode,
            fabric=fabric,
        )
        if self._fresh_optimizer:
            refuse_schedulers(self.plugins)
        self._given_criterion = self._criterion
        self.learner = None if self.module is None else self.module.learner
        self.serve(benchmark)
        self.engine_name = engine
        self.trainer_options = trainer or {}
        self.accumulate = accumulate
        self.limit_batches = limit_batches
        self.channels_last = channels_last
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.output: Output | None = None
        self.answers: Output | None = None
        self.batch: Any = None
        self.on_step: Callable[[LightningStrategy], None] | None = None
        """Called after every training step; for progress bars and periodic logging."""
        self._scheduler: Any = None
        self._calls: dict[str, tuple[Callable[..., None], ...]] = {}
        self._plugins_touch_loss = True
        self._kwargs: dict[str, Any] = {}
        self._step_in_update = 0
        self._epoch = 0
        self._part, self._parts = 0, 1

    # --- the timetable on Avalanche's callbacks ---------------------------------------------------

    def check_model_and_optimizer(self, **kwargs: Any) -> None:
        """Grow the network and renew the optimizer where the model is ours; else Avalanche's way."""
        if self.learner is None:
            super().check_model_and_optimizer(**kwargs)
            return
        assert self.module is not None
        if self.model is not self.module:
            self._take_weights()
        experience, self._part, self._parts = self._place()
        if self._part:
            return  # the learner is in the middle of this experience
        parts = [experience, *(self._experience_at(i) for i in self._sources())]
        classes = {c for part in parts for c in classes_in(part.dataset.targets)}.union(self.learner.past)
        described = describe(
            experience,
            count=len(experience.origin_stream),
            past=self.learner.past,
            samples=self._samples_of(experience, "train", "original_train"),
            held_out=self._held_out(experience),
        )
        epochs = self.train_epochs * self._parts
        self.module.to(self.device)
        self.learner.begin(described, classes=tuple(sorted(classes)), epochs=epochs)
        self.module.to(self.device)
        if self._fresh_optimizer:
            former = self.optimizer
            self.optimizer = self.module.make_optimizer(self.module.network.parameters())
            if isinstance(experience, OnlineCLExperience) and not experience.is_first_subexp:
                _hand_over(former, self.optimizer)
        else:
            self.make_optimizer()
        make = self.module.make_scheduler
        self._scheduler = None if make is None else make(self.optimizer)
        self.set_up(self.module.network)

    def _take_weights(self) -> None:
        """A plugin has put a copy of the model in place, as GDumb does to start over: learn on from it."""
        assert self.module is not None
        if not isinstance(self.model, ContinualModule):
            name = type(self.model).__name__
            raise UnsupportedError(
                f"LightningStrategy: a plugin has put a {name} in place of the ContinualModule; use the plugin "
                f"with a plain module, or put a copy of the ContinualModule in place"
            )
        self.module.load_state_dict(self.model.state_dict())
        self.model = self.module
        self.optimizer.state.clear()  # as Avalanche does for parameters that are new to the optimizer

    def model_adaptation(self, model: nn.Module | None = None) -> nn.Module:
        """Avalanche's adaptation for foreign modules; evaluation never grows one of ours."""
        if self.learner is None:
            adapted: nn.Module = super().model_adaptation(model)
            return adapted
        return self.model

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
        self._compile_calls()
        if self.engine_name == "trainer":
            fit_experience(self, **kwargs)
        else:
            super()._train_exp(experience, eval_streams, **kwargs)

    def _after_training_exp(self, **kwargs: Any) -> None:
        """Components consolidate first, then Avalanche's plugins."""
        if self.learner is not None and self._part + 1 == self._parts:
            self.learner.end()
        super()._after_training_exp(**kwargs)

    def _before_training_epoch(self, **kwargs: Any) -> None:
        self._epoch = self._part * self.train_epochs + self.clock.train_exp_epochs
        if self.learner is not None:
            self.learner.before_epoch(self._epoch)
        if self._own_loader is not None:
            self._own_loader.epoch = self._epoch
        self._step_in_update = 0
        super()._before_training_epoch(**kwargs)
        if self.dataloader is not self._own_loader:
            self._refuse_pool()
        self._compile_calls()

    def _after_training_epoch(self, **kwargs: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.step()
        super()._after_training_epoch(**kwargs)

    def training_epoch(self, **kwargs: Any) -> None:
        """Avalanche's epoch around the one loop body."""
        for batch in itertools.islice(self.dataloader, self.limit_batches):
            self.mbatch = batch
            if self._stop_training:
                break
            self.train_on(batch)

    def eval_epoch(self, **kwargs: Any) -> None:
        """Avalanche's evaluation, cut short where ``limit_batches`` says so."""
        if self.limit_batches is not None:
            self.dataloader = list(itertools.islice(self.dataloader, self.limit_batches))
        super().eval_epoch(**kwargs)

    def train_on(self, batch: Any) -> None:
        """One training step on ``batch``."""
        self.mbatch = batch
        self._unpack_minibatch()
        if self.learner is not None:
            self.batch = joined = self.learner.make_batch(self.mbatch[0], self.mbatch[1])
            joined.x = self.as_stored(joined.x)
            self.mbatch[0], self.mbatch[1] = joined.x, joined.y
        iterate(self)
        if self.on_step is not None:
            self.on_step(self)

    # --- the loop body's driver -------------------------------------------------------------------

    def fire(self, event: str) -> None:
        """Call the plugins that act at ``event``; with none present this costs nothing."""
        for call in self._calls[event]:
            call(self, **self._kwargs)

    def clear_gradients(self) -> None:
        """Zero the gradients at the first batch of an update."""
        if self._step_in_update == 0:
            self.optimizer.zero_grad()
        if self.learner is None or self._plugins_touch_loss:
            self.loss = self._make_empty_loss()

    def predict(self) -> None:
        """Every exit's logits; Avalanche's plugins see the last exit's."""
        self.mb_output = self.forward()

    def add_loss(self) -> None:
        """Components' terms, or the criterion of a foreign module."""
        loss = self.criterion()
        if self.learner is None or self._plugins_touch_loss:
            self.loss += loss
        else:  # the same number without a sum in the graph
            self.loss = loss if loss.ndim else loss.reshape(1)

    def forward(self, **kwargs: Any) -> Any:
        """Logits for Avalanche's eyes; all exits are kept in ``output``."""
        if self.learner is None:
            return super().forward(**kwargs)
        spread = self.fabric.world_size > 1 and self._engine is not None
        network = self._engine.module if spread else self.learner.network
        self.output = output = self.predicted(network, self.mb_x)
        if self.is_training:
            return output.last
        self.answers = self.learner.adjust_logits(output)
        scores = self.learner.predict(self.answers)
        # Before the first experience there is no class to answer with; Avalanche's metrics want an arg-max.
        return scores if scores.shape[1] else scores.new_full((len(scores), 1), float("-inf"))

    def predicted(self, network: Callable[..., Output], x: Tensor) -> Output:
        """The output of our network, or of one like it, with the taps that components ask for."""
        assert self.learner is not None
        taps = self.learner.taps
        output: Output = self.in_precision(lambda: network(x, taps=taps))
        if taps and output.last.dtype != self.learner.network.final.weight.dtype:
            # Fabric hands on logits and taps in single precision; taps go through layers of the network's own.
            place = self.learner.network.place
            return output._replace(taps={name: place(tap) for name, tap in output.taps.items()})
        return output

    def criterion(self) -> Tensor:
        """The mixed loss terms in training; in evaluation the criterion on known classes."""
        if self.learner is None:
            loss: Tensor = super().criterion()
            return loss
        if self.is_training:
            assert self.output is not None
            with self._engine.autocast():
                return self.learner.loss(self.batch, self.output)
        known = self.mb_output.shape[1]
        if max(self.experience.classes_in_this_experience) < known:
            return self._criterion(self.mb_output, self.mb_y)  # type: ignore[no-any-return]
        # The loss on a class that has no output yet is not defined.
        return torch.full((), float("nan"), device=self.device)

    def as_stored(self, x: Tensor) -> Tensor:
        """Inputs in the type, and images in the memory format, of the weights."""
        x = super().as_stored(x)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.ndim == 4 else x

    def backward(self) -> None:
        """Backward through the engine, then the owner of the slot ``gradient``."""
        loss = self.loss if self.accumulate == 1 else self.loss / self.accumulate
        self._engine.backward(loss, retain_graph=self.retain_graph)
        if self.learner is not None:
            self.learner.modify_gradients()

    def optimizer_step(self) -> None:
        """Clip and update once ``accumulate`` batches, or the epoch's last ones, have been added up."""
        self._step_in_update += 1
        last = self.accumulate == 1 or self._step_in_update == self.accumulate or self._is_last_batch()
        if last:
            self.keep_up()
            self._engine.step(clip=None if self.module is None else self.module.clip)
            if self.learner is not None:
                self.learner.after_step()
            self._step_in_update = 0

    # --- where things are -------------------------------------------------------------------------

    @property
    def mb_task_id(self) -> Tensor:
        """Task labels of the batch; the experience's, or 0, for samples whose loader or memory has none."""
        labels: Tensor = self.mbatch[-1] if len(self.mbatch) > 2 else self.mb_y[:0]
        missing = len(self.mb_y) - len(labels)
        own = int(getattr(self.experience, "task_label", 0))
        return torch.cat([labels, labels.new_full((missing,), own)]) if missing > 0 else labels

    def _is_last_batch(self) -> bool:
        batches = len(self.dataloader)
        if self.limit_batches is not None:
            batches = min(batches, self.limit_batches)
        return int(self.clock.train_epoch_iterations) + 1 == batches

    def _place(self) -> tuple[Any, int, int]:
        """The experience that the learner is told of, and which part of how many of it this one is."""
        experience = self.experience
        if isinstance(experience, OnlineCLExperience) and experience.access_task_boundaries:
            part = 0 if experience.is_first_subexp else self._part + 1
            return experience.origin_experience, part, int(experience.sub_stream_length)
        return experience, 0, 1

    def _compile_calls(self) -> None:
        """Look up, once an epoch, which plugins act inside a training step."""
        calls: dict[str, list[Callable[..., None]]] = defaultdict(list)
        for plugin in self.plugins:
            for event in EVENTS:
                if _acts_at(plugin, event):
                    calls[event].append(getattr(plugin, event))
        self._calls = {event: tuple(calls[event]) for event in EVENTS}
        self._plugins_touch_loss = any(calls[e] for e in ("before_forward", "after_forward", "before_backward"))


def _hand_over(former: Optimizer, fresh: Optimizer) -> None:
    """Let ``fresh`` go on with what ``former`` keeps of every parameter that is still there."""
    for group in fresh.param_groups:
        for parameter in group["params"]:
            if parameter in former.state:
                fresh.state[parameter] = former.state[parameter]


def _acts_at(plugin: Any, event: str) -> bool:
    if isinstance(plugin, EvaluationPlugin) and not hasattr(type(plugin), event):
        return bool(plugin.metrics or plugin.loggers)
    if type(plugin) is PeriodicEval:
        return event == "after_training_iteration" and plugin.peval_mode == "iteration"
    call = getattr(plugin, event, None)
    return call is not None and getattr(call, "__func__", call) is not getattr(SupervisedPlugin, event, None)
