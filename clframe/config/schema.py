"""The config schema: typed dataclasses, each checked when it is made.

The block ``components.avalanche`` lists Avalanche plugins by class name, each with its options. It is not a component
and not part of the strategy expression: the plugins run next to the components.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from clframe.config.checks import LARGEST_FLOAT, every_check, require, require_at_least, typed_block
from clframe.config.named import named_plugins
from clframe.config.optimizers import check_arguments, optimizer_arguments, optimizer_name
from clframe.config.trainer import (
    Automatic,
    TrainerConfig,
)
from clframe.options import convert, convert_fields
from clframe.own_code import is_allowed, is_dotted

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
    """Samples per small experience of an online stream, each trained for trainer.epochs (1: once); null is offline."""
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

    @typed_block("benchmark")
    def __post_init__(self) -> None:
        """Refuse values that no data set can satisfy and keys that the protocol ignores."""
        require(bool(self.name), "benchmark.name", self.name, "give a name from clframe list benchmarks")
        require_at_least(1, "benchmark.experiences", self.experiences)
        require(0 <= self.validation < 1, "benchmark.validation", self.validation, "give a fraction from 0, below 1")
        require(self.evaluate == "test" or self.validation > 0, "benchmark.evaluate", self.evaluate,
              "hold data out for it, such as benchmark.validation=0.1")  # fmt: skip
        if self.online is not None:
            require_at_least(1, "benchmark.online", self.online)
        require(0 <= self.blurry <= 1, "benchmark.blurry", self.blurry, "give a fraction from 0 to 1")
        workers_ok = self.workers is None or 0 <= self.workers <= MOST_WORKERS
        require(workers_ok, "benchmark.workers", self.workers, f"give a number from 0 to {MOST_WORKERS} or null")
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
            require(read or value == unset, f"benchmark.{key}", value, advice)


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The backbone."""

    name: str = ""
    """A backbone; ``clframe list backbones`` shows them."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the backbone."""

    @typed_block("backbone")
    def __post_init__(self) -> None:
        """Require a name."""
        require(bool(self.name), "backbone.name", self.name, "give a name from clframe list backbones")


DEFAULT_GAMMA = 0.1
Rate = float | dict[str, float]
"""A learning rate, or those of the ``first`` and of all ``later`` experiences."""


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
        """Refuse values of another type, rates that cannot train and settings that would be ignored."""
        convert_fields(self, where="optimizer")
        with every_check():
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
        require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "give a number from 0 to below 1")
        other = "betas" if "betas" in known else "no momentum"
        require(not self.momentum or "momentum" in known, "optimizer.momentum", self.momentum,
                 f"leave it out ({name} has {other}) or set optimizer.name=sgd")  # fmt: skip
        if self.betas is not None:
            require("betas" in known, "optimizer.betas", self.betas, f"leave it out ({name} has no betas)")
            in_range = all(0 <= beta < 1 for beta in self.betas)
            require(in_range, "optimizer.betas", self.betas, "give two numbers from 0 to below 1")
        require_at_least(0, "optimizer.weight_decay", self.weight_decay)
        require(not self.weight_decay or "weight_decay" in known, "optimizer.weight_decay", self.weight_decay,
                 f"leave it out ({name} has none)")  # fmt: skip
        require(self.fused is not True or "fused" in known, "optimizer.fused", self.fused,
                 f"{name} has no fused update; leave it out")  # fmt: skip
        for key in ("weight_decay", "gamma"):
            require(getattr(self, key) <= LARGEST_FLOAT, f"optimizer.{key}", getattr(self, key),
                     "which overflows float32; give a smaller number")  # fmt: skip

    def _check_schedule(self) -> None:
        require(self.gamma > 0, "optimizer.gamma", self.gamma, "give a number above 0")
        require(self.schedule != "exponential" or self.gamma != DEFAULT_GAMMA, "optimizer.gamma", self.gamma,
                 "give exponential a factor per epoch such as 0.9, or set schedule=step and step=1")  # fmt: skip
        require_at_least(0, "optimizer.warmup", self.warmup)
        ordered = list(self.milestones) == sorted(set(self.milestones)) and min(self.milestones, default=1) > 0
        require(ordered, "optimizer.milestones", self.milestones, "give rising epoch numbers from 1")
        for key, value, schedule in (("milestones", self.milestones, "multistep"), ("step", self.step, "step")):
            used = self.schedule == schedule
            advice = "give a value" if used else f"leave it out or set optimizer.schedule={schedule}"
            require(bool(value) == used, f"optimizer.{key}", value, advice)
        require(self.step is None or self.step > 0, "optimizer.step", self.step, "give at least 1")
        for key in ("factor", "patience"):
            unread = self.schedule != "plateau" and getattr(self, key) is not None
            require(not unread, f"optimizer.{key}", getattr(self, key),
                     "leave it out or set optimizer.schedule=plateau")  # fmt: skip
        factor_ok = self.factor is None or 0 < self.factor < 1
        require(factor_ok, "optimizer.factor", self.factor, "give a number between 0 and 1")
        require(self.patience is None or self.patience >= 0, "optimizer.patience", self.patience, "give at least 0")
        require(not self.warmup or self.schedule != "plateau", "optimizer.warmup", self.warmup,
                 "leave it out: plateau sets the rate from the losses alone")  # fmt: skip

    def _checked(self, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        return check_arguments(self.name, given, where=where, base=self.torch_options())

    def _checked_group(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        where = f"optimizer.groups.{name}"
        require(bool(given), where, dict(given), "give it a setting such as lr, or leave it out")
        for key in ("fused", "foreach"):
            require(key not in given, f"{where}.{key}", given.get(key), "set it for the whole optimizer")
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
        require(set(rate) == {"first", "later"}, where, dict(rate), "give {first: RATE, later: RATE}, or one rate")
    for key, value in rate.items() if isinstance(rate, Mapping) else (("", rate),):
        place = f"{where}.{key}" if key else where
        require(value > 0, place, value, "give a number above 0")
        require(value <= LARGEST_FLOAT, place, value, "which overflows float32; give a smaller number")


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

    @typed_block("")
    def __post_init__(self) -> None:
        """Refuse seeds, names and plugins that cannot work."""
        named_plugins(self.components)
        require(0 <= self.seed < 2**63, "seed", self.seed, "give a whole number from 0 to 2**63 - 1")
        fine = bool(self.name) and not set(self.name) & set('/\\:*?"<>|') and self.name not in (".", "..")
        short = len(self.name.encode(errors="replace")) <= LONGEST_NAME and self.name.isprintable()
        require(fine and short, "name", self.name, "give a short name that can be a folder name")
        require(bool(self.output) and "\0" not in self.output, "output", self.output, "give a folder")
        for name in self.imports:
            require(is_dotted(name), "imports", name, "give dotted paths such as my_package.losses.Focal")


OPEN_BLOCKS: dict[str, Callable[..., Any]] = {"benchmark": BenchmarkConfig, "backbone": BackboneConfig}
"""Blocks that contain options of the named backbone or benchmark next to their own keys."""
WITH_OPTIONS: dict[str, Callable[..., Any]] = {**OPEN_BLOCKS, "optimizer": OptimizerConfig}
"""Blocks with a key ``options``, whose entries are written next to the block's own keys."""
