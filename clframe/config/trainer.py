"""The block ``trainer`` of a config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from clframe.config.checks import LARGEST_FLOAT, require, require_at_least, typed_block
from clframe.config.named import LOGGERS, lightning_loggers
from clframe.config.periods import Period, parse_period
from clframe.errors import ConfigError, UnknownNameError, unknown_name

MOST_THREADS = 1024
"""Bound on CPU threads: far more than a machine can use; OpenMP crashes at much larger numbers."""
PRECISIONS = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"]
Automatic = Literal["auto"] | bool
"""``auto`` is replaced by the choice for the device of a run, in the run's own config."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints inside an experience, next to the one that every finished experience gets."""

    every: int | str | None = "5min"
    """Period: a number of steps, a time such as 90s, 5min or 2h, or null for none inside an experience.

    A period in steps also writes one at the end of each epoch. One in time does so if a tenth of it has passed, and
    spends at most 2 % of the time on writing.
    """

    @typed_block("trainer.checkpoint")
    def __post_init__(self) -> None:
        """Refuse anything but a period."""
        _ = self.period

    @property
    def period(self) -> Period | None:
        """The period; None for none."""
        return parse_period(self.every, where="trainer.checkpoint.every")


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Exponential moving average of the weights: training continues with the weights, everything else uses the average.

    Evaluation, checkpoints, predictions, and what components compute after an experience (teachers, importances,
    prototypes, thresholds). Statistics of batch normalization are averaged too. ``trainer.ema=0.999`` sets ``decay``.
    """

    shorthand: ClassVar[str] = "decay"

    decay: float | None = None
    """Weight of the average in each update, between 0 and 1, such as 0.999; null keeps no average."""
    warmup: bool = True
    """Update n of the run has the decay min(decay, n / (n + 9)), so that the first 1 / (1 - decay) updates do not show
    the initial weights."""

    @typed_block("trainer.ema")
    def __post_init__(self) -> None:
        """Refuse decays that would keep no average, or never change it."""
        require(self.decay is None or 0 < self.decay < 1, "trainer.ema.decay", self.decay,
                 "give a number between 0 and 1 such as 0.999, or null for no average")  # fmt: skip
        require(self.decay is not None or self.warmup, "trainer.ema.warmup", self.warmup, "set trainer.ema.decay too")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """Cost of training on each experience, instead of a number of epochs.

    Counted are forward and backward passes, replayed samples, teachers, loss terms, and what components compute before
    and after training; not the evaluation. As many steps are taken as the budget affords, in epochs of which the last
    one may be cut; cosine and linear schedules end with them. ``trainer.budget=2e12`` sets ``macs``.
    """

    shorthand: ClassVar[str] = "macs"

    macs: float | None = None
    """Multiply-adds of each experience; null sets no budget."""
    relative: float | None = None
    """The same as a multiple of what ``naive`` costs without exits in ``trainer.epochs`` epochs of the experience."""

    @typed_block("trainer.budget")
    def __post_init__(self) -> None:
        """Refuse two budgets, and budgets that are not positive."""
        for key in ("macs", "relative"):
            value = getattr(self, key)
            allowed = value is None or 0 < value < LARGEST_FLOAT
            require(allowed, f"trainer.budget.{key}", value, "give a number above 0")
        require(self.macs is None or self.relative is None, "trainer.budget.relative", self.relative,
                 "leave out trainer.budget.macs, or this")  # fmt: skip

    @property
    def is_set(self) -> bool:
        """Whether there is a budget."""
        return self.macs is not None or self.relative is not None


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Memory for what a strategy keeps between experiences, which sets the size of its replay buffer.

    Counted are the tensors in the states of all components after each experience: stored samples with their labels and
    logits, teachers, importances. ``trainer.memory=2e6`` sets ``bytes``.
    """

    shorthand: ClassVar[str] = "bytes"

    bytes: float | None = None
    """The most bytes after any experience; null leaves the option ``memory`` of the component as it is."""

    @typed_block("trainer.memory")
    def __post_init__(self) -> None:
        """Refuse sizes that are not positive."""
        allowed = self.bytes is None or 0 < self.bytes < LARGEST_FLOAT
        require(allowed, "trainer.memory.bytes", self.bytes, "give a number above 0")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Training: engine, device, precision, epochs, batches, logging."""

    engine: Literal["fabric", "trainer"] = "fabric"
    """``fabric``: Avalanche's loop on Lightning Fabric; ``trainer``: one Lightning Trainer per experience."""
    accelerator: Literal["auto", "cpu", "cuda", "gpu", "mps"] = "auto"
    devices: int | tuple[int, ...] = 1
    """Number of devices, or indices of GPUs such as [1] or [0, 2]. Several train one model, with a process for each."""
    strategy: Literal["auto", "ddp"] = "auto"
    """Division of the training among several devices: ``ddp``, also chosen by ``auto``, gives each a part of a batch
    and averages the gradients. See docs/scaling.md."""
    sync_batchnorm: bool = False
    """Whether batch normalization uses the statistics of the whole batch rather than of a device's part; on GPUs."""
    precision: PRECISIONS = "32-true"
    epochs: int = 10
    """Epochs per experience."""
    batch_size: int = 32
    """New samples per step, over all devices."""
    drop_last: bool = False
    """Leave out the last batch of an epoch if it is smaller; otherwise a last batch of one sample is joined to the one
    before it where batch normalization could not train on it."""
    eval_batch_size: int | Literal["auto"] = "auto"
    """Samples per batch of an evaluation; ``auto`` takes 256, and on CUDA up to 1,024 where the inputs are small."""
    gradient_clip: float | None = None
    """Maximum gradient norm; null does not clip."""
    on_nonfinite: Literal["stop", "warn", "skip"] = "stop"
    """Reaction to losses, gradients or weights that are not finite.

    ``stop`` ends the run, ``warn`` trains on and marks its results: both check losses at log entries and weights after
    each experience, never inside a step. ``skip`` checks loss and gradients of every batch, makes no update from those
    that are not finite, and counts the updates left out. That synchronizes with the device at every step.
    """
    accumulate: int = 1
    """Number of batches whose gradients are accumulated for each update."""
    eval_every: int = -1
    """Evaluate on the experience's test data every n epochs, for TensorBoard; -1 is never."""
    log_every: int = 20
    """Steps between two log entries of losses and learning rate; no device synchronization in between."""
    figures: Literal["end", "experience", "none"] = "end"
    """When figures are drawn, in TensorBoard and in the run's ``figures``: once at the end, TensorBoard's after every
    experience, or never. ``clframe report RUN`` draws those of any run."""
    record_activity: bool | None = None
    """Record active neurons and experts after each experience, on at most 2,048 test samples; null does so where the
    strategy has ``sparsity`` or ``moe``."""
    fast_dev_run: bool | int = False
    """Development run, to test a setup: one epoch of two batches per experience (two where a strategy needs them, such
    as ``exits(regime=disjoint)``), and evaluation of two batches per experience. ``true`` runs the first
    experience; a number runs as many. Replay and distillation begin in the second."""
    threads: int | None = None
    """CPU threads; null is torch's choice. Small models are fastest with 1."""
    channels_last: Automatic = "auto"
    """Use the channels-last memory format for images and convolutions; ``auto`` does so on CUDA, where it is faster."""
    deterministic: Automatic = "auto"
    """Use deterministic operations only, so that a seed reproduces the same numbers; ``auto`` does so except on CUDA.

    Without it, CUDA uses the algorithms of convolutions that are measured to be the fastest, and TF32 in products of
    float32 matrices: two runs differ in the last digits.
    """
    capture: Automatic = "auto"
    """Record training steps as CUDA graphs, which are replayed without Python in between.

    ``auto`` does so on CUDA where every component and plugin allows it, and says once which one does not; ``true``
    refuses such a strategy.
    """
    compile: bool = False
    """Compile the network's stages by ``torch.compile``, once: they remain compiled while the heads of the exits grow.

    Losses, heads and update are not compiled. Compiling takes seconds to minutes when training begins, which log and
    ledger state; it needs a C++ compiler on a CPU, a C compiler and Triton on CUDA.
    """
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints inside an experience."""
    ema: AverageConfig = field(default_factory=AverageConfig)
    """Average of the weights, with which a run evaluates and predicts."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """Cost of training on each experience; ``epochs`` is then only what ``relative`` refers to."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Memory for replay buffer, teachers and importances together; sets the option ``memory`` of the buffer's owner."""
    progress: bool = True
    """Show a progress bar if the output is a terminal."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Lightning callbacks by class name, or own ones by dotted path, each with its options; all but EarlyStopping
    require ``engine: trainer``.

    EarlyStopping monitors ``train/loss``, or with ``benchmark.validation`` ``validation/loss`` and
    ``validation/accuracy``.
    """
    loggers: tuple[str | dict[str, Any], ...] = LOGGERS
    """``tensorboard`` and ``csv``; Lightning's own logger classes require ``engine: trainer``.

    An entry is a name, or a mapping of a name to its options, such as ``{WandbLogger: {offline: true}}``.
    """

    @typed_block("trainer")
    def __post_init__(self) -> None:
        """Refuse impossible sizes and callbacks that the engine would not call."""
        for key in ("epochs", "batch_size", "eval_batch_size", "accumulate", "log_every"):
            value = getattr(self, key)
            if value != "auto":
                require_at_least(1, f"trainer.{key}", value)
        require(self.fast_dev_run >= 0, "trainer.fast_dev_run", self.fast_dev_run,
                 "give true, false or a number of experiences")  # fmt: skip
        threads_ok = self.threads is None or 1 <= self.threads <= MOST_THREADS
        require(threads_ok, "trainer.threads", self.threads, f"give a number from 1 to {MOST_THREADS} or null")
        clip_ok = self.gradient_clip is None or self.gradient_clip > 0
        require(clip_ok, "trainer.gradient_clip", self.gradient_clip, "give a number above 0 or null")
        require(self.eval_every == -1 or self.eval_every > 0, "trainer.eval_every", self.eval_every,
              "give -1 (never) or a number of epochs")  # fmt: skip
        if isinstance(self.devices, tuple):
            indices_ok = bool(self.devices) and min(self.devices) >= 0 and len(set(self.devices)) == len(self.devices)
            require(indices_ok, "trainer.devices", self.devices, "give indices of different GPUs, such as [0, 1]")
        else:
            require_at_least(1, "trainer.devices", self.devices)
        require(self.figures != "experience" or "tensorboard" in self.loggers, "trainer.figures", self.figures,
                 "add tensorboard to trainer.loggers or give end")  # fmt: skip
        require(not (self.compile and self.sync_batchnorm), "trainer.compile", self.compile,
                 "set trainer.sync_batchnorm=false, whose communication cannot be compiled")  # fmt: skip
        if self.budget.is_set:
            for key, used, advice in (
                ("engine", self.engine == "trainer", "trainer.engine=fabric"),
                ("callbacks", "EarlyStopping" in self.callbacks, "no EarlyStopping, which would leave a part of it"),
                ("eval_every", self.eval_every != -1, "trainer.eval_every=-1"),
                ("fast_dev_run", bool(self.fast_dev_run), "no development run, which takes two steps"),
            ):
                require(not used, f"trainer.{key}", getattr(self, key), f"with trainer.budget give {advice}")
        loggers = lightning_loggers(self.loggers)
        for name, _ in loggers:
            if not name.endswith("Logger"):
                raise UnknownNameError(unknown_name("logger", name, LOGGERS, where="trainer.loggers"))
        callbacks = [("callbacks", name) for name in self.callbacks if name != "EarlyStopping"]
        for key, name in [*callbacks, *(("loggers", name) for name, _ in loggers)]:
            if self.engine != "trainer":
                raise ConfigError(
                    f"trainer.{key}: {name} needs a Lightning Trainer, which engine '{self.engine}' does not have; "
                    f"set trainer.engine=trainer or leave it out"
                )
