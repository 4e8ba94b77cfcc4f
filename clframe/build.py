"""The one file where config meets constructors. No class below sees a config object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clframe.accounting import count_macs, count_parameters
from clframe.config.files import read_yaml
from clframe.config.load import load_config
from clframe.config.schema import (
    BLOCK,
    BackboneConfig,
    BenchmarkConfig,
    Config,
    OptimizerConfig,
    TrainerConfig,
    named_plugins,
)
from clframe.config.typed import as_tree, block_keys, from_mapping, to_yaml
from clframe.core import COMPONENTS, Composition, parse
from clframe.data import SOURCES, Benchmark, Source, class_incremental
from clframe.data.augmentation import AUGMENTATIONS, Augmentation
from clframe.data.streams import blurry, online, permuted, rotated
from clframe.errors import ClframeError, ConfigError, RunFolderError, UnsupportedError
from clframe.metrics import METRICS
from clframe.nn import BACKBONES, Network
from clframe.nn.backbones import Backbone
from clframe.options import check_options, missing_options, shown
from clframe.report.explanation import explanation
from clframe.report.figures import write_figures
from clframe.results import Result, summarize
from clframe.run_folder import RunFolder
from clframe.seeding import derive_seed, torch_settings

if TYPE_CHECKING:
    from clframe.training.session import Progress, Session
    from clframe.training.trained import TrainedModel


@dataclass(frozen=True)
class Parts:
    """What a config names, built, before any training."""

    config: Config
    composition: Composition
    benchmark: Benchmark
    network: Network


def run(
    config: str | Config = "quickstart",
    overrides: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    on_built: Callable[[Parts], None] | None = None,
    on_evaluated: Callable[[Progress], None] | None = None,
) -> Result:
    """Train and evaluate on every experience of a benchmark; what ``clframe run`` does.

    Args:
        config: A config's name, path, or typed config.
        overrides: Like those of the command line, ``"trainer.epochs=3"``.
        output: Folder for run folders; None takes the config's (``runs``).
        resume: A run folder to go on with; its own config is used and ``config`` is not read.
        on_built: Called once with what the config names, before any training.
        on_evaluated: Called with the progress after every experience.

    Returns:
        The result, as written to ``results.json``.

    Raises:
        ClframeError: Anything a user can mend, in one line.
    """
    if resume is not None:
        if overrides:
            raise ConfigError("resume: takes no overrides; a resumed run keeps the config it began with")
        folder = RunFolder.open(Path(resume))
        config = _config_of(folder)
        _refuse_plugins(config, folder)
    elif isinstance(config, str):
        config = load_config(config, overrides)
    elif overrides:
        raise ConfigError("run: overrides go with a config's name; change a typed config with dataclasses.replace")
    if output is not None and resume is None:
        config = replace(config, output=str(output))
    parts = build(config)
    if on_built is not None:
        on_built(parts)
    if resume is None:
        folder = RunFolder.create(Path(config.output), name=config.name, seed=config.seed)
    with torch_settings(threads=config.trainer.threads, deterministic=config.trainer.deterministic):
        try:
            if resume is None:
                folder.write_config(to_yaml(parts.config))
            session = _session(parts, folder, on_evaluated)
        except BaseException:
            folder.discard()
            raise
        try:
            if resume is not None:
                session.resume()
            return _finish(parts, folder, session, session.run())
        finally:
            session.close()


def load(run: str | Path, *, device: str = "cpu") -> TrainedModel:
    """The model that a run has trained so far, to predict with; reads neither data nor code.

    Args:
        run: A run folder, finished or not, or the folder of its model converted by ``clframe moefy``.
        device: Where to put it.

    Raises:
        RunFolderError: No run folder, or no checkpoint in it that can be read.
    """
    from clframe.training.trained import CONVERTED, newest, recipe_of, restored

    folder = RunFolder.open(Path(run), where="load")
    recipe = recipe_of(folder.path) if (folder.path / CONVERTED).is_file() else None
    config = _config_of(folder)
    content = newest(folder.path, device=torch.device(device))
    network = Network(_backbone(config.backbone)(tuple(content["data"]["input_shape"])))
    try:
        strategy = build_strategy(config.strategy, config.components)
        trained = restored(network, strategy, content, recipe=recipe)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunFolderError(f"{folder.path}: the newest checkpoint does not fit its config ({reason})") from error
    network.to(device)
    return trained


def explain(config: str | Config = "quickstart", overrides: Sequence[str] = ()) -> str:
    """What a run would do, before any training: config, timetable, loss terms, slots, sizes and costs."""
    if isinstance(config, str):
        config = load_config(config, overrides)
    parts = build(config)
    network = parts.network
    for component in parts.composition.acting_at("setup_network"):
        component.setup_network(network)
    network.grow(range(len(parts.benchmark.class_order)))
    return explanation(
        config=to_yaml(parts.config),
        composition=parts.composition,
        benchmark=parts.benchmark,
        network=network,
        plugins=named_plugins(parts.config.components),
    )


def build(config: Config) -> Parts:
    """Everything a config names, checked as far as it can be before training."""
    composition = build_strategy(config.strategy, config.components)
    backbone = _backbone(config.backbone)
    source, benchmark = build_data(config.benchmark, seed=config.seed)
    composition.check_needs()
    for component in composition:
        component.check(classes=source.classes)
        option = component.needs_held_out
        if option and not config.benchmark.validation:
            found = shown(getattr(component, option))
            raise ConfigError(
                f"components.{component.name}.{option}: found {found}, which needs held-out data; set "
                f"benchmark.validation=0.1"
            )
    _check_trainer(config.trainer)
    named = named_plugins(config.components)
    if named:
        from clframe.avalanche_bridge.plugins import check_plugins

        check_plugins(named)
    if benchmark.online is not None:
        _check_online(config)
    torch.manual_seed(derive_seed(config.seed, "network"))
    network = Network(backbone(benchmark.input_shape))
    settled = composition.replace(lambda component: component.resolve(network))
    if settled != composition:
        options = {component.name: asdict(component) for component in settled}
        config = replace(config, strategy=str(settled), components={**config.components, **options})
    return Parts(config, settled, benchmark, network)


def build_data(config: BenchmarkConfig, *, seed: int) -> tuple[Source, Benchmark]:
    """The data that a benchmark block names, and the same dealt out to experiences."""
    augment = build_augmentations(config.augment)
    source_of = SOURCES.get(config.name, where="benchmark.name")
    beside = block_keys("benchmark")
    source = source_of(**check_options(source_of, config.options, where="benchmark", beside=beside))
    source = source.first_classes(config.classes).augmented(augment).read_by(config.workers)
    return source, build_benchmark(source, config, seed=seed)


def _backbone(config: BackboneConfig) -> Callable[[tuple[int, ...]], Backbone]:
    """From an input shape to the backbone; its name and options are checked at once."""
    maker = BACKBONES.get(config.name, where="backbone.name")
    options = check_options(maker, config.options, where="backbone", beside=block_keys("backbone"))

    def make(input_shape: tuple[int, ...]) -> Backbone:
        try:
            return maker(input_shape, **options)
        except ClframeError as error:
            raise type(error)(f"backbone: {error}") from None
        except (RuntimeError, TypeError, MemoryError) as error:  # more weights than torch can hold or count
            reason = str(error).partition("\n")[0]
            raise ConfigError(f"backbone: found {options}, torch fails ({reason}); give less") from error

    return make


def build_augmentations(names: str | Sequence[str] | None) -> tuple[Augmentation, ...]:
    """The augmentations that a config names, one after the other.

    >>> build_augmentations("cifar") == build_augmentations(["crop", "flip"])
    True
    """
    listed = [names] if isinstance(names, str) else names or ()
    return tuple(part for name in listed for part in AUGMENTATIONS.get(name, where="benchmark.augment"))


def build_benchmark(source: Source, config: BenchmarkConfig, *, seed: int) -> Benchmark:
    """``source`` as the protocol of ``config`` deals it out."""
    if config.protocol == "permuted":
        found = permuted(source, experiences=config.experiences, seed=seed, validation=config.validation)
    elif config.protocol == "rotated":
        found = rotated(
            source,
            experiences=config.experiences,
            angles=config.angles,
            seed=seed,
            validation=config.validation,
        )
    else:
        found = class_incremental(
            source,
            experiences=config.experiences,
            first=config.first,
            counts=config.counts,
            order=config.class_order,
            seed=seed,
            validation=config.validation,
            task_labels=config.protocol == "task_incremental",
        )
    if config.online is not None and config.blurry:
        found = blurry(found, size=config.online, blur=config.blurry, seed=seed)
    elif config.online is not None:
        found = online(found, size=config.online, seed=seed, boundaries=config.boundaries)
    return replace(found, evaluate=config.evaluate)


def _check_online(config: Config) -> None:
    """Refuse what makes sense only where an experience is more than a few batches."""
    for key, found, wanted in (
        ("trainer.engine", config.trainer.engine, "fabric"),
        ("trainer.eval_every", config.trainer.eval_every, -1),
        ("optimizer.schedule", config.optimizer.schedule, "constant"),
    ):
        if found != wanted:
            raise ConfigError(f"{key}: found {found} for an online stream of small experiences; set {wanted}")


def build_strategy(expression: str, components: Mapping[str, Mapping[str, Any]]) -> Composition:
    """The composition, with every options block checked, also of components that are not selected.

    ``components.avalanche`` is none of them: plugins of Avalanche's act beside the composition.
    """
    if BLOCK in COMPONENTS:
        raise ClframeError(
            f"component '{BLOCK}': components.{BLOCK} lists plugins of Avalanche's; give the component another name"
        )
    components = {name: options for name, options in components.items() if name != BLOCK}
    for name, options in components.items():
        component = COMPONENTS.get(name, where="components")
        checked = check_options(component, options, where=f"components.{name}", complete=False)
        if not missing_options(component, checked):  # else the expression may give the rest
            component(**checked)
    return parse(expression, components)


def _optimizer(config: OptimizerConfig) -> Callable[..., Any]:
    if config.name == "sgd":
        return partial(torch.optim.SGD, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    return partial(kind, lr=config.lr, weight_decay=config.weight_decay)


def _scheduler(config: OptimizerConfig, epochs: int) -> Callable[..., Any] | None:
    if config.schedule == "cosine":
        return partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs)
    if config.schedule == "multistep":
        return partial(torch.optim.lr_scheduler.MultiStepLR, milestones=list(config.milestones), gamma=config.gamma)
    return None


def _check_trainer(config: TrainerConfig) -> None:
    wanted = config.accelerator
    if wanted in ("cuda", "gpu") and not torch.cuda.is_available():
        raise UnsupportedError(f"trainer.accelerator: found {wanted}, but torch sees no GPU here; use cpu or auto")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise UnsupportedError("trainer.accelerator: found mps, but this machine has none; use cpu or auto")
    on_gpu = wanted in ("cuda", "gpu") or (wanted == "auto" and torch.cuda.is_available())
    if isinstance(config.devices, tuple):
        found, count = f"trainer.devices: found {list(config.devices)}", torch.cuda.device_count()
        if not on_gpu:
            raise UnsupportedError(f"{found}, an index, but the run is not on CUDA; give 1")
        if config.devices[0] >= count:
            raise UnsupportedError(f"{found}, but torch sees {count} GPUs; count from 0")
    if config.precision == "16-mixed" and not on_gpu and wanted != "mps":
        raise UnsupportedError("trainer.precision: found 16-mixed on the CPU, which has none; use bf16-mixed")
    _lightning_parts(config, Path())


def _lightning_parts(config: TrainerConfig, folder: Path) -> dict[str, Any]:
    """What only a Lightning Trainer takes; nothing under Fabric."""
    if config.engine != "trainer":
        return {}
    from clframe.training.trainer import trainer_options

    foreign = [name for name in config.loggers if name not in ("tensorboard", "csv")]
    return trainer_options(config.callbacks, foreign, precision=config.precision, folder=folder)


def _session(parts: Parts, folder: RunFolder, on_evaluated: Callable[[Progress], None] | None) -> Session:
    from clframe.training.launch import launch

    config, trainer = parts.config, parts.config.trainer
    options = _lightning_parts(trainer, folder.path)
    return launch(
        network=parts.network,
        composition=parts.composition,
        benchmark=parts.benchmark,
        optimizer=_optimizer(config.optimizer),
        scheduler=_scheduler(config.optimizer, trainer.epochs),
        seed=config.seed,
        engine=trainer.engine,
        accelerator="cuda" if trainer.accelerator == "gpu" else trainer.accelerator,
        devices=list(trainer.devices) if isinstance(trainer.devices, tuple) else trainer.devices,
        precision=trainer.precision,
        epochs=1 if trainer.fast_dev_run else trainer.epochs,
        batch_size=trainer.batch_size,
        eval_batch_size=trainer.eval_batch_size,
        clip=trainer.gradient_clip,
        accumulate=trainer.accumulate,
        eval_every=trainer.eval_every,
        limit_batches=2 if trainer.fast_dev_run else None,
        channels_last=trainer.channels_last,
        trainer_options=options,
        log_every=trainer.log_every,
        progress=trainer.progress,
        tensorboard="tensorboard" in trainer.loggers,
        csv="csv" in trainer.loggers,
        folder=folder.path,
        config_text=to_yaml(config),
        plugins=named_plugins(config.components),
        on_evaluated=on_evaluated,
    )


def _finish(parts: Parts, folder: RunFolder, session: Session, progress: Progress) -> Result:
    config, benchmark, network = parts.config, parts.benchmark, parts.network
    result = summarize(
        progress.tallies,
        name=config.name,
        strategy=str(parts.composition),
        benchmark=benchmark.name,
        backbone=config.backbone.name,
        seed=config.seed,
        class_order=benchmark.class_order,
        experiences=benchmark.classes,
        parameters=count_parameters(network),
        macs=count_macs(network, benchmark.input_shape),
        train_seconds=progress.train_seconds,
        steps=progress.steps,
        state_bytes=session.state_bytes(),
        versions=folder.versions(),
        run_folder=folder.path,
        baseline=progress.baseline,
        loss_terms=progress.loss_terms,
        exit_names=network.exit_names,
        exits=progress.exits,
        activity=progress.activity,
    )
    folder.write_ledger(
        network, progress.steps, progress.train_seconds, result.state_bytes, ledger=session.ledger
    )
    session.write_hyper_parameters(as_tree(config), {name: getattr(result, name) for name in METRICS})
    write_figures(result, folder.path / "figures")
    result.write(folder.path / "results.json")
    return result


def _refuse_plugins(config: Config, folder: RunFolder) -> None:
    """A run with plugins cannot go on: what they have gathered is in no checkpoint."""
    names = ", ".join(name for name, _ in named_plugins(config.components))
    if names:
        raise UnsupportedError(
            f"{folder.path}: has plugins of Avalanche's ({names}), whose state is in no checkpoint; run it anew"
        )


def run_config(run: str | Path, *, where: str = "load") -> Config:
    """The resolved config of a run.

    Raises:
        RunFolderError: No run folder.
        ConfigError: Its config cannot be read.
    """
    return _config_of(RunFolder.open(Path(run), where=where))


def _config_of(folder: RunFolder) -> Config:
    from omegaconf import OmegaConf

    tree = OmegaConf.to_container(read_yaml(folder.config_path), resolve=False)
    assert isinstance(tree, dict)
    try:
        return from_mapping({str(key): value for key, value in tree.items()})
    except ConfigError as error:
        raise ConfigError(f"{folder.config_path}: {error}") from None
