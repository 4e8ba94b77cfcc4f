"""The config schema: typed dataclasses, each checked when it is made.

The block ``components.avalanche`` lists Avalanche plugins by class name, each with its options. It is not a component
and not part of the strategy expression: the plugins run next to the components.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from clframe.config.optimizers import check_arguments, optimizer_arguments, optimizer_name
from clframe.config.periods import Period, parse_period
from clframe.errors import ConfigError, Problems, UnknownNameError, nearest, unknown_name
from clframe.options import convert, format_value
from clframe.own_code import is_allowed, is_dotted

BLOCK = "avalanche"
"""The key in ``components`` that is reserved for Avalanche plugins."""
WHERE = f"components.{BLOCK}.plugins"
_EXAMPLE = "[LwFPlugin, {EWCPlugin: {ewc_lambda: 0.1}}]"


def named_plugins(components: Mapping[str, Mapping[str, Any]]) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Class names and options of the Avalanche plugins in a config's ``components``, in order.

    Raises:
        ConfigError: The block has another key, or an entry is neither a name nor a name with options.

    >>> named_plugins({"avalanche": {"plugins": ["LwFPlugin", {"EWCPlugin": {"ewc_lambda": 0.1}}]}})
    (('LwFPlugin', {}), ('EWCPlugin', {'ewc_lambda': 0.1}))
    """
    block = components.get(BLOCK, {})
    for key in block:
        if key != "plugins":
            close = f"did you mean 'plugins'? it is a list such as {_EXAMPLE}"
            advice = close if nearest(str(key), ["plugins"]) else f"give plugins: {_EXAMPLE}"
            raise ConfigError(f"components.{BLOCK}.{key}: unknown key; {advice}")
    listed = block.get("plugins", [])
    if not isinstance(listed, (list, tuple)):
        raise ConfigError(f"{WHERE}: found {format_value(listed)}; give a list such as {_EXAMPLE}")
    return tuple(_read_named(entry, f"{WHERE}[{i}]") for i, entry in enumerate(listed))


