"""Checkpoints inside an experience: all that training needs to continue at a step as if it had not stopped.

A run resumes in two stages. The experience first begins again from the checkpoint before it: heads grow, components
prepare, optimizer, loader and engine are created. What this sets on objects is then what it was in the interrupted run.
:meth:`Resumable.restore` afterwards replaces every value that changes while the experience is trained:

===================  ==================================================================================================
network              weights, buffers, extra states (exits, experts, prompts included), ``requires_grad``, modes
components           the state of each by name; references to live parameters (``si``, ``ewc``) by the parameter's name
learner              weights of exits, sums of loss terms, number of the step, generators of components, the replay
                     buffer that contexts show, the average of the weights
optimizer            its state, that of the schedule, and the scale of 16-bit mixed precision
position             Avalanche's clock, the generator of augmentations, requests to stop, metrics of the epoch, state of
                     early stopping
Lightning            counters of the Trainer's loops and the ``state_dict`` of its callbacks (``engine: trainer``)
generators           torch on every device, numpy, Python
===================  ==================================================================================================

The session adds ledger, cost recorder, log entries, the baseline and the guard against divergence.

Derived again, because they depend on the experience and epoch only: order of samples, pooled data, heads and rows that
are frozen (``Classifier.fixed``), ``Network.gradient`` and the frozen trunk (``before_epoch`` of ``exits``, ``cwr``,
``freeze``, ``l2p``, ``moe``), kinds of steps. Caches follow the weights: views of experts (``ExpertLayer.weights``) are
checked by address. A component that stores anything else in attributes, of itself, of the network or of the learner,
would not resume exactly: state belongs into what hooks return.

Gradients are not saved, only their norm: a checkpoint is written after an update, and the next step clears them. The
small experiences of an online stream are not entered: there the position is the number of those that are finished.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from clframe.config.periods import Period
from clframe.training.checkpoint import decode, encode
from clframe.training.generators import generator_states, set_generator_states
from clframe.training.module import ContinualModule
from clframe.training.trainer import trainer_state

Boundary = Literal["begin", "step", "epoch", "trained", "part"]
"""Places at which a strategy may be saved: before the first epoch (``begin``), after a step, before another epoch,
after the last one, and between two small experiences of an online stream."""

MOST_COST = 0.02
"""Share of the time that writing may take with a period in time."""
EPOCH_SHARE = 0.1
"""Share of a period in time after which the end of an epoch gets a checkpoint."""

_CLOCK = (
    "train_iterations", "train_exp_counter", "train_exp_epochs", "train_exp_iterations", "train_epoch_iterations",
    "total_iterations",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Position:
    """A place inside an experience."""

    experience: int
    """Its index."""
    part: int
    """Number of small experiences that are finished; 0 unless the stream is online."""
    epoch: int
    """Number of epochs that are finished."""
    batch: int
    """Batches of the epoch that are finished."""
    step: int
    """Steps of the experience that are finished."""
    trained: bool
    """Whether all epochs are finished, so that consolidation follows."""

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Position:
        """Build a position from its ``asdict``.

        Raises:
            ValueError: A field that is not a count.
        """
        found = cls(**content)
        for name, value in content.items():
            if type(value) is not (bool if name == "trained" else int) or value < 0:
                raise ValueError(f"{name}={value!r}")
        return found

    def __str__(self) -> str:
        experience = f"experience {self.experience + 1}"
        if self.trained:
            return f"{experience}, after its last epoch, step {self.step}"
        where = f"part {self.part + 1}" if self.part else f"epoch {self.epoch + 1}"
        return f"{experience}, {where}, step {self.step}"


class Schedule:
    """Decides when a checkpoint inside an experience is due.

    Args:
        period: None writes none.
        clock: Returns seconds.
    """

    def __init__(self, period: Period | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._period, self._clock = period, clock
        self._step, self._time, self._cost = 0, clock(), 0.0

    def begin(self, step: int) -> None:
        """Start counting at ``step`` of a run."""
        self._step, self._time = step, self._clock()

    def is_due(self, boundary: Boundary, step: int) -> bool:
        """Whether to write a checkpoint at a boundary after ``step`` steps of the run."""
        period = self._period
        if period is None or boundary == "begin" or step <= self._step:
            return False
        between = boundary in ("epoch", "trained")
        if period.steps is not None:
            return between or step - self._step >= period.steps
        assert period.seconds is not None
        least = EPOCH_SHARE * period.seconds if between else period.seconds
        return self._clock() - self._time >= max(least, self._cost / MOST_COST)

    def add(self, step: int, *, seconds: float) -> None:
        """Note a checkpoint and the seconds that writing it took."""
        self._cost = seconds
        self.begin(step)


@dataclass(frozen=True)
class Resumption:
    """Position at which a strategy continues, and the function that restores its values there."""

    position: Position
    restore: Callable[[], None]
    content: Mapping[str, Any]
    """Values that :meth:`Resumable.capture` returned."""


class Resumable:
    """Mixin of a strategy: boundaries at which it can be saved, and its values inside an experience.

    Attributes:
        on_boundary: Called at every boundary.
        resumption: Where the next experience continues; None starts it at its beginning.
    """

    # Declared for readers; LightningStrategy and Avalanche's template provide them.
    accumulate: int
    benchmark: Any
    clock: Any
    dataloader: Any
    device: Any
    early_stopping: Any
    engine_name: str
    epoch_metrics: dict[str, float]
    fabric: Any
    learner: Any
    module: ContinualModule | None
    optimizer: Any
    _metrics: Any
    _own_loader: Any
    _scheduler: Any
    _step_in_update: int
    _stop_training: bool
    _count_batches: Callable[[], int]
    _gradient_norm: float | Tensor | None
    gradient_norm: Callable[[], float | None]
    share_generator: Callable[[], None]

    on_boundary: Callable[[Boundary], None] | None = None
    resumption: Resumption | None = None
    part = 0

    def reach(self, boundary: Boundary) -> None:
        """Call what is to be called at a boundary."""
        if self.on_boundary is not None:
            self.on_boundary(boundary)

    def can_save(self, boundary: Boundary) -> Literal["now", "soon", "no"]:
        """Whether the values at this boundary are complete: now, at one that follows soon, or not in this epoch."""
        online = self.benchmark is not None and self.benchmark.online is not None
        if boundary in ("begin", "part") or online:
            return "now" if boundary == "part" else "soon"
        if boundary != "step":
            return "now"
        if self._own_loader is None or self.dataloader is not self._own_loader:
            return "no"  # the order of Avalanche's loader depends on draws in between
        between_updates = self._step_in_update == 0
        # After the last batch the end of the epoch follows, which is simpler to resume at.
        return "now" if between_updates and int(self.clock.train_epoch_iterations) < self._count_batches() else "soon"

    def position(self, boundary: Boundary, *, experience: int, step: int) -> Position:
        """Return the present position.

        Args:
            boundary: Where the strategy is.
            experience: Index of the experience.
            step: Its steps so far.
        """
        inside = boundary != "part"
        return Position(
            experience=experience,
            part=self.part,
            epoch=int(self.clock.train_exp_epochs) if inside else 0,
            batch=int(self.clock.train_epoch_iterations) if boundary == "step" else 0,
            step=step,
            trained=boundary == "trained",
        )

    def capture(self, boundary: Boundary) -> dict[str, Any]:
        """Return the present values as a checkpoint stores them, without copying tensors.

        Raises:
            RunFolderError: A component's state that a checkpoint cannot hold.
        """
        network = self.learner.network
        parameters = dict(network.named_parameters())
        inside_epoch = boundary == "step"
        return {
            "network": dict(network.state_dict()),
            "frozen": [name for name, parameter in parameters.items() if not parameter.requires_grad],
            "training": [part.training for part in network.modules()],
            "learner": encode(self.learner.state_dict(), live={id(p): name for name, p in parameters.items()}),
            "optimizer": encode(self.optimizer.state_dict()),
            "scheduler": None if self._scheduler is None else encode(self._scheduler.state_dict()),
            "precision": encode(self._precision.state_dict()),
            "clock": {name: int(getattr(self.clock, name)) for name in _CLOCK},
            "stop": bool(self._stop_training),
            "epoch_metrics": dict(self.epoch_metrics),
            "gradient_norm": self.gradient_norm(),
            "metrics": None if self._metrics is None else self._metrics.state_dict(),
            "early_stopping": None if self.early_stopping is None else self.early_stopping.state_dict(),
            "augmentation": self._own_loader.augmentation_state() if inside_epoch else None,
            "trainer": None if self._trainer is None else trainer_state(self._trainer, inside_epoch=inside_epoch),
            "generators": generator_states(),
        }

    def restore(self, content: Mapping[str, Any]) -> None:
        """Set the values that :meth:`capture` has returned, of an experience that has begun.

        Values of an epoch are set only after it has begun, so inside an epoch this is called before and after that:
        ``before_epoch`` of a component may read any of the others. ``content`` stays as it is.
        """
        network = self.learner.network
        network.load_state_dict(content["network"])
        frozen = set(content["frozen"])
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name not in frozen)
        for part, training in zip(network.modules(), content["training"], strict=True):
            part.training = training
        self.learner.load_state_dict(decode(copy.deepcopy(content["learner"]), network))
        self._restore_optimizer(content)
        for name in _CLOCK:
            setattr(self.clock, name, content["clock"][name])
        self._stop_training = content["stop"]
        self.epoch_metrics = dict(content["epoch_metrics"])
        self._gradient_norm = content.get("gradient_norm")  # missing in checkpoints of an early version
        if self._metrics is not None:
            self._metrics.load_state_dict(content["metrics"])
        if self.early_stopping is not None:
            self.early_stopping.load_state_dict(content["early_stopping"])
        set_generator_states(content["generators"])
        self.share_generator()

    def enter_part(self, part: int, experience: Any, content: Mapping[str, Any]) -> None:
        """Continue an online stream after its first ``part`` small experiences.

        Args:
            part: Their number.
            experience: The first of them, with which an experience whose boundaries are known begins.
            content: What :meth:`capture` returned.
        """
        self.part = part
        if getattr(experience, "access_task_boundaries", False):
            self.experience = experience
            self.check_model_and_optimizer()  # type: ignore[attr-defined]
            self._part = part - 1
        self.restore(content)

    def _restore_optimizer(self, content: Mapping[str, Any]) -> None:
        parameters = list(self.learner.network.parameters())
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if known != {id(p) for p in parameters}:  # loading has replaced those of classifiers of another size
            assert self.module is not None
            self.optimizer = self.module.new_optimizer()
        # Loading takes the tensors over, and the optimizer writes to them.
        self.optimizer.load_state_dict(copy.deepcopy(content["optimizer"]))
        if self._scheduler is not None:
            self._scheduler.load_state_dict(copy.deepcopy(content["scheduler"]))
        if content["precision"]:
            self._precision.load_state_dict(content["precision"])

    @property
    def _trainer(self) -> Any:
        """The Lightning Trainer of the present fit; None outside one."""
        return getattr(self.module, "_trainer", None) if self.engine_name == "trainer" else None

    @property
    def _precision(self) -> Any:
        """The precision plugin, which holds the scale of gradients."""
        return self.fabric._precision if self._trainer is None else self._trainer.precision_plugin
