"""Build objects from a config: data, backbone, strategy, optimizer.

This module and :mod:`clframe.stream` are the only ones that pass a config to constructors: no class below them
depends on the config.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clframe.config.load import load_config, readable_blocks
from clframe.config.named import BLOCK, lightning_loggers, named_plugins
from clframe.config.optimizers import optimizer_class
from clframe.config.schema import BackboneConfig, Config
from clframe.config.trainer import TrainerConfig
from clframe.config.typed import block_keys
from clframe.core import COMPONENTS, Component, Composition, parse
from clframe.core.expression import names_in_order
from clframe.data import Benchmark, Source
from clframe.data.samples import TensorSamples
from clframe.errors import ClframeError, ConfigError, Problems, UnsupportedError
from clframe.exits.diagnostics import EXIT_METRICS, ExitMetric
from clframe.metrics.registry import METRICS, Metric
from clframe.nn import BACKBONES, Network
from clframe.nn.backbones import Backbone
from clframe.nn.backbones.from_transformers import TextEmbed
from clframe.nn.backbones.traced import DEPTH, default_layers
from clframe.optimization import check_optimizer
from clframe.options import check_options, format_value, missing_options, option_types, rename_options
from clframe.own_code import load_own
from clframe.seeding import derive_seed
from clframe.stream import build_stream, check_source
from clframe.training.compiled import refuse_to_compile, require_compiler
from clframe.training.devices import check_devices, process_count

FUSED = ("sgd", "adam", "adamw")
"""Optimizers with an update of all weights in one CUDA kernel."""
EVALUATION_BATCH, MOST_EVALUATION_BATCH = 256, 1024
"""Samples per batch of an evaluation on every device; the most on CUDA."""
PHOTOGRAPH = (3, 224, 224)
MOST_LOGITS = {False: 2**24, True: 2**27}
"""Logits of a batch of text in an evaluation, on the CPU and on CUDA."""


@dataclass(frozen=True)
class Setup:
    """The objects of one run, before any training."""

    config: Config
    composition: Composition
    benchmark: Benchmark
    network: Network


def build(config: Config, *, source: Source | None = None, needs_earlier: bool = False) -> Setup:
    """Build everything a config names and check all that can be checked before training.

    Args:
        config: The config.
        source: Data in memory, in the place of those that an extended run's block ``benchmark`` names.
        needs_earlier: As in :func:`~clframe.stream.build_stream`.
    """
    composition = check_config(config, source=source is None)
    backbone = build_backbone(config.backbone, composition)
    source, benchmark = build_stream(config, source=source, needs_earlier=needs_earlier)
    for component in composition:
        component.check(classes=len(benchmark.class_order))
    torch.manual_seed(derive_seed(config.seed, "network"))
    network = Network(backbone(benchmark.input_shape))
    _check_token_ids(source, network)
    _check_language(config, composition, source, network)
    resolved = composition.replace(lambda component: component.resolve(network))
    return Setup(_resolved_config(config, resolved, benchmark), resolved, benchmark, network)


def check_config(config: Config, *, source: bool = True) -> Composition:
    """Check all of a config that can be checked without reading data; returns its composition.

    Args:
        config: The config.
        source: Whether the data are those that the config names, whose options are then checked as well.

    Raises:
        ClframeError: What a run of the config would be refused for.
    """
    problems, composition = Problems(), Composition()
    with problems.attempt():
        register_imports(config.imports)
        composition = build_strategy(config.strategy, config.components)
        composition.check_needs()
        check_optimizer(config, composition)
    for component in composition:
        option = component.needs_held_out
        if option and not config.benchmark.validation:
            found = format_value(getattr(component, option))
            problems.add(ConfigError(
                f"components.{component.name}.{option}: found {found}, which needs held-out data; set "
                f"benchmark.validation=0.1"
            ))  # fmt: skip
    with problems.attempt():
        optimizer_class(config.optimizer.name)  # of an own package, which must be allowed
    for check in (_check_trainer, _check_callbacks, _check_plugins, _check_online):
        with problems.attempt():
            check(config)
    with problems.attempt():
        check_devices(config, composition, cuda=on_cuda(config.trainer))
    with problems.attempt():
        if config.trainer.compile:
            kind = "mps" if config.trainer.accelerator == "mps" else "cpu"  # CUDA refuses what a CPU does
            refuse_to_compile(composition, torch.device(kind))
    with problems.attempt():
        build_backbone(config.backbone)
    if source:
        with problems.attempt():
            check_source(config.benchmark)  # options only: reading data of a run that is refused may take minutes
    problems.raise_found()
    return composition


def load_checked(name: str, overrides: Sequence[str] = ()) -> Config:
    """Load a config; the message about one that cannot be loaded has the problems that a run would find next, too.

    Raises:
        ClframeError: As :func:`~clframe.config.load.load_config`, with the problems of strategy, backbone and data set.
    """
    try:
        return load_config(name, overrides)
    except ClframeError as error:
        problems, blocks = Problems(), readable_blocks(name, overrides)
        problems.add(error)
        if not problems.found or not blocks:
            raise
        strategy, components = blocks.get("strategy", "naive"), blocks.get("components", {})
        readable = isinstance(strategy, str) and isinstance(components, dict)
        if readable and all(isinstance(options, dict) for options in components.values()):
            with problems.attempt():
                register_imports(blocks.get("imports", ()))
                build_strategy(strategy, components).check_needs()
        if "backbone" in blocks:
            with problems.attempt():
                build_backbone(blocks["backbone"])
        if "benchmark" in blocks:
            with problems.attempt():
                check_source(blocks["benchmark"])
        problems.raise_found()
        raise AssertionError("unreachable") from None


def _resolved_config(config: Config, composition: Composition, benchmark: Benchmark) -> Config:
    """Return the config with every option of the components in use, and without those of others."""
    components: dict[str, dict[str, Any]] = {component.name: asdict(component) for component in composition}
    if BLOCK in config.components:
        components[BLOCK] = dict(config.components[BLOCK])
    config = replace(config, strategy=names_in_order(config.strategy, composition), components=components)
    return with_device_defaults(
        config, cuda=on_cuda(config.trainer), input_shape=benchmark.input_shape, vocabulary=benchmark.vocabulary
    )


def on_cuda(config: TrainerConfig) -> bool:
    """Whether a run trains on a CUDA device."""
    return config.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()


def with_device_defaults(
    config: Config, *, cuda: bool, input_shape: Sequence[int] = (), vocabulary: int = 0
) -> Config:
    """Return the config with every ``auto`` replaced by the choice for the device, measured in perf/gpu_race.py.

    ``trainer.capture`` stays as it is: whether steps can be recorded may change between experiences.
    """
    trainer, optimizer = config.trainer, config.optimizer
    fused = cuda and optimizer.name in FUSED and trainer.precision != "16-mixed"
    trainer = replace(
        trainer,
        channels_last=cuda if trainer.channels_last == "auto" else trainer.channels_last,
        deterministic=not cuda if trainer.deterministic == "auto" else trainer.deterministic,
        eval_batch_size=(
            evaluation_batch(input_shape, cuda=cuda, vocabulary=vocabulary)
            if trainer.eval_batch_size == "auto"
            else trainer.eval_batch_size
        ),
    )
    optimizer = replace(optimizer, fused=fused if optimizer.fused == "auto" else optimizer.fused)
    return replace(config, trainer=trainer, optimizer=optimizer)


def evaluation_batch(input_shape: Sequence[int], *, cuda: bool, vocabulary: int = 0) -> int:
    """Samples per batch of an evaluation: 256, and on CUDA as many as need no more memory than 256 photographs.

    Small batches leave a GPU idle; more than 1,024 samples of 3x32x32 do not shorten an evaluation of ResNet32. Of a
    language model with this ``vocabulary``, as many windows as have 2^24 logits (64 MiB), on CUDA 2^27.

    >>> evaluation_batch((3, 32, 32), cuda=True), evaluation_batch((3, 112, 112), cuda=True)
    (1024, 1024)
    >>> evaluation_batch((3, 224, 224), cuda=True), evaluation_batch((3, 32, 32), cuda=False)
    (256, 256)
    >>> evaluation_batch((129,), cuda=False, vocabulary=2048)
    64
    """
    if vocabulary:
        logits = (input_shape[0] - 1) * vocabulary
        return min(max(MOST_LOGITS[cuda] // logits, 1), MOST_EVALUATION_BATCH)
    if not cuda:
        return EVALUATION_BATCH
    photographs = EVALUATION_BATCH * math.prod(PHOTOGRAPH) // max(math.prod(input_shape), 1)
    return min(max(photographs, EVALUATION_BATCH), MOST_EVALUATION_BATCH)


def build_backbone(
    config: BackboneConfig, composition: Composition | None = None
) -> Callable[[tuple[int, ...]], Backbone]:
    """Return the function from an input shape to the backbone; name and options are checked immediately.

    Args:
        config: The block of the config.
        composition: Its components name taps. A backbone with the option ``taps`` is divided after these as well.
    """
    maker = BACKBONES.get(config.name, where="backbone.name")
    options = check_options(maker, config.options, where="backbone", block_keys=block_keys("backbone"))
    named: dict[str, str] = {}
    if "taps" in option_types(maker):
        named = {
            tap: f"components.{component.name}.{option}"
            for component in composition or () for option, taps in component.named_taps.items() for tap in taps
        }  # fmt: skip
        options["taps"] = (*options.get("taps", ()), *named)

    def make(input_shape: tuple[int, ...]) -> Backbone:
        try:
            made = maker(input_shape, **options)
            return made if isinstance(made, Backbone) else _divided(made, input_shape, composition)
        except ClframeError as error:
            key = next((key for tap, key in named.items() if f"layer '{tap}'" in str(error)), "backbone")
            raise type(error)(f"{key}: {str(error).removeprefix('backbone: ')}") from None  # Backbone.of names itself
        except (RuntimeError, TypeError, MemoryError) as error:  # more weights than torch can hold or count
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"backbone: found {options}, torch fails ({reason}); give less") from error

    return make


def _divided(model: Any, input_shape: tuple[int, ...], composition: Composition | None) -> Backbone:
    """The backbone of a module that an own function returns, divided after the layers that components name."""
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"found a function that returns {format_value(model)}; return a Backbone or a torch module")
    named = [tap for component in composition or () for taps in component.named_taps.values() for tap in taps]
    if not named:
        return Backbone.of(model, input_shape=input_shape, depth=DEPTH)
    defaults = default_layers(model, depth=DEPTH)
    return Backbone.traced(model, input_shape=input_shape, taps=named, defaults=defaults)


def register_imports(names: Sequence[str]) -> None:
    """Import own components and metrics of packages that the user has allowed, and register them by name.

    Raises:
        ConfigError: A package that is not allowed, or something else than a component or metric.
        UnknownNameError: A package without such a name.
    """
    for name in names:
        found = load_own(name, where="imports")
        if isinstance(found, Metric):
            METRICS.add(name.rpartition(".")[2], found)
        elif isinstance(found, ExitMetric):
            EXIT_METRICS.add(name.rpartition(".")[2], found)
        elif isinstance(found, type) and issubclass(found, Component):
            COMPONENTS.add(found.name, found)
        else:
            raise ConfigError(
                f"imports: found '{name}', which is neither a component nor a metric; name a subclass of Component, a "
                f"Metric or an ExitMetric"
            )


def _check_token_ids(source: Source, network: Network) -> None:
    """Refuse a text backbone on inputs that are not token ids, which it would round to ids, or ids it does not have."""
    embed = network.backbone.stages[0]
    if not isinstance(embed, TextEmbed):
        return
    if not source.are_token_ids():
        raise ConfigError(
            f"backbone.name: found a text backbone for {source.name}, whose inputs are not token ids; set "
            f"benchmark.kind=tokens (npz) or benchmark.tokens=MODEL (clinc150, banking77), or use another backbone"
        )
    words = getattr(embed.embeddings, "word_embeddings", None)
    inputs = [samples.x for samples in (source.train, source.test) if isinstance(samples, TensorSamples)]
    largest = max((int(x.max()) for x in inputs if len(x)), default=0)
    if isinstance(words, torch.nn.Embedding) and largest >= words.num_embeddings:
        raise ConfigError(
            f"backbone.vocabulary: found token id {largest} in {source.name} for a vocabulary of "
            f"{words.num_embeddings}; give at least {largest + 1}, or the tokenizer of the backbone"
        )


def _check_language(config: Config, composition: Composition, source: Source, network: Network) -> None:
    """Refuse what is not defined for a language model, and a model that does not fit the text."""
    found, known = network.vocabulary, source.vocabulary
    if found and not known:
        raise ConfigError(
            f"backbone.name: found {config.backbone.name}, a language model, for {source.name}, which has one label "
            f"per sample; use another backbone, or benchmark=language_model"
        )
    if not known:
        return
    if not found:
        raise ConfigError(
            f"backbone.name: found {config.backbone.name} for {source.name}, of which every token is predicted; use "
            f"backbone=decoder"
        )
    if found != known:
        raise ConfigError(
            f"backbone.vocabulary: found {found}, but the tokenizer of {source.name} has {known} ids; set "
            f"backbone.vocabulary={known}"
        )
    problems = Problems()
    for component in composition:
        if not component.per_token:
            problems.add(ConfigError(
                f"strategy: '{component.name}' is not defined for a language model, which predicts tokens and no "
                f"classes; leave it out, or set per_token = True in its class if it is"
            ))  # fmt: skip
    if named_plugins(config.components):
        problems.add(ConfigError("components.avalanche: found plugins, which expect classes; leave them out"))
    if config.benchmark.protocol in ("permuted", "rotated"):
        problems.add(ConfigError(
            f"benchmark.protocol: found {config.benchmark.protocol} for text; use class_incremental, in which every "
            f"domain is a class"
        ))  # fmt: skip
    if process_count(config.trainer) > 1:
        found_devices = f"trainer.devices: found {config.trainer.devices} for a language model"
        problems.add(UnsupportedError(f"{found_devices}, which trains on one; set 1"))
    problems.raise_found()


def _check_callbacks(config: Config) -> None:
    if config.trainer.callbacks:
        from clframe.training.trainer_options import check_monitors, early_stopping

        if config.trainer.engine != "trainer":
            early_stopping(config.trainer.callbacks)  # refuses options that it does not take
        check_monitors(config.trainer.callbacks, validation=config.benchmark.validation > 0)


def _check_plugins(config: Config) -> None:
    named = named_plugins(config.components)
    if named:
        from clframe.avalanche_bridge.plugins import check_plugins

        check_plugins(named)


def _check_online(config: Config) -> None:
    """Refuse options that need experiences of more than a few batches."""
    if config.benchmark.online is None:
        return
    for key, found, wanted in (
        ("trainer.engine", config.trainer.engine, "fabric"),
        ("trainer.eval_every", config.trainer.eval_every, -1),
        ("trainer.callbacks", config.trainer.callbacks, {}),
        ("optimizer.schedule", config.optimizer.schedule, "constant"),
        ("optimizer.warmup", config.optimizer.warmup, 0),
    ):
        if found != wanted:
            raise ConfigError(f"{key}: found {found} for an online stream of small experiences; set {wanted}")


def build_strategy(expression: str, components: Mapping[str, Mapping[str, Any]]) -> Composition:
    """The composition of an expression; every options block is checked, including those of components not selected.

    ``components.avalanche`` is not a component: it lists Avalanche plugins, which run next to the composition.
    """
    if BLOCK in COMPONENTS:
        raise ClframeError(
            f"component '{BLOCK}': components.{BLOCK} lists Avalanche plugins; give the component another name"
        )
    components = {name: options for name, options in components.items() if name != BLOCK}
    for name, options in components.items():
        component = COMPONENTS.get(name, where="components")
        where = f"components.{name}"
        options = rename_options(options, component.renamed, where=where)
        checked = check_options(component, options, where=where, complete=False)
        if not missing_options(component, checked):  # otherwise the expression may give the rest
            component(**checked)
    return parse(expression, components)


def _check_trainer(whole: Config) -> None:
    config = whole.trainer
    wanted = config.accelerator
    if wanted in ("cuda", "gpu") and not torch.cuda.is_available():
        raise UnsupportedError(f"trainer.accelerator: found {wanted}, but torch sees no GPU here; use cpu or auto")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise UnsupportedError("trainer.accelerator: found mps, but this machine has none; use cpu or auto")
    on_gpu = on_cuda(config)
    if isinstance(config.devices, tuple):
        found, count = f"trainer.devices: found {list(config.devices)}", torch.cuda.device_count()
        if not on_gpu:
            raise UnsupportedError(f"{found}, indices of GPUs, but the run is not on CUDA; give a number")
        if max(config.devices) >= count:
            raise UnsupportedError(f"{found}, but torch sees {count} GPUs; count from 0")
    if config.precision == "16-mixed" and not on_gpu and wanted != "mps":
        raise UnsupportedError("trainer.precision: found 16-mixed on the CPU, which has none; use bf16-mixed")
    if config.precision == "16-mixed" and whole.optimizer.fused is True:
        raise UnsupportedError(
            "optimizer.fused: found true with trainer.precision=16-mixed, where a fused update leaves the gradients "
            "scaled, which clipping, logs and components read; set optimizer.fused=false"
        )
    if config.compile:
        require_compiler(cuda=on_gpu)
    lightning_options(config, Path())


def lightning_options(config: TrainerConfig, folder: Path) -> dict[str, Any]:
    """Options for the Lightning Trainer; empty for the Fabric engine."""
    if config.engine != "trainer":
        return {}
    from clframe.training.trainer_options import trainer_options

    loggers = lightning_loggers(config.loggers)
    return trainer_options(config.callbacks, loggers, precision=config.precision, folder=folder)
