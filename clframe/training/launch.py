"""Builds a session from plain arguments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import nn

from clframe.avalanche_bridge.imports import DDPStrategy, Fabric, LightningEnvironment
from clframe.avalanche_bridge.plugins import Named, make_plugins
from clframe.config.periods import Period
from clframe.core import Composition
from clframe.data.benchmark import Benchmark
from clframe.errors import UnsupportedError, reason_of
from clframe.nn.network import Network
from clframe.training.averaging import WeightAverage
from clframe.training.budget import TrainingPlan
from clframe.training.capture import Capture
from clframe.training.distributed import Group
from clframe.training.epochs import EarlyStopping
from clframe.training.module import ContinualModule, GroupsFactory, OptimizerFactory, SchedulerFactory
from clframe.training.monitor import Monitor
from clframe.training.run_progress import Progress
from clframe.training.scores import Scores
from clframe.training.session import Session
from clframe.training.strategy import LightningStrategy
from clframe.training.trainer_options import refuse_to_save, without_banners


def launch(
    *,
    network: Network,
    composition: Composition,
    benchmark: Benchmark,
    optimizer: OptimizerFactory,
    scheduler: SchedulerFactory | None,
    groups: GroupsFactory | None,
    seed: int,
    engine: Literal["fabric", "trainer"],
    accelerator: str,
    devices: int | list[int],
    precision: Any,
    epochs: int,
    batch_size: int,
    drop_last: bool,
    eval_batch_size: int,
    clip: float | None,
    on_nonfinite: Literal["stop", "warn", "skip"],
    accumulate: int,
    eval_every: int,
    limit_batches: int | None,
    channels_last: bool,
    capture: Capture,
    compile: bool,
    plan: TrainingPlan | None,
    trainer_options: dict[str, Any],
    early_stopping: EarlyStopping | None,
    log_every: int,
    progress: bool,
    tensorboard: bool,
    csv: bool,
    figures: Literal["end", "experience", "none"],
    record_activity: bool | None,
    folder: Path,
    config_text: str,
    checkpoint_period: Period | None = None,
    plugins: Named = (),
    group: Group | None = None,
    sync_batchnorm: bool = False,
    average: WeightAverage | None = None,
    on_evaluated: Callable[[Progress], None] | None,
) -> Session:
    """Set up Fabric, module, strategy and monitor; see these for the arguments.

    Of the processes of a ``group``, which train together, only the first one writes. With ``sync_batchnorm`` their
    batch normalization uses the statistics of the whole batch.

    Raises:
        UnsupportedError: Lightning refuses the accelerator or precision.
        ConfigError: A plugin's option names no layer.
    """
    module = ContinualModule(
        network,
        composition,
        optimizer=optimizer,
        scheduler=scheduler,
        groups=groups,
        seed=seed,
        clip=clip,
        on_nonfinite=on_nonfinite,
        average=average,
    )
    if group is not None and sync_batchnorm:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)  # also in the heads that components have attached
    writes = group is None or group.is_first
    scores = Scores(benchmark)
    layers = [name for name, _ in module.named_modules() if name]
    strategy = LightningStrategy(
        model=module,
        benchmark=benchmark,
        fabric=_fabric(accelerator, devices, precision) if group is None else _joined_fabric(group, precision),
        group=group,
        engine=engine,
        trainer=trainer_options,
        early_stopping=early_stopping,
        accumulate=accumulate,
        limit_batches=limit_batches,
        drop_last=drop_last,
        channels_last=channels_last,
        capture=capture,
        compile=compile,
        plan=plan,
        train_mb_size=batch_size,
        train_epochs=epochs,
        eval_mb_size=eval_batch_size,
        plugins=[*make_plugins(plugins, model=module, layers=layers), scores],
        evaluator=None,
        eval_every=eval_every,
    )
    monitor = Monitor(
        folder,
        experiences=len(benchmark),
        tensorboard=tensorboard and writes,
        csv=csv and writes,
        log_every=log_every,
        progress=progress and writes,
        log=writes,
        loggers=trainer_options.get("logger") or (),
    )
    return Session(
        strategy,
        benchmark,
        scores=scores,
        monitor=monitor,
        checkpoints=folder / "checkpoints",
        config=config_text,
        period=checkpoint_period,
        figures=figures,
        record_activity=record_activity,
        foreign=", ".join(filter(None, (*(name for name, _ in plugins), refuse_to_save(trainer_options)))),
        on_evaluated=on_evaluated,
    )


class ReplicaStrategy(DDPStrategy):
    """Lightning's strategy for several processes, without its wrapper around modules.

    DistributedDataParallel averages gradients of a module that every process has run on other samples and of whose
    parameters all are used. Here they are averaged after the backward pass, see :mod:`clframe.training.distributed`.
    """

    wraps_modules = False

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        """Return the module."""
        return module

    def _configure_launcher(self) -> None:
        """Do nothing: the processes have started, also where Lightning's launchers refuse to, as in notebooks."""


class JoinedProcesses(LightningEnvironment):
    """Lightning's description of processes that have started and joined already.

    Args:
        rank: Number of this process.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    @property
    def creates_processes_externally(self) -> bool:
        """Always."""
        return True

    def local_rank(self) -> int:
        """Return the number of this process on its machine."""
        return self._rank

    def node_rank(self) -> int:
        """Return the number of the machine: there is one."""
        return 0


def _joined_fabric(group: Group, precision: Any) -> Fabric:
    """A launched Fabric of one of several processes, each of which has its device."""
    kind = group.device.type
    with without_banners():
        fabric = Fabric(
            accelerator=kind,
            devices=group.size if kind == "cpu" else [int(device.index) for device in group.devices],
            strategy=ReplicaStrategy(cluster_environment=JoinedProcesses(group.rank)),
            precision=precision,
        )
        fabric.launch()
    assert fabric.device == group.device, "Lightning orders devices as they are given"
    return fabric


def _fabric(accelerator: str, devices: int | list[int], precision: Any) -> Fabric:
    try:
        with without_banners():
            fabric = Fabric(accelerator=accelerator, devices=devices, precision=precision)
            fabric.launch()
    except (RuntimeError, ValueError) as error:
        reason = reason_of(error)
        raise UnsupportedError(
            f"trainer: Lightning refuses accelerator {accelerator}, devices {devices}, precision {precision} "
            f"({reason}); choose others"
        ) from None
    return fabric
