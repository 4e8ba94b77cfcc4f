"""Sessions of a config: its options as arguments of :func:`clframe.training.launch.launch`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from clframe.build import Setup, lightning_options
from clframe.config.named import named_plugins
from clframe.config.trainer import TrainerConfig
from clframe.config.typed import to_yaml
from clframe.core import Composition
from clframe.device_defaults import on_cuda
from clframe.optimization import build_average, build_groups, build_optimizer, build_scheduler
from clframe.run_folder import RunFolder

if TYPE_CHECKING:
    from clframe.training.budget import TrainingPlan
    from clframe.training.distributed import Group
    from clframe.training.run_progress import Progress
    from clframe.training.session import Session

DEVELOPMENT_BATCHES = 2
"""Batches of an epoch, and of the evaluation of an experience, in a development run."""


def new_session(
    setup: Setup,
    folder: RunFolder,
    *,
    on_evaluated: Callable[[Progress], None] | None = None,
    group: Group | None = None,
    plan: TrainingPlan | None = None,
) -> Session:
    """Return the session of a run.

    Args:
        setup: The objects of the run, of which the network gets the exits and modules of the components.
        folder: Its folder.
        on_evaluated: Called with the progress after every experience.
        group: The processes of a run on several devices.
        plan: The steps that a budget affords.
    """
    from clframe.training.launch import launch
    from clframe.training.trainer_options import early_stopping

    config, trainer = setup.config, setup.config.trainer
    options = lightning_options(trainer, folder.path)
    return launch(
        network=setup.network,
        composition=setup.composition,
        benchmark=setup.benchmark,
        optimizer=build_optimizer(config.optimizer),
        scheduler=build_scheduler(config.optimizer, trainer.epochs),
        groups=build_groups(config.optimizer),
        seed=config.seed,
        engine=trainer.engine,
        accelerator="cuda" if trainer.accelerator == "gpu" else trainer.accelerator,
        devices=[trainer.devices[0]] if isinstance(trainer.devices, tuple) else 1,  # of one process
        precision=trainer.precision,
        epochs=development_epochs(setup.composition) if trainer.fast_dev_run else trainer.epochs,
        batch_size=trainer.batch_size,
        drop_last=trainer.drop_last,
        eval_batch_size=_eval_batch_size(trainer),
        clip=trainer.gradient_clip,
        on_nonfinite=trainer.on_nonfinite,
        average=build_average(trainer),
        accumulate=trainer.accumulate,
        eval_every=trainer.eval_every,
        limit_batches=DEVELOPMENT_BATCHES if trainer.fast_dev_run else None,
        channels_last=trainer.channels_last is True,
        capture=trainer.capture,
        compile=trainer.compile,
        plan=plan,
        trainer_options=options,
        early_stopping=None if trainer.engine == "trainer" else early_stopping(trainer.callbacks),
        log_every=trainer.log_every,
        progress=trainer.progress,
        tensorboard="tensorboard" in trainer.loggers,
        csv="csv" in trainer.loggers,
        figures=trainer.figures,
        record_activity=trainer.record_activity,
        folder=folder.path,
        config_text=to_yaml(config),
        checkpoint_period=trainer.checkpoint.period,
        plugins=named_plugins(config.components),
        group=group,
        sync_batchnorm=trainer.sync_batchnorm,
        on_evaluated=on_evaluated,
    )


def set_up_only(setup: Setup) -> None:
    """Set up everything that trains, as a run does, and write nothing: what a run would refuse is refused here.

    The network gets the exits and modules of the components.
    """
    quiet = replace(setup.config.trainer, loggers=(), figures="none", progress=False)
    with tempfile.TemporaryDirectory() as folder:
        alone = replace(setup, config=replace(setup.config, trainer=quiet))
        new_session(alone, RunFolder(Path(folder))).close()


def development_epochs(composition: Composition) -> int:
    """Return the epochs of an experience in a development run."""
    return max((component.fewest_epochs for component in composition), default=1)


def _eval_batch_size(trainer: TrainerConfig) -> int:
    """Samples per batch of an evaluation: on a CPU, a development run evaluates on as few as it trains on.

    On CUDA its batches are those of a complete run, because the memory that it needs is measured by development runs.
    """
    assert trainer.eval_batch_size != "auto"  # replaced when the run was built
    if trainer.fast_dev_run and not on_cuda(trainer):
        return min(trainer.eval_batch_size, trainer.batch_size)
    return trainer.eval_batch_size
