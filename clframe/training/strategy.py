"""``LightningStrategy``: Avalanche's loop, Lightning's engine, clframe's components.

``strategy.train(experience)``, ``strategy.eval(stream)``, ``plugins=[...]`` and ``evaluator=...`` mean the same as in
Avalanche; callbacks run in Avalanche's order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clframe.avalanche_bridge.fabric import OnFabric
from clframe.avalanche_bridge.imports import (
    EvaluationPlugin,
    Fabric,
    OnlineCLExperience,
    SupervisedTemplate,
    default_evaluator,
)
from clframe.avalanche_bridge.repairs import refuse_schedulers
from clframe.data.avalanche import classes_in, describe
from clframe.data.benchmark import Benchmark
from clframe.errors import UnsupportedError
from clframe.nn.graphs import CudaGraphs
from clframe.nn.types import Output
from clframe.process_state import require_gradients
from clframe.training.budget import TrainingPlan
from clframe.training.capture import Capture, StepCapture
from clframe.training.channels_last import require_channels_last
from clframe.training.compiled import CompiledStages, refuse_to_compile
from clframe.training.configured import configured_optimizer
from clframe.training.distributed import Group
from clframe.training.epoch_loop import EpochLoop
from clframe.training.epochs import EarlyStopping, EpochMetrics
from clframe.training.inside import Resumable, Resumption
from clframe.training.loaders import Serving
from clframe.training.loop import StrategyStep
from clframe.training.module import ContinualModule
from clframe.training.scores import Scores
from clframe.training.sharing import SharedBatches
from clframe.training.step_plugins import StepPlugins
from clframe.training.strategy_arguments import EngineName, EvalMode, check_strategy_arguments
from clframe.training.trainer_arguments import check_arguments
from clframe.training.trainer_options import check_callbacks


class LightningStrategy(Serving, SharedBatches, StrategyStep, Resumable, EpochLoop, OnFabric, SupervisedTemplate):
    """An Avalanche strategy whose model is a :class:`ContinualModule`, or any other module.

    A :class:`ContinualModule` is trained by its components' hooks and, without ``optimizer``, by a new optimizer for
    each experience. With any other module this is Avalanche's ``Naive`` with plugins, on Fabric: same seed, same
    weights.

    Args:
        model: The model.
        optimizer: Used through the run, as in Avalanche. None has a ``ContinualModule`` create one for each experience,
            and takes that of ``configure_optimizers``, with its schedule, from another LightningModule. Its
            ``training_step`` is not called: the loss is ``criterion`` of what its ``forward`` returns.
        criterion: Loss of a foreign module, and the loss that evaluation reports.
        benchmark: Its experiences are served from memory; those of other benchmarks go through Avalanche's loaders.
        fabric: Launched Fabric; None makes one for ``device``.
        engine: ``"fabric"``, or ``"trainer"`` to run every experience inside a Lightning Trainer.
        trainer: Keyword arguments of that Trainer (callbacks, logger, profiler ...); epochs, batches and devices are
            those of the strategy. Each experience gets deep copies of the callbacks, so that none carries its state
            into the next one.
        early_stopping: When to end an experience before its last epoch; needs a :class:`ContinualModule`.
        accumulate: Batches whose gradients are added up before each update.
        limit_batches: Batches of an epoch, and of an evaluation, after which the rest is left out.
        drop_last: Leave out the last batch of an epoch if it has fewer samples.
        channels_last: Store the model's weights and batches of images with their channels last.
        capture: Whether to record training steps as CUDA graphs, see :mod:`clframe.training.capture`.
        compile: Whether to compile the network's stages, see :mod:`clframe.training.compiled`; a name is that of
            another backend of ``torch.compile``.
        plan: Epochs and batches that a training budget affords, see :mod:`clframe.training.budget`.
        group: The processes that train the model together; None for one.
        train_mb_size: Samples per training batch.
        train_epochs: Epochs per experience.
        eval_mb_size: Samples per evaluation batch.
        device: Where to run if no ``fabric`` is given.
        plugins: Avalanche plugins.
        evaluator: Avalanche's metrics and loggers.
        eval_every: As in Avalanche.
        peval_mode: As in Avalanche.

    Attributes:
        output: Logits of every exit, and taps, of the current batch.
        adjusted: The same in evaluation, with logits as the strategy adjusts them.
        batch: The training batch after replay has joined it.
        epoch_metrics: Metrics of the last epoch; see :mod:`clframe.training.epochs`.
        on_step: Called after every training step, for progress bars and periodic logging.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        criterion: Any = None,
        benchmark: Benchmark | None = None,
        fabric: Fabric | None = None,
        engine: EngineName = "fabric",
        trainer: dict[str, Any] | None = None,
        early_stopping: EarlyStopping | None = None,
        accumulate: int = 1,
        limit_batches: int | None = None,
        drop_last: bool = False,
        channels_last: bool = False,
        capture: Capture = False,
        compile: bool | str = False,
        plan: TrainingPlan | None = None,
        group: Group | None = None,
        train_mb_size: int = 1,
        train_epochs: int = 1,
        eval_mb_size: int | None = 1,
        device: str | torch.device = "cpu",
        plugins: Sequence[Any] | None = None,
        evaluator: EvaluationPlugin | Callable[[], EvaluationPlugin] | None = default_evaluator,
        eval_every: int = -1,
        peval_mode: EvalMode = "epoch",
    ) -> None:
        check_strategy_arguments(locals())
        self.module = model if isinstance(model, ContinualModule) else None
        first, schedule = _first_optimizer(model, optimizer)
        self._fresh_optimizer = optimizer is None and self.module is not None
        for wanted, option in ((engine == "trainer", "engine 'trainer'"), (early_stopping, "early_stopping")):
            if wanted and self.module is None:
                raise UnsupportedError(
                    f"LightningStrategy: {option} needs a ContinualModule; wrap the model or leave it out"
                )
        super().__init__(
            model=model,
            optimizer=first,
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
        if plan is not None:
            _refuse_uncounted(plugins or ())
        self._given_criterion = self._criterion
        self.learner = None if self.module is None else self.module.learner
        self.share_batches(group)
        self.serve(benchmark)
        self.engine_name = engine
        self.trainer_options = trainer or {}
        check_arguments(self.trainer_options, engine=engine, fabric=self.fabric)
        check_callbacks(self.trainer_options)
        self.early_stopping = early_stopping
        self.accumulate = accumulate
        self.limit_batches = limit_batches
        self.plan: TrainingPlan | None = plan
        self._planned: int | None = None
        self.drop_last = drop_last
        self.channels_last = channels_last
        if channels_last:
            require_channels_last(self.model, self.device)
            self.model.to(memory_format=torch.channels_last)
        self.output: Output | None = None
        self.adjusted: Output | None = None
        self.batch: Any = None
        self.epoch_metrics: dict[str, float] = {}
        self.on_step: Callable[[LightningStrategy], None] | None = None
        self.step_plugins = StepPlugins()
        self._metrics: EpochMetrics | None = None
        self._scheduler: Any = schedule
        self._kwargs: dict[str, Any] = {}
        self._step_in_update = 0
        self._gradient_norm: float | Tensor | None = None
        self._guard = None if self.module is None else self.module.divergence
        self._filter = None if self._guard is None else self._guard.filter
        self._epoch = 0
        self._part, self._parts = 0, 1
        self._resumed_epoch: Resumption | None = None
        self.step_capture = self._new_capture(capture)
        self.stages = self._new_stages(compile)

    def _new_capture(self, wanted: Capture) -> StepCapture | None:
        """Return what records steps, where the device can.

        Raises:
            UnsupportedError: It is required, and the device or the model cannot.
        """
        if wanted and self.learner is not None and self.device.type == "cuda":
            return StepCapture(self, graphs=CudaGraphs(self.device), required=wanted is True)
        if wanted is True:
            found = "a model without components" if self.learner is None else f"a {self.device.type} device"
            raise UnsupportedError(
                f"trainer.capture: found true with {found}, but CUDA graphs need components on a CUDA device; set "
                f"trainer.capture=auto"
            )
        return None

    def _new_stages(self, wanted: bool | str) -> CompiledStages | None:
        """Return what runs the network's stages as compiled code.

        Raises:
            UnsupportedError: The device, a component, or a model without components does not allow it.
        """
        if not wanted:
            return None
        if self.learner is None:
            raise UnsupportedError(
                "trainer.compile: found true with a model without components; pass the model through torch.compile"
            )
        refuse_to_compile(self.learner.composition, self.device)
        return CompiledStages() if wanted is True else CompiledStages(backend=wanted)

    def train(self, experiences: Any, eval_streams: Any = None, **kwargs: Any) -> Any:
        """Train as Avalanche does; with a seed, the global random generators are afterwards as they were before.

        Raises:
            UnsupportedError: Another thread of the process trains with a seed, or gradients are switched off.
        """
        require_gradients("LightningStrategy.train")
        if self.module is None or self.module.learner.seed is None:
            return super().train(experiences, eval_streams, **kwargs)
        with self.module.streams.part("LightningStrategy.train"):
            return super().train(experiences, eval_streams, **kwargs)

    def check_model_and_optimizer(self, **kwargs: Any) -> None:
        """Begin an experience: grow the network, call the components, create the optimizer; else as Avalanche does."""
        if self.learner is None:
            super().check_model_and_optimizer(**kwargs)
            return
        assert self.module is not None
        if self.model is not self.module:
            self._load_replaced_model()
        experience, self._part, self._parts = self._current_experience()
        if self._part:
            return  # inside an experience that an online stream has cut into small ones
        sources = [experience, *(self._experience_at(i) for i in self._sources())]
        classes = {c for source in sources for c in classes_in(source.dataset.targets)}.union(self.learner.past)
        description = describe(
            experience,
            count=len(self.stream_of(experience)),
            past=self.learner.past,
            samples=self._samples_of(experience, "train", "original_train"),
            held_out=self._held_out(experience),
        )
        epochs = self.train_epochs * self._parts
        self.module.to(self.device)
        self.learner.begin(description, classes=tuple(sorted(classes)), epochs=epochs)
        self.module.to(self.device)
        self.synchronize()
        if self._fresh_optimizer:
            former = self.optimizer
            self.optimizer = self.module.new_optimizer()
            if isinstance(experience, OnlineCLExperience) and not experience.is_first_subexp:
                _copy_state(former, self.optimizer)
        else:
            self.make_optimizer()
        make = self.module.make_scheduler
        self._scheduler = None if make is None else make(self.optimizer)
        self._metrics = self._new_metrics()
        self._gradient_norm = None
        self.set_up(self.module.network, clip=self.module.clip)
        if self.step_capture is not None:
            self.step_capture.begin_experience()

    def _load_replaced_model(self) -> None:
        """Take over the weights of a copy of the model that a plugin has put in its place, as GDumb does to restart."""
        assert self.module is not None
        if not isinstance(self.model, ContinualModule):
            name = type(self.model).__name__
            raise UnsupportedError(
                f"LightningStrategy: found a {name} where a plugin has replaced the ContinualModule; use the plugin "
                f"with a plain module, or replace the model by a copy of the ContinualModule"
            )
        self.module.load_state_dict(self.model.state_dict())
        self.model = self.module
        self.optimizer.state.clear()  # as Avalanche does for parameters that are new to the optimizer

    def model_adaptation(self, model: nn.Module | None = None) -> nn.Module:
        """Adapt foreign modules as Avalanche does; a ContinualModule grows only when training begins."""
        if self.learner is None:
            adapted: nn.Module = super().model_adaptation(model)
            return adapted
        return self.model

    def _before_training_exp(self, **kwargs: Any) -> None:
        """Reach the boundary between two small experiences, then begin one as Avalanche does."""
        if self.part:
            self.reach("part")
        super()._before_training_exp(**kwargs)

    def _after_training_exp(self, **kwargs: Any) -> None:
        """Let components consolidate, then call Avalanche's plugins."""
        if self.module is not None and self._part + 1 == self._parts:
            self.gradient_norm()  # reads the gradients before components overwrite them
            if self.step_capture is not None:
                self.step_capture.end_experience()
            self.module.end(step=int(self.clock.train_iterations))
            self.synchronize()
        super()._after_training_exp(**kwargs)
        self.part += 1

    def eval(self, exp_list: Any, **kwargs: Any) -> Any:
        """Evaluate as Avalanche does, with the average of the weights if there is one."""
        if self.stages is not None:
            assert self.module is not None
            self.stages.watch(self.module.network)
        with self._averaged():
            return super().eval(exp_list, **kwargs)

    def _averaged(self) -> AbstractContextManager[object]:
        learner = self.learner
        if learner is None or learner.average is None:
            return nullcontext()
        return learner.average.shown(learner.network)

    def eval_epoch(self, **kwargs: Any) -> None:
        """Evaluate as Avalanche does, on at most ``limit_batches`` batches."""
        if self.limit_batches is not None:
            self.dataloader = list(itertools.islice(self.dataloader, self.limit_batches))
        super().eval_epoch(**kwargs)


def _first_optimizer(model: nn.Module, optimizer: Optimizer | None) -> tuple[Optimizer, Any]:
    """Return the optimizer that a strategy starts with, and the schedule that its model configures with it.

    Raises:
        UnsupportedError: None is given, and the model creates none.
    """
    if optimizer is not None:
        return optimizer, None
    if isinstance(model, ContinualModule):
        return model.new_optimizer(), None
    configured = configured_optimizer(model)
    if configured is None:
        raise UnsupportedError(
            "LightningStrategy: found no optimizer for a model that creates none; pass optimizer= or a ContinualModule"
        )
    return configured


def _refuse_uncounted(plugins: Sequence[Any]) -> None:
    """Refuse plugins next to a plan: what they compute cannot be counted. Evaluation is not part of a budget."""
    found = [type(plugin).__name__ for plugin in plugins if not isinstance(plugin, (EvaluationPlugin, Scores))]
    if found:
        raise UnsupportedError(
            f"LightningStrategy: plan: found the plugin {found[0]}, whose MACs cannot be counted; leave out one of them"
        )


def _copy_state(former: Optimizer, fresh: Optimizer) -> None:
    """Continue in ``fresh`` with the state of every parameter that ``former`` had as well."""
    for group in fresh.param_groups:
        for parameter in group["params"]:
            if parameter in former.state:
                fresh.state[parameter] = former.state[parameter]
