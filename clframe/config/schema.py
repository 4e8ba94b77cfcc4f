"""The block ``components.avalanche``: plugins of Avalanche's by class name, each with its options.

It is no component and has no place in the strategy's expression: what it names acts beside the components.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from clframe.errors import ConfigError, UnknownNameError, nearest, unknown_name
from clframe.options import shown

BLOCK = "avalanche"
"""The one name inside ``components`` that no component can have."""
WHERE = f"components.{BLOCK}.plugins"
_EXAMPLE = "[LwFPlugin, {EWCPlugin: {ewc_lambda: 0.1}}]"


def named_plugins(components: Mapping[str, Mapping[str, Any]]) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Class names and options of the plugins that a config's ``components`` name, in order.

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
        raise ConfigError(f"{WHERE}: found {shown(listed)}; give a list such as {_EXAMPLE}")
    return tuple(_named(entry, f"{WHERE}[{i}]") for i, entry in enumerate(listed))


def _named(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ConfigError(f"{where}: found {shown(entry)}; give a name, or one with its options as in {_EXAMPLE}")
    ((name, options),) = entry.items()
    if not isinstance(options, (dict, type(None))):
        raise ConfigError(f"{where}.{name}: found {shown(options)}; give a mapping of its options")
    return str(name), {str(key): value for key, value in (options or {}).items()}


def _need(ok: bool, key: str, found: Any, advice: str) -> None:
    if not ok:
        raise ConfigError(f"{key}: found {shown(found)}; {advice}")


def _at_least(low: float, key: str, found: float) -> None:
    _need(found >= low, key, found, f"give at least {low}")


MOST_WORKERS = 256
"""Each is a process with a torch of its own."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Which data, and who learns what when."""

    name: str = ""
    """A data set of ``clframe list benchmarks``."""
    protocol: Literal["class_incremental", "task_incremental", "permuted", "rotated"] = "class_incremental"
    """``class_incremental``: new classes in every experience; ``task_incremental``: also task labels.

    ``permuted`` and ``rotated`` show all classes in every experience, with pixels in another order or at
    another angle.
    """
    classes: int | None = None
    """Only the data set's classes 0 to this number less one, for a smaller problem; null takes all."""
    experiences: int = 5
    """How many experiences, a larger first one included; leftover classes go to the earliest ones."""
    first: int | None = None
    """Classes of the first experience; null gives all experiences the same number."""
    counts: tuple[int, ...] = ()
    """Classes of each experience; takes the place of ``experiences``."""
    class_order: Literal["seeded", "sorted", "icarl"] | tuple[int, ...] = "seeded"
    """Order in which classes are learnt: drawn from the seed, ascending, iCaRL's of 100, or the ids."""
    angles: tuple[float, ...] = ()
    """Degrees of each experience of ``rotated``, in place of ``experiences``; none: 0 to 180, evenly."""
    validation: float = 0.0
    """Share of each class's training samples that is held out."""
    evaluate: Literal["test", "validation"] = "test"
    """What accuracies are measured on; choose hyper-parameters on ``validation``."""
    online: int | None = None
    """Samples of the small experiences that each sample comes in once; null trains on whole experiences."""
    boundaries: bool = True
    """Whether an online learner is told where an experience begins and ends."""
    blurry: float = 0.0
    """Share of an experience's length over which an online stream fades into the next; 0 is sharp."""
    augment: str | tuple[str, ...] | None = None
    """What training does to images: ``crop``, ``flip``, ``jitter``, ``cifar`` (crop and flip), or a list, in order;
    null leaves them as they are."""
    workers: int | None = None
    """Processes that read data which is not in memory; null chooses by the machine, 0 reads in this one."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the data set itself."""

    def __post_init__(self) -> None:
        """Refuse what no data set can serve, and keys that the protocol does not read."""
        _need(bool(self.name), "benchmark.name", self.name, "name one of clframe list benchmarks")
        _at_least(1, "benchmark.experiences", self.experiences)
        _need(0 <= self.validation < 1, "benchmark.validation", self.validation, "give a share from 0, below 1")
        _need(self.evaluate == "test" or self.validation > 0, "benchmark.evaluate", self.evaluate,
              "hold data out for it, such as benchmark.validation=0.1")  # fmt: skip
        if self.online is not None:
            _at_least(1, "benchmark.online", self.online)
        _need(0 <= self.blurry <= 1, "benchmark.blurry", self.blurry, "give a share from 0 to 1")
        workers_ok = self.workers is None or 0 <= self.workers <= MOST_WORKERS
        _need(workers_ok, "benchmark.workers", self.workers, f"give a number from 0 to {MOST_WORKERS} or null")
        by_class = self.protocol in ("class_incremental", "task_incremental")
        all_classes = f"leave it out, {self.protocol} experiences bring all classes"
        for key, value, unset, read, advice in (
            ("first", self.first, None, by_class, all_classes),
            ("counts", self.counts, (), by_class, all_classes),
            ("class_order", self.class_order, "seeded", by_class, all_classes),
            ("angles", self.angles, (), self.protocol == "rotated", "set benchmark.protocol=rotated"),
            ("boundaries", self.boundaries, True, self.online is not None, "set benchmark.online"),
            ("blurry", self.blurry, 0.0, self.online is not None, "set benchmark.online"),
        ):
            _need(read or value == unset, f"benchmark.{key}", value, advice)


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which network."""

    name: str = ""
    """A backbone of ``clframe list backbones``."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the backbone itself."""

    def __post_init__(self) -> None:
        """A backbone must be named."""
        _need(bool(self.name), "backbone.name", self.name, "name one of clframe list backbones")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """A fresh optimizer for every experience."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.05
    """Learning rate at the start of every experience."""
    momentum: float = 0.0
    """Of SGD; the Adams keep their own betas."""
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "multistep"] = "constant"
    """Of the learning rate over the epochs of one experience."""
    milestones: tuple[int, ...] = ()
    """Epochs after which ``multistep`` multiplies the rate by ``gamma``."""
    gamma: float = 0.1

    def __post_init__(self) -> None:
        """Refuse rates that cannot train and settings that nothing would read."""
        _need(self.lr > 0, "optimizer.lr", self.lr, "give a number above 0")
        _need(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "give a number from 0 to below 1")
        _need(not self.momentum or self.name == "sgd", "optimizer.momentum", self.momentum,
              f"leave it out ({self.name} keeps its own betas) or set optimizer.name=sgd")  # fmt: skip
        _at_least(0, "optimizer.weight_decay", self.weight_decay)
        _need(self.gamma > 0, "optimizer.gamma", self.gamma, "give a number above 0")
        ordered = list(self.milestones) == sorted(set(self.milestones)) and min(self.milestones, default=1) > 0
        _need(ordered, "optimizer.milestones", self.milestones, "give rising epoch numbers from 1")
        stepped = self.schedule == "multistep"
        advice = "name some" if stepped else "leave them out or set optimizer.schedule=multistep"
        _need(bool(self.milestones) == stepped, "optimizer.milestones", self.milestones, advice)


LOGGERS = ("tensorboard", "csv")
"""Loggers that every engine has."""
MOST_THREADS = 1024
"""Far above any machine's use, far below what torch can take."""
PRECISIONS = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"]


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How to train: Lightning's side."""

    engine: Literal["fabric", "trainer"] = "fabric"
    """``fabric``: Avalanche's loop on Lightning Fabric; ``trainer``: experiences in Lightning Trainers."""
    accelerator: Literal["auto", "cpu", "cuda", "gpu", "mps"] = "auto"
    devices: int | tuple[int, ...] = 1
    """One device: 1, or the index of one such as [1]."""
    precision: PRECISIONS = "32-true"
    epochs: int = 10
    """Per experience."""
    batch_size: int = 32
    eval_batch_size: int = 256
    gradient_clip: float | None = None
    """Largest norm of the gradient; null never clips."""
    accumulate: int = 1
    """Batches whose gradients are added up before each update."""
    eval_every: int = -1
    """Evaluate on this experience's test data every n epochs, for TensorBoard; -1 never."""
    log_every: int = 20
    """Steps between two entries of losses and learning rate; nothing waits for the device in between."""
    fast_dev_run: bool = False
    """Two batches of one epoch per experience: does everything work?"""
    threads: int | None = None
    """CPU threads; null leaves torch's choice. Small models are fastest with one."""
    channels_last: bool = False
    """Keep images and convolutions with their channels last in memory; with bf16-mixed often far faster."""
    deterministic: bool = True
    """Use only deterministic operations, so that a seed gives the same numbers again."""
    progress: bool = True
    """Show a progress bar where the output is a terminal."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Lightning callbacks by class name, each with its options; they need ``engine: trainer``."""
    loggers: tuple[str, ...] = LOGGERS
    """``tensorboard`` and ``csv``; Lightning's own logger classes need ``engine: trainer``."""

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing and callbacks nobody would call."""
        for key in ("epochs", "batch_size", "eval_batch_size", "accumulate", "log_every"):
            _at_least(1, f"trainer.{key}", getattr(self, key))
        threads_ok = self.threads is None or 1 <= self.threads <= MOST_THREADS
        _need(threads_ok, "trainer.threads", self.threads, f"give a number from 1 to {MOST_THREADS} or null")
        clip_ok = self.gradient_clip is None or self.gradient_clip > 0
        _need(clip_ok, "trainer.gradient_clip", self.gradient_clip, "give a number above 0 or null")
        _need(self.eval_every == -1 or self.eval_every > 0, "trainer.eval_every", self.eval_every,
              "give -1 (never) or a number of epochs")  # fmt: skip
        index = self.devices if isinstance(self.devices, tuple) else ()
        one = self.devices == 1 or (len(index) == 1 and index[0] >= 0)
        _need(one, "trainer.devices", self.devices,
              "this version trains on one device a run; give 1 or an index such as [0]")  # fmt: skip
        for name in self.loggers:
            if name not in LOGGERS and not name.endswith("Logger"):
                raise UnknownNameError(unknown_name("logger", name, LOGGERS, where="trainer.loggers"))
        foreign = [("loggers", name) for name in self.loggers if name not in LOGGERS]
        for key, name in [*(("callbacks", name) for name in self.callbacks), *foreign]:
            if self.engine != "trainer":
                raise ConfigError(
                    f"trainer.{key}: {name} is called by a Lightning Trainer, which engine '{self.engine}' "
                    f"does not have; set trainer.engine=trainer or leave it out"
                )


LONGEST_NAME = 200
"""Bytes; file systems take 255."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run is made of."""

    name: str = "run"
    """Folder of the run under the output folder."""
    seed: int = 0
    """Controls initialization, order of samples and classes, and memory."""
    strategy: str = "naive"
    """Which: components joined by '+'."""
    components: dict[str, dict[str, Any]] = field(default_factory=dict)
    """How: options by component name; ``avalanche`` lists plugins of Avalanche's that act beside them."""
    benchmark: BenchmarkConfig
    backbone: BackboneConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    output: str = "runs"
    """Folder for run folders."""

    def __post_init__(self) -> None:
        """Refuse seeds and names that generators and files cannot take, and plugins that nobody could read."""
        named_plugins(self.components)
        _need(0 <= self.seed < 2**63, "seed", self.seed, "give a whole number from 0 to 2**63 - 1")
        fine = bool(self.name) and not set(self.name) & set('/\\:*?"<>|') and self.name not in (".", "..")
        short = len(self.name.encode(errors="replace")) <= LONGEST_NAME and self.name.isprintable()
        _need(fine and short, "name", self.name, "give a short name that can be a folder's")
        _need(bool(self.output) and "\0" not in self.output, "output", self.output, "give a folder")


OPEN_BLOCKS: dict[str, Callable[..., Any]] = {"benchmark": BenchmarkConfig, "backbone": BackboneConfig}
"""Blocks that carry options of what they name, beside keys of their own."""
