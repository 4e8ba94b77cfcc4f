"""The devices of a run, and which runs can use several."""

from __future__ import annotations

import os

import torch
from torch import distributed

from clframe.config.named import named_plugins
from clframe.config.schema import Config
from clframe.config.trainer import TrainerConfig
from clframe.core import Composition
from clframe.environment import available_cores
from clframe.errors import ConfigError, UnsupportedError


def training_devices(trainer: TrainerConfig, *, cuda: bool) -> tuple[torch.device, ...]:
    """Return the device of each process that trains.

    Args:
        trainer: The options.
        cuda: Whether the run trains on CUDA.

    >>> training_devices(TrainerConfig(devices=2), cuda=False)
    (device(type='cpu'), device(type='cpu'))
    >>> training_devices(TrainerConfig(devices=(3,)), cuda=True)
    (device(type='cuda', index=3),)
    """
    if not cuda:
        return (torch.device("cpu"),) * process_count(trainer)
    indices = trainer.devices if isinstance(trainer.devices, tuple) else range(trainer.devices)
    return tuple(torch.device("cuda", index) for index in indices)


def process_count(trainer: TrainerConfig) -> int:
    """Return the number of processes that train: one per device."""
    return len(trainer.devices) if isinstance(trainer.devices, tuple) else trainer.devices


def threads_of_process(trainer: TrainerConfig, *, cuda: bool) -> int | None:
    """Return the CPU threads of a process; several on CPUs divide the cores unless a number is given."""
    count = process_count(trainer)
    if trainer.threads is not None or count == 1 or cuda:
        return trainer.threads
    return max(1, int(available_cores()) // count)


def check_devices(config: Config, composition: Composition, *, cuda: bool) -> None:
    """Refuse what cannot train on several devices.

    Args:
        config: The config.
        composition: Its strategy.
        cuda: Whether the run trains on CUDA.

    Raises:
        ConfigError: An option that excludes several devices.
        UnsupportedError: A component, or this machine.
    """
    trainer = config.trainer
    count = process_count(trainer)
    if count == 1:
        return
    found = f"trainer.devices: found {list(trainer.devices) if isinstance(trainer.devices, tuple) else count}"
    if trainer.accelerator == "mps":
        raise UnsupportedError(f"{found} with accelerator mps, which has one device; give 1")
    if not distributed.is_available():
        raise UnsupportedError(f"{found}, but this build of torch has no collectives; give 1 or install another build")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UnsupportedError(
            f"{found} in a process that a launcher such as torchrun has started; start clframe once, it starts a "
            f"process for each device"
        )
    if cuda and count > torch.cuda.device_count():
        raise UnsupportedError(f"{found}, but torch sees {torch.cuda.device_count()} GPUs; give fewer")
    if trainer.engine == "trainer":
        raise ConfigError(f"{found} with engine trainer, which trains on one; set trainer.engine=fabric")
    if trainer.batch_size < 2 * count:
        raise ConfigError(
            f"trainer.batch_size: found {trainer.batch_size} for {count} devices, which divide a batch; give at least "
            f"{2 * count}"
        )
    if trainer.sync_batchnorm and not cuda:
        raise UnsupportedError("trainer.sync_batchnorm: found true, but torch synchronizes it on GPUs only; set false")
    plugins = [name for name, _ in named_plugins(config.components)]
    if plugins:
        raise UnsupportedError(
            f"{found} with the Avalanche plugin {plugins[0]}, which knows one process only; give 1 or leave it out"
        )
    unable = [component.name for component in composition if not component.distributed]
    if unable:
        raise UnsupportedError(
            f"{found}, but the component '{unable[0]}' does not declare that it computes the same in every process; "
            f"give 1, or set distributed = True in its class if it does"
        )