def lightning_loggers(loggers: Sequence[Any]) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Class names and options of the entries of ``trainer.loggers`` that are loggers of Lightning.

    >>> lightning_loggers(["csv", {"WandbLogger": {"offline": True}}])
    (('WandbLogger', {'offline': True}),)
    """
    example = "[csv, {WandbLogger: {offline: true}}]"
    named = [_read_named(entry, f"trainer.loggers[{i}]", example) for i, entry in enumerate(loggers)]
    for i, (name, options) in enumerate(named):
        if name in LOGGERS and options:
            raise ConfigError(f"trainer.loggers[{i}].{name}: found {format_value(options)}; it takes no options")
    return tuple((name, options) for name, options in named if name not in LOGGERS)


def _read_named(entry: Any, where: str, example: str = _EXAMPLE) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ConfigError(f"{where}: found {format_value(entry)}; give a name, or one with options as in {example}")
    ((name, options),) = entry.items()
    if not isinstance(options, (dict, type(None))):
        raise ConfigError(f"{where}.{name}: found {format_value(options)}; give a mapping of its options")
    return str(name), {str(key): value for key, value in (options or {}).items()}


_PROBLEMS: ContextVar[Problems | None] = ContextVar("problems", default=None)


@contextmanager
def _every_check() -> Iterator[None]:
    """Collect the problems that :func:`_require` finds in the block, and raise them together at its end."""
    problems = Problems()
    token = _PROBLEMS.set(problems)
    try:
        with problems.attempt():
            yield
    finally:
        _PROBLEMS.reset(token)
    problems.raise_found()


def _require(ok: bool, key: str, found: Any, advice: str) -> None:
    if ok:
        return
    error, problems = ConfigError(f"{key}: found {format_value(found)}; {advice}"), _PROBLEMS.get()
    if problems is None:
        raise error
    if not any(str(other).startswith(f"{key}: ") for other in problems.found):  # one problem of a key is enough
        problems.add(error)


def _require_at_least(low: float, key: str, found: float) -> None:
    _require(found >= low, key, found, f"give at least {low}")


MOST_WORKERS = 256
"""Bound on ``benchmark.workers``: each worker is a process that imports torch."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """The data and how it is split into experiences."""

    name: str = ""
    """A data set; ``clframe list benchmarks`` shows them."""
    protocol: Literal["class_incremental", "task_incremental", "permuted", "rotated"] = "class_incremental"
    """``class_incremental``: new classes in every experience; ``task_incremental``: also task labels.

    ``permuted`` and ``rotated``: all classes in every experience, with permuted pixels or rotated images.
    """
    classes: int | None = None
    """Use only the first n classes of the data set; null uses all."""
    experiences: int = 5
    """Number of experiences, including a larger first one; remaining classes go to the earliest ones."""
    first: int | None = None
    """Number of classes in the first experience; null splits evenly."""
    counts: tuple[int, ...] = ()
    """Number of classes in each experience; overrides ``experiences``."""
    class_order: Literal["seeded", "sorted", "icarl"] | tuple[int, ...] = "seeded"
    """Order of classes: shuffled by the seed, ascending, iCaRL's order of 100 classes, or a list of ids."""
    angles: tuple[float, ...] = ()
    """Angle of each experience of ``rotated`` in degrees, overrides ``experiences``; empty: evenly from 0 to 180."""
    validation: float = 0.0
    """Fraction of the training samples of each class held out for validation."""
    evaluate: Literal["test", "validation"] = "test"
    """Data on which accuracy is measured; choose hyper-parameters on ``validation``."""
    online: int | None = None
    """Samples per small experience of an online stream, in which each sample is seen once; null is offline."""
    boundaries: bool = True
    """Whether an online stream marks where experiences begin and end."""
    blurry: float = 0.0
    """Fraction of an experience over which an online stream blends into the next; 0 is a sharp boundary."""
    augment: str | tuple[str, ...] | None = None
    """Augmentation of training images: ``crop``, ``flip``, ``jitter``, ``cifar`` (crop and flip), or a list in order;
    null is none."""
    workers: int | None = None
    """Worker processes for data that is not in memory; null chooses by CPU count, 0 reads in the main process."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the data set."""

    @_every_check()
    def __post_init__(self) -> None:
        """Refuse values that no data set can satisfy and keys that the protocol ignores."""
        _require(bool(self.name), "benchmark.name", self.name, "give a name from clframe list benchmarks")
        _require_at_least(1, "benchmark.experiences", self.experiences)
        _require(0 <= self.validation < 1, "benchmark.validation", self.validation, "give a fraction from 0, below 1")
        _require(self.evaluate == "test" or self.validation > 0, "benchmark.evaluate", self.evaluate,
              "hold data out for it, such as benchmark.validation=0.1")  # fmt: skip
        if self.online is not None:
            _require_at_least(1, "benchmark.online", self.online)
        _require(0 <= self.blurry <= 1, "benchmark.blurry", self.blurry, "give a fraction from 0 to 1")
        workers_ok = self.workers is None or 0 <= self.workers <= MOST_WORKERS
        _require(workers_ok, "benchmark.workers", self.workers, f"give a number from 0 to {MOST_WORKERS} or null")
        by_class = self.protocol in ("class_incremental", "task_incremental")
        all_classes = f"leave it out, every {self.protocol} experience has all classes"
        for key, value, unset, read, advice in (
            ("first", self.first, None, by_class, all_classes),
            ("counts", self.counts, (), by_class, all_classes),
            ("class_order", self.class_order, "seeded", by_class, all_classes),
            ("angles", self.angles, (), self.protocol == "rotated", "set benchmark.protocol=rotated"),
            ("boundaries", self.boundaries, True, self.online is not None, "set benchmark.online"),
            ("blurry", self.blurry, 0.0, self.online is not None, "set benchmark.online"),
        ):
            _require(read or value == unset, f"benchmark.{key}", value, advice)


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The backbone."""

    name: str = ""
    """A backbone; ``clframe list backbones`` shows them."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the backbone."""

    @_every_check()
    def __post_init__(self) -> None:
        """Require a name."""
        _require(bool(self.name), "backbone.name", self.name, "give a name from clframe list backbones")


LARGEST_FLOAT = 3.4e38
"""Larger numbers overflow in float32."""
DEFAULT_GAMMA = 0.1


