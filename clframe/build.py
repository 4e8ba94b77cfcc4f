"""Build objects from a config: data, backbone, strategy, optimizer.

This module and :mod:`clframe.stream` are the only ones that pass a config to constructors: no class below them
depends on the config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clframe.config.load import load_config, readable_blocks
from clframe.config.named import BLOCK, lightning_loggers
from clframe.config.optimizers import optimizer_class
from clframe.config.schema import BackboneConfig, Config
from clframe.config.trainer import TrainerConfig
from clframe.config.typed import block_keys
from clframe.config_checks import (
    check_callbacks,
    check_language,
    check_named_plugins,
    check_online,
    check_token_ids,
    check_trainer,
    report_unused,
)
from clframe.core import COMPONENTS, Component, Composition, parse
from clframe.core.expression import names_in_order
from clframe.data import Benchmark, Source
from clframe.device_defaults import on_cuda, with_device_defaults
from clframe.errors import ClframeError, ConfigError, Problems, reword
from clframe.exits.diagnostics import EXIT_METRICS, ExitMetric
from clframe.metrics.registry import METRICS, Metric
from clframe.nn import BACKBONES, Network
from clframe.nn.backbones import Backbone
from clframe.nn.backbones.traced import DEPTH, default_layers
from clframe.optimization import check_optimizer
from clframe.options import check_options, format_value, missing_options, option_types, rename_options
from clframe.own_code import load_own
from clframe.seeding import derive_seed
from clframe.stream import build_stream, check_source
from clframe.training.compiled import refuse_to_compile
from clframe.training.devices import check_devices


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
    check_token_ids(source, network)
    check_language(config, composition, source, network)
    resolved = composition.replace(lambda component: component.resolve(network))
    report_unused(config, resolved, network)
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
        option = component.needs_domain_labels
        if option and config.benchmark.protocol != "task_incremental":
            found = getattr(component, option)
            problems.add(ConfigError(
                f"components.{component.name}.{option}: found {found}, but evaluations do not know the experience of a "
                f"sample (benchmark.protocol: {config.benchmark.protocol}); set benchmark.protocol=task_incremental"
            ))  # fmt: skip
    with problems.attempt():
        optimizer_class(config.optimizer.name)  # of an own package, which must be allowed
    for check in (_check_trainer, check_callbacks, check_named_plugins, check_online):
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
        imports = blocks.get("imports", [])
        readable = isinstance(strategy, str) and isinstance(components, dict) and isinstance(imports, list)
        if readable and all(isinstance(each, dict) for each in components.values()) and {*map(type, imports)} <= {str}:
            with problems.attempt():
                register_imports(imports)
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
            # Backbone.of names itself.
            raise reword(error, lambda message: f"{key}: {message.removeprefix('backbone: ')}") from None
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


def _check_trainer(config: Config) -> None:
    check_trainer(config)
    lightning_options(config.trainer, Path())


def lightning_options(config: TrainerConfig, folder: Path) -> dict[str, Any]:
    """Options for the Lightning Trainer; empty for the Fabric engine."""
    if config.engine != "trainer":
        return {}
    from clframe.training.trainer_options import trainer_options

    loggers = lightning_loggers(config.loggers)
    return trainer_options(config.callbacks, loggers, precision=config.precision, folder=folder)
