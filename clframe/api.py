"""Public functions that take a config: train, load a trained model, explain a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import OmegaConf

from clframe.accounting import count_macs, count_parameters
from clframe.build import (
    Setup,
    build,
    build_backbone,
    build_optimizer,
    build_scheduler,
    build_strategy,
    lightning_options,
)
from clframe.config.files import read_yaml
from clframe.config.load import load_config
from clframe.config.schema import Config, named_plugins
from clframe.config.typed import as_tree, from_mapping, to_yaml
from clframe.errors import ConfigError, Interrupted, RunFolderError, UnsupportedError
from clframe.nn import Network
from clframe.report.explanation import explanation
from clframe.report.writing import write_figures
from clframe.results import Result, summarize
from clframe.run_folder import RunFolder
from clframe.seeding import torch_settings

if TYPE_CHECKING:
    from clframe.training.session import Progress, Session
    from clframe.training.trained import TrainedModel

_log = logging.getLogger(__name__)


def run(
    config: str | Config = "quickstart",
    overrides: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    on_built: Callable[[Setup], None] | None = None,
    on_evaluated: Callable[[Progress], None] | None = None,
) -> Result:
    """Train and evaluate on every experience of a benchmark; what ``clframe run`` does.

    Args:
        config: A config's name, path, or typed config.
        overrides: Like those of the command line, ``"trainer.epochs=3"``.
        output: Folder for run folders; None takes the config's (``runs``).
        resume: A run folder to resume; its own config is used and ``config`` is ignored.
        on_built: Called once with the objects of the run, before any training.
        on_evaluated: Called with the progress after every experience.

    Returns:
        The result, as written to ``results.json``.

    Raises:
        ClframeError: Anything a user can fix, in one line.
        Interrupted: A KeyboardInterrupt during training; its ``folder`` can be resumed.
    """
    if resume is not None:
        if overrides:
            raise ConfigError("resume: takes no overrides; a resumed run uses the config it started with")
        folder = RunFolder.open(Path(resume))
        config = _read_config(folder)
        _refuse_plugins(config, folder)
    elif isinstance(config, str):
        config = load_config(config, overrides)
    elif overrides:
        raise ConfigError("run: overrides need a config's name; change a typed config with dataclasses.replace")
    if output is not None and resume is None:
        config = replace(config, output=str(output))
    setup = build(config)
    if on_built is not None:
        on_built(setup)
    if resume is None:
        folder = RunFolder.create(Path(config.output), name=config.name, seed=config.seed)
    with folder.lock(), torch_settings(threads=config.trainer.threads, deterministic=config.trainer.deterministic):
        try:
            if resume is None:
                folder.write_config(to_yaml(setup.config))
            else:
                folder.prepare_resume()
            session = _session(setup, folder, on_evaluated)
        except BaseException:
            folder.discard()
            raise
        try:
            if resume is not None:
                session.resume()
            return _finish(setup, folder, session, session.run())
        except KeyboardInterrupt as stop:
            raise Interrupted(folder.path) from stop
        finally:
            session.close()


def load(run: str | Path, *, device: str = "cpu") -> TrainedModel:
    """Load the trained model of a run for prediction; no data and no code are read.

    Args:
        run: A run folder, finished or not, or the folder of a model converted by ``clframe moefy``.
        device: Device of the model.

    Raises:
        RunFolderError: No run folder, or no readable checkpoint in it.
    """
    from clframe.training.trained import CONVERTED, load_newest, read_recipe, restore_model

    folder = RunFolder.open(Path(run), where="load")
    recipe = read_recipe(folder.path) if (folder.path / CONVERTED).is_file() else None
    config = _read_config(folder)
    content = load_newest(folder.path, device=torch.device(device))
    network = Network(build_backbone(config.backbone)(tuple(content["data"]["input_shape"])))
    try:
        strategy = build_strategy(config.strategy, config.components)
        trained = restore_model(network, strategy, content, recipe=recipe)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunFolderError(f"{folder.path}: the newest checkpoint does not fit its config ({reason})") from error
    network.to(device)
    return trained


def explain(config: str | Config = "quickstart", overrides: Sequence[str] = ()) -> str:
    """Describe a run without training: config, stream, hooks, loss terms, slots, sizes and costs."""
    if isinstance(config, str):
        config = load_config(config, overrides)
    setup = build(config)
    network = setup.network
    for component in setup.composition.acting_at("setup_network"):
        component.setup_network(network)
    network.grow(range(len(setup.benchmark.class_order)))
    return explanation(
        config=to_yaml(setup.config),
        composition=setup.composition,
        benchmark=setup.benchmark,
        network=network,
        plugins=named_plugins(setup.config.components),
    )


def run_config(run: str | Path, *, where: str = "load") -> Config:
    """Read the resolved config of a run folder.

    Raises:
        RunFolderError: No run folder.
        ConfigError: A config that cannot be read.
    """
    return _read_config(RunFolder.open(Path(run), where=where))


def _session(setup: Setup, folder: RunFolder, on_evaluated: Callable[[Progress], None] | None) -> Session:
    from clframe.training.launch import launch
    from clframe.training.trainer import early_stopping

    config, trainer = setup.config, setup.config.trainer
    options = lightning_options(trainer, folder.path)
    return launch(
        network=setup.network,
        composition=setup.composition,
        benchmark=setup.benchmark,
        optimizer=build_optimizer(config.optimizer),
        scheduler=build_scheduler(config.optimizer, trainer.epochs),
        seed=config.seed,
        engine=trainer.engine,
        accelerator="cuda" if trainer.accelerator == "gpu" else trainer.accelerator,
        devices=list(trainer.devices) if isinstance(trainer.devices, tuple) else trainer.devices,
        precision=trainer.precision,
        epochs=1 if trainer.fast_dev_run else trainer.epochs,
        batch_size=trainer.batch_size,
        drop_last=trainer.drop_last,
        eval_batch_size=trainer.eval_batch_size,
        clip=trainer.gradient_clip,
        on_divergence=trainer.on_divergence,
        accumulate=trainer.accumulate,
        eval_every=trainer.eval_every,
        limit_batches=2 if trainer.fast_dev_run else None,
        channels_last=trainer.channels_last,
        trainer_options=options,
        early_stopping=None if trainer.engine == "trainer" else early_stopping(trainer.callbacks),
        log_every=trainer.log_every,
        progress=trainer.progress,
        tensorboard="tensorboard" in trainer.loggers,
        csv="csv" in trainer.loggers,
        folder=folder.path,
        config_text=to_yaml(config),
        plugins=named_plugins(config.components),
        on_evaluated=on_evaluated,
    )


def _finish(setup: Setup, folder: RunFolder, session: Session, progress: Progress) -> Result:
    config, benchmark, network = setup.config, setup.benchmark, setup.network
    result = summarize(
        progress.tallies,
        name=config.name,
        strategy=str(setup.composition),
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
        diverged=progress.diverged,
        exit_names=network.exit_names,
        exits=progress.exits,
        activity=progress.activity,
    )
    folder.write_ledger(network, progress.steps, progress.train_seconds, result.state_bytes, ledger=session.ledger)
    result.write(folder.path / "results.json")
    # After the results: a failure to draw must not lose a run that took hours.
    try:
        session.write_hyper_parameters(as_tree(config), result.metrics)
        write_figures(result, folder.path / "figures")
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        _log.warning("%s: figures could not be drawn (%s); results.json is complete", folder.path, reason)
    return result


def _refuse_plugins(config: Config, folder: RunFolder) -> None:
    """Refuse to resume a run with Avalanche plugins: checkpoints do not contain their state."""
    names = ", ".join(name for name, _ in named_plugins(config.components))
    if names:
        raise UnsupportedError(
            f"{folder.path}: has Avalanche plugins ({names}), whose state is not in checkpoints; start a new run"
        )


def _read_config(folder: RunFolder) -> Config:
    tree = OmegaConf.to_container(read_yaml(folder.config_path), resolve=False)
    assert isinstance(tree, dict)
    try:
        return from_mapping({str(key): value for key, value in tree.items()})
    except ConfigError as error:
        raise ConfigError(f"{folder.config_path}: {error}") from None