Rate = float | dict[str, float]
"""A learning rate, or those of the ``first`` and of all ``later`` experiences."""

Automatic = Literal["auto"] | bool
"""``auto`` is replaced by the choice for the device of a run, in the run's own config."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer; every experience starts with a new one.

    The keys below and the options of its constructor in ``torch.optim``, such as ``nesterov``, ``eps``, ``amsgrad``,
    ``alpha``; those that are not given have torch's defaults, except for ``lr`` and ``weight_decay``.
    """

    name: str = "sgd"
    """A class of ``torch.optim`` in any case (sgd, adam, adamw, rmsprop, nadam, adagrad ...), or the dotted path of an
    own one with ``--allow-imports``."""
    lr: Rate = 0.05
    """Learning rate at the start of every experience, after warmup.

    ``{first: 0.1, later: 0.01}`` gives the first experience of the stream another one than all later ones.
    """
    momentum: float = 0.0
    """Momentum of ``sgd`` and ``rmsprop``."""
    betas: tuple[float, float] | None = None
    """Decay rates of the two moments of ``adam``, ``adamw``, ``adamax``, ``nadam`` and ``radam``; null is torch's [0.9,
    0.999]."""
    weight_decay: float = 0.0
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings of some of the parameters: ``backbone``; ``heads``, the classifiers of all exits; or the name of a
    component, for the modules that it adds to the network. Keys are ``lr``, ``weight_decay``, ``momentum``, ``betas``
    and options of the optimizer; what a group leaves out, and parameters in no group, follow the block. Schedule and
    warmup multiply the rates of all groups."""
    schedule: Literal["constant", "cosine", "multistep", "step", "exponential", "linear", "plateau"] = "constant"
    """Learning-rate schedule over the epochs of one experience; ``cosine`` and ``linear`` fall to 0 at its end."""
    milestones: tuple[int, ...] = ()
    """Epochs after which ``multistep`` multiplies the rate by ``gamma``."""
    step: int | None = None
    """Number of epochs after which ``step`` multiplies the rate by ``gamma``, again and again."""
    gamma: float = DEFAULT_GAMMA
    """Factor of ``multistep`` and ``step``, and that of ``exponential`` after every epoch, which has no default."""
    factor: float | None = None
    """Factor by which ``plateau`` multiplies the rate when the loss stops falling; null is a third, as in FACIL.

    It follows the validation loss if ``benchmark.validation`` is set, else the training loss.
    """
    patience: int | None = None
    """Epochs without improvement after which ``plateau`` lowers the rate; null is 5, as in FACIL."""
    fused: Automatic = "auto"
    """Update all weights in one kernel; ``auto`` does so on CUDA with ``sgd``, ``adam`` and ``adamw``, except in
    16-mixed."""
    warmup: int = 0
    """Epochs over which the rate first rises linearly to its scheduled value."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of the optimizer."""

    def __post_init__(self) -> None:
        """Refuse rates that cannot train and settings that would be ignored."""
        with _every_check():
            object.__setattr__(self, "name", optimizer_name(self.name))
            _check_rate(self.lr, "optimizer.lr")
            readable = not is_dotted(self.name) or is_allowed(self.name)
            if readable:  # else the run is refused, but its config can be read
                self._check_algorithm()
            self._check_schedule()
        if not readable:
            return
        object.__setattr__(self, "options", self._checked(self.options, "optimizer"))
        groups = {name: self._checked_group(name, given) for name, given in self.groups.items()}
        object.__setattr__(self, "groups", groups)

    def _check_algorithm(self) -> None:
        known, name = optimizer_arguments(self.name), self.name
        _require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "give a number from 0 to below 1")
        other = "betas" if "betas" in known else "no momentum"
        _require(not self.momentum or "momentum" in known, "optimizer.momentum", self.momentum,
                 f"leave it out ({name} has {other}) or set optimizer.name=sgd")  # fmt: skip
        if self.betas is not None:
            _require("betas" in known, "optimizer.betas", self.betas, f"leave it out ({name} has no betas)")
            in_range = all(0 <= beta < 1 for beta in self.betas)
            _require(in_range, "optimizer.betas", self.betas, "give two numbers from 0 to below 1")
        _require_at_least(0, "optimizer.weight_decay", self.weight_decay)
        _require(not self.weight_decay or "weight_decay" in known, "optimizer.weight_decay", self.weight_decay,
                 f"leave it out ({name} has none)")  # fmt: skip
        _require(self.fused is not True or "fused" in known, "optimizer.fused", self.fused,
                 f"{name} has no fused update; leave it out")  # fmt: skip
        for key in ("weight_decay", "gamma"):
            _require(getattr(self, key) <= LARGEST_FLOAT, f"optimizer.{key}", getattr(self, key),
                     "which overflows float32; give a smaller number")  # fmt: skip

    def _check_schedule(self) -> None:
        _require(self.gamma > 0, "optimizer.gamma", self.gamma, "give a number above 0")
        _require(self.schedule != "exponential" or self.gamma != DEFAULT_GAMMA, "optimizer.gamma", self.gamma,
                 "give exponential a factor per epoch such as 0.9, or set schedule=step and step=1")  # fmt: skip
        _require_at_least(0, "optimizer.warmup", self.warmup)
        ordered = list(self.milestones) == sorted(set(self.milestones)) and min(self.milestones, default=1) > 0
        _require(ordered, "optimizer.milestones", self.milestones, "give rising epoch numbers from 1")
        for key, value, schedule in (("milestones", self.milestones, "multistep"), ("step", self.step, "step")):
            used = self.schedule == schedule
            advice = "give a value" if used else f"leave it out or set optimizer.schedule={schedule}"
            _require(bool(value) == used, f"optimizer.{key}", value, advice)
        _require(self.step is None or self.step > 0, "optimizer.step", self.step, "give at least 1")
        for key in ("factor", "patience"):
            unread = self.schedule != "plateau" and getattr(self, key) is not None
            _require(not unread, f"optimizer.{key}", getattr(self, key),
                     "leave it out or set optimizer.schedule=plateau")  # fmt: skip
        factor_ok = self.factor is None or 0 < self.factor < 1
        _require(factor_ok, "optimizer.factor", self.factor, "give a number between 0 and 1")
        _require(self.patience is None or self.patience >= 0, "optimizer.patience", self.patience, "give at least 0")
        _require(not self.warmup or self.schedule != "plateau", "optimizer.warmup", self.warmup,
                 "leave it out: plateau sets the rate from the losses alone")  # fmt: skip

    def _checked(self, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        return check_arguments(self.name, given, where=where, base=self.torch_options())

    def _checked_group(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        where = f"optimizer.groups.{name}"
        _require(bool(given), where, dict(given), "give it a setting such as lr, or leave it out")
        for key in ("fused", "foreach"):
            _require(key not in given, f"{where}.{key}", given.get(key), "set it for the whole optimizer")
        checked = self._checked({key: value for key, value in given.items() if key != "lr"}, where)
        if "lr" not in given:
            return checked
        rate = convert(given["lr"], Rate, where=f"{where}.lr")
        _check_rate(rate, f"{where}.lr")
        return {"lr": rate, **checked}

    def torch_options(self) -> dict[str, Any]:
        """Arguments of the constructor, with the rate of the first experience, without ``fused`` and groups."""
        known = optimizer_arguments(self.name)
        values: dict[str, Any] = {"lr": rate_of(self.lr, 0)}
        for key in ("weight_decay", "momentum", "betas"):
            if key in known and getattr(self, key) is not None:
                values[key] = getattr(self, key)
        return {**values, **self.options}


def rate_of(rate: float | Mapping[str, float], experience: int) -> float:
    """The learning rate of the experience with this index in the stream.

    >>> rate_of(0.1, 3), rate_of({"first": 0.1, "later": 0.01}, 0), rate_of({"first": 0.1, "later": 0.01}, 3)
    (0.1, 0.1, 0.01)
    """
    if isinstance(rate, Mapping):
        return rate["later" if experience else "first"]
    return rate


def _check_rate(rate: float | Mapping[str, float], where: str) -> None:
    if isinstance(rate, Mapping):
        _require(set(rate) == {"first", "later"}, where, dict(rate), "give {first: RATE, later: RATE}, or one rate")
    for key, value in rate.items() if isinstance(rate, Mapping) else (("", rate),):
        place = f"{where}.{key}" if key else where
        _require(value > 0, place, value, "give a number above 0")
        _require(value <= LARGEST_FLOAT, place, value, "which overflows float32; give a smaller number")


LOGGERS = ("tensorboard", "csv")
"""Loggers available in both engines."""
MOST_THREADS = 1024
"""Bound on CPU threads: far more than a machine can use; OpenMP crashes at much larger numbers."""
PRECISIONS = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints inside an experience, next to the one that every finished experience gets."""

    every: int | str | None = "5min"
    """Period: a number of steps, a time such as 90s, 5min or 2h, or null for none inside an experience.

    A period in steps also writes one at the end of each epoch. One in time does so if a tenth of it has passed, and
    spends at most 2 % of the time on writing.
    """

    @_every_check()
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

    @_every_check()
    def __post_init__(self) -> None:
        """Refuse decays that would keep no average, or never change it."""
        _require(self.decay is None or 0 < self.decay < 1, "trainer.ema.decay", self.decay,
                 "give a number between 0 and 1 such as 0.999, or null for no average")  # fmt: skip
        _require(self.decay is not None or self.warmup, "trainer.ema.warmup", self.warmup, "set trainer.ema.decay too")


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

    @_every_check()
    def __post_init__(self) -> None:
        """Refuse two budgets, and budgets that are not positive."""
        for key in ("macs", "relative"):
            value = getattr(self, key)
            allowed = value is None or 0 < value < LARGEST_FLOAT
            _require(allowed, f"trainer.budget.{key}", value, "give a number above 0")
        _require(self.macs is None or self.relative is None, "trainer.budget.relative", self.relative,
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

    @_every_check()
    def __post_init__(self) -> None:
        """Refuse sizes that are not positive."""
        allowed = self.bytes is None or 0 < self.bytes < LARGEST_FLOAT
        _require(allowed, "trainer.memory.bytes", self.bytes, "give a number above 0")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Training: engine, device, precision, epochs, batches, logging."""

    engine: Literal["fabric", "trainer"] = "fabric"
    """``fabric``: Avalanche's loop on Lightning Fabric; ``trainer``: one Lightning Trainer per experience."""
    accelerator: Literal["auto", "cpu", "cuda", "gpu", "mps"] = "auto"
    devices: int | tuple[int, ...] = 1
    """Number of devices, or indices of GPUs such as [1] or [0, 2]. Several train one model, with a process for each."""
    strategy: Literal["auto", "ddp"] = "auto"
    """How several devices share the training: ``ddp``, also chosen by ``auto``, gives each a part of every batch and
    averages the gradients. See docs/scaling.md."""
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
    """What to do when losses, gradients or weights are not finite.

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
    as ``exits(regime=disjoint)``), and evaluation of two batches per experience. ``true`` runs the first two
    experiences, since replay and distillation begin in the second; a number runs as many."""
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

    ``auto`` does so on one CUDA device where every component and plugin allows it, and says once which one does not;
    ``true`` also does so on several, and refuses such a strategy.
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

    @_every_check()
    def __post_init__(self) -> None:
        """Refuse impossible sizes and callbacks that the engine would not call."""
        for key in ("epochs", "batch_size", "eval_batch_size", "accumulate", "log_every"):
            value = getattr(self, key)
            if value != "auto":
                _require_at_least(1, f"trainer.{key}", value)
        _require(self.fast_dev_run >= 0, "trainer.fast_dev_run", self.fast_dev_run,
                 "give true, false or a number of experiences")  # fmt: skip
        threads_ok = self.threads is None or 1 <= self.threads <= MOST_THREADS
        _require(threads_ok, "trainer.threads", self.threads, f"give a number from 1 to {MOST_THREADS} or null")
        clip_ok = self.gradient_clip is None or self.gradient_clip > 0
        _require(clip_ok, "trainer.gradient_clip", self.gradient_clip, "give a number above 0 or null")
        _require(self.eval_every == -1 or self.eval_every > 0, "trainer.eval_every", self.eval_every,
              "give -1 (never) or a number of epochs")  # fmt: skip
        if isinstance(self.devices, tuple):
            indices_ok = bool(self.devices) and min(self.devices) >= 0 and len(set(self.devices)) == len(self.devices)
            _require(indices_ok, "trainer.devices", self.devices, "give indices of different GPUs, such as [0, 1]")
        else:
            _require_at_least(1, "trainer.devices", self.devices)
        _require(self.figures != "experience" or "tensorboard" in self.loggers, "trainer.figures", self.figures,
                 "add tensorboard to trainer.loggers or give end")  # fmt: skip
        if self.budget.is_set:
            for key, used, advice in (
                ("engine", self.engine == "trainer", "trainer.engine=fabric"),
                ("callbacks", "EarlyStopping" in self.callbacks, "no EarlyStopping, which would leave a part of it"),
                ("eval_every", self.eval_every != -1, "trainer.eval_every=-1"),
                ("fast_dev_run", bool(self.fast_dev_run), "no development run, which takes two steps"),
            ):
                _require(not used, f"trainer.{key}", getattr(self, key), f"with trainer.budget give {advice}")
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


RENAMED = {"trainer": {"on_divergence": "on_nonfinite"}}
"""Present names of keys by former ones, by block: configs of earlier runs have these."""


@dataclass(frozen=True, kw_only=True)
class EarlierConfig:
    """Data that a run had learned before it was extended; written by ``clframe extend``."""

    run: str = ""
    """Folder of the run that learned it."""
    checkpoint: str = ""
    """The checkpoint that was extended; its file name."""
    sha256: str = ""
    """Digest of that file."""
    experiences: tuple[tuple[int, ...], ...] = ()
    """Classes of each of its experiences in learning order, numbered as in the results."""
    class_names: tuple[str, ...] = ()
    """Name of each class learned so far, by number; empty if unknown."""
    input_shape: tuple[int, ...] = ()
    dtype: str = ""
    """Type of the stored inputs, such as uint8; empty if unknown."""
    mean: tuple[float, ...] = ()
    """Normalization, which later data share."""
    std: tuple[float, ...] = ()
    inputs: dict[str, Any] = field(default_factory=dict)
    """Conversion of files to inputs."""
    benchmark: BenchmarkConfig
    """The data, as in the config of the run."""


LONGEST_NAME = 200
"""Bound on the length of a run's name in bytes; file systems allow 255."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A complete run."""

    name: str = "run"
    """Folder of the run under the output folder."""
    seed: int = 0
    """Seed of initialization, order of samples and classes, and replay buffers."""
    strategy: str = "naive"
    """Components joined by '+'."""
    components: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options by component name; ``avalanche`` lists Avalanche plugins."""
    imports: tuple[str, ...] = ()
    """Own components and metrics by dotted path, such as ``my_package.losses.Focal``, which are then used by name; each
    package has to be allowed with ``--allow-imports``."""
    earlier: tuple[EarlierConfig, ...] = ()
    """Data that come before ``benchmark`` in the stream of an extended run, oldest first."""
    benchmark: BenchmarkConfig
    backbone: BackboneConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    output: str = "runs"
    """Folder for run folders."""

    @_every_check()
    def __post_init__(self) -> None:
        """Refuse seeds, names and plugins that cannot work."""
        named_plugins(self.components)
        _require(0 <= self.seed < 2**63, "seed", self.seed, "give a whole number from 0 to 2**63 - 1")
        fine = bool(self.name) and not set(self.name) & set('/\\:*?"<>|') and self.name not in (".", "..")
        short = len(self.name.encode(errors="replace")) <= LONGEST_NAME and self.name.isprintable()
        _require(fine and short, "name", self.name, "give a short name that can be a folder name")
        _require(bool(self.output) and "\0" not in self.output, "output", self.output, "give a folder")
        for name in self.imports:
            _require(is_dotted(name), "imports", name, "give dotted paths such as my_package.losses.Focal")


OPEN_BLOCKS: dict[str, Callable[..., Any]] = {"benchmark": BenchmarkConfig, "backbone": BackboneConfig}
"""Blocks that contain options of the named backbone or benchmark next to their own keys."""

WITH_OPTIONS: dict[str, Callable[..., Any]] = {**OPEN_BLOCKS, "optimizer": OptimizerConfig}
"""Blocks with a key ``options``, whose entries are written next to the block's own keys."""
