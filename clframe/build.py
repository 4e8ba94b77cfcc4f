"""The one file where config meets constructors. No class below sees a config object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clframe.accounting.macs import count_macs, count_parameters
from clframe.config.load import as_tree, from_mapping, load_config, read_yaml, to_yaml
from clframe.config.schema import Config, OptimizerConfig, TrainerConfig
from clframe.core import COMPONENTS, Composition, parse
from clframe.core.options import check_options
from clframe.data import SOURCES, Benchmark, class_incremental
from clframe.errors import ConfigError, UnsupportedError
from clframe.functional.seeding import derive_seed
from clframe.metrics import METRICS
from clframe.nn import BACKBONES, Network
from clframe.reporting.explanation import explanation
from clframe.reporting.figures import write_figures
from clframe.reporting.folder import RunFolder
from clframe.reporting.results import Result, summarize

if TYPE_CHECKING:
    from clframe.training.session import Progress, Session


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
    on_evaluated: Callable[[Progress], None] | None = None,
) -> Result:
    """Train and evaluate on every experience of a benchmark; what ``clframe run`` does.

    Args:
        config: A config's name, path, or typed config.
        overrides: Like those of the command line, ``"trainer.epochs=3"``.
        output: Folder for run folders; None takes the config's (``runs``).
        resume: A run folder to go on with; its own config is used and ``config`` is not read.
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
        config = from_mapping(_mapping(folder.config_path))
    elif isinstance(config, str):
        config = load_config(config, overrides)
    elif overrides:
        raise ConfigError("run: overrides go with a config's name; change a typed config with dataclasses.replace")
    if output is not None and resume is None:
        config = replace(config, output=str(output))
    parts = build(config)
    if resume is None:
        folder = RunFolder.create(Path(config.output), name=config.name, seed=config.seed)
        folder.write_config(to_yaml(config))
    with _global_settings(config.trainer):
        session = _session(parts, folder, on_evaluated)
        try:
            if resume is not None:
                session.resume()
            return _finish(parts, folder, session, session.run())
        finally:
            session.close()


def explain(config: str | Config = "quickstart", overrides: Sequence[str] = ()) -> str:
    """What a run would do, before any training: config, timetable, loss terms, slots, sizes and costs."""
    if isinstance(config, str):
        config = load_config(config, overrides)
    parts = build(config)
    network = parts.network
    network.grow(range(len(parts.benchmark.class_order)))
    return explanation(
        config=to_yaml(config),
        composition=parts.composition,
        benchmark=parts.benchmark,
        network=network,
    )


def build(config: Config) -> Parts:
    """Everything a config names, checked as far as it can be before training."""
    composition = build_strategy(config.strategy, config.components)
    backbone = BACKBONES.get(config.backbone.name, where="backbone.name")
    backbone_options = check_options(backbone, config.backbone.options, where="backbone")
    source_of = SOURCES.get(config.benchmark.name, where="benchmark.name")
    source = source_of(**check_options(source_of, config.benchmark.options, where="benchmark"))
    benchmark = class_incremental(
        source,
        experiences=config.benchmark.experiences,
        order=config.benchmark.class_order,
        seed=config.seed,
    )
    for component in composition:
        component.check(classes=source.classes)
    _check_trainer(config.trainer)
    torch.manual_seed(derive_seed(config.seed, "network"))
    network = Network(backbone(benchmark.input_shape, **backbone_options))
    return Parts(config, composition, benchmark, network)


def build_strategy(expression: str, components: Mapping[str, Mapping[str, Any]]) -> Composition:
    """The composition, with every options block checked, also of components that are not selected."""
    for name, options in components.items():
        component = COMPONENTS.get(name, where="components")
        component(**check_options(component, options, where=f"components.{name}"))
    return parse(expression, components)


def _optimizer(config: OptimizerConfig) -> Callable[..., Any]:
    if config.name == "sgd":
        return partial(
            torch.optim.SGD, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
    return partial(kind, lr=config.lr, weight_decay=config.weight_decay)


def _scheduler(config: OptimizerConfig, epochs: int) -> Callable[..., Any] | None:
    if config.schedule == "cosine":
        return partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs)
    if config.schedule == "multistep":
        return partial(
            torch.optim.lr_scheduler.MultiStepLR, milestones=list(config.milestones), gamma=config.gamma
        )
    return None


def _check_trainer(config: TrainerConfig) -> None:
    wanted = config.accelerator
    if wanted in ("cuda", "gpu") and not torch.cuda.is_available():
        raise UnsupportedError(f"trainer.accelerator: found {wanted}, but torch sees no GPU here; use cpu or auto")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise UnsupportedError("trainer.accelerator: found mps, but this machine has none; use cpu or auto")
    if isinstance(config.devices, tuple) and torch.cuda.is_available():
        count = torch.cuda.device_count()
        if config.devices[0] >= count:
            raise UnsupportedError(
                f"trainer.devices: found [{config.devices[0]}], but there are {count} GPUs; count from 0"
            )
    _lightning_parts(config, Path())


def _lightning_parts(config: TrainerConfig, folder: Path) -> dict[str, Any]:
    """What only a Lightning Trainer takes; nothing under Fabric."""
    if config.engine != "trainer":
        return {}
    from clframe.training.trainer_options import trainer_options

    foreign = [name for name in config.loggers if name not in ("tensorboard", "csv")]
    return trainer_options(config.callbacks, foreign, precision=config.precision, folder=folder)


def _session(
    parts: Parts, folder: RunFolder, on_evaluated: Callable[[Progress], None] | None
) -> Session:
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
        trainer_options=options,
        log_every=trainer.log_every,
        progress=trainer.progress,
        tensorboard="tensorboard" in trainer.loggers,
        csv="csv" in trainer.loggers,
        folder=folder.path,
        config_text=to_yaml(config),
        on_evaluated=on_evaluated,
    )


class _global_settings:
    """Threads and determinism for the time of a run, put back afterwards."""

    def __init__(self, config: TrainerConfig) -> None:
        self._config = config

    def __enter__(self) -> None:
        self._threads = torch.get_num_threads()
        self._deterministic = torch.are_deterministic_algorithms_enabled()
        self._warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        torch.use_deterministic_algorithms(self._config.deterministic)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._threads)
        torch.use_deterministic_algorithms(self._deterministic, warn_only=self._warn_only)


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
    )
    folder.write_ledger(network, progress.steps, progress.train_seconds, result.state_bytes)
    session.write_hyper_parameters(as_tree(config), {name: getattr(result, name) for name in METRICS})
    write_figures(result, folder.path / "figures")
    result.write(folder.path / "results.json")
    return result


def _mapping(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    tree = OmegaConf.to_container(read_yaml(path), resolve=False)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}
