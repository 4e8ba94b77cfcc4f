"""Build optimizers, parameter groups and learning-rate schedules from a config."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from clframe.config.optimizers import optimizer_class
from clframe.config.schema import DEFAULT_GAMMA, Config, OptimizerConfig, rate_of
from clframe.config.trainer import TrainerConfig
from clframe.core import Composition
from clframe.errors import ConfigError, nearest, reason_of
from clframe.nn.network import Network
from clframe.training.averaging import WeightAverage

PARTS = ("backbone", "heads")
"""Groups of parameters that every network has; others are named by the component that added them."""


def check_optimizer(config: Config, composition: Composition) -> None:
    """Refuse settings without any effect.

    Not part of the schema, which also reads the configs of finished runs: those stay readable.

    Raises:
        ConfigError: A rate that is 0 in float32, a factor that no schedule reads, a warmup as long as the experience,
            or a group of something that the network does not have.
    """
    optimizer, epochs = config.optimizer, config.trainer.epochs
    for where, rate in (("optimizer.lr", optimizer.lr),
                        *((f"optimizer.groups.{name}.lr", group.get("lr", 1.0))
                          for name, group in optimizer.groups.items())):  # fmt: skip
        for value in rate.values() if isinstance(rate, dict) else (rate,):
            if value < torch.finfo(torch.float32).tiny:
                raise ConfigError(f"{where}: found {value}, which is 0 in float32; give a larger number")
    if optimizer.gamma != DEFAULT_GAMMA and optimizer.schedule not in ("multistep", "step", "exponential"):
        raise ConfigError(
            f"optimizer.gamma: found {optimizer.gamma} with the schedule '{optimizer.schedule}', which has no factor; "
            f"leave it out or set optimizer.schedule"
        )
    if optimizer.warmup and optimizer.warmup >= epochs:
        raise ConfigError(f"optimizer.warmup: found {optimizer.warmup} for {epochs} epochs; give less, or more epochs")
    known = (*PARTS, *(component.name for component in composition))
    for name in optimizer.groups:
        if name not in known:
            close = nearest(name, known)
            advice = f"did you mean '{close}'?" if close else f"groups here are {', '.join(known)}"
            raise ConfigError(f"optimizer.groups.{name}: is not in the network; {advice}")
    if config.benchmark.online is not None and not config.benchmark.boundaries and has_rates_by_experience(optimizer):
        raise ConfigError(
            "optimizer.lr: found rates by experience for an online stream without boundaries; give one rate"
        )


def has_rates_by_experience(config: OptimizerConfig) -> bool:
    """Whether the first experience has another learning rate than later ones."""
    return isinstance(config.lr, dict) or any(isinstance(group.get("lr"), dict) for group in config.groups.values())


def build_optimizer(config: OptimizerConfig) -> Callable[..., torch.optim.Optimizer]:
    """Return the function from parameters, or from groups of them, to the optimizer.

    Without :func:`build_groups` its learning rate is that of the first experience.
    """
    kind, options = optimizer_class(config.name), config.torch_options()
    if config.fused is True:
        options["fused"] = True

    def make(parameters: Iterable[Any]) -> torch.optim.Optimizer:
        try:
            return kind(parameters, **options)
        except (RuntimeError, ValueError, TypeError) as error:  # what depends on the device or type of the weights
            reason = reason_of(error)
            raise ConfigError(f"optimizer: {config.name} refuses the weights ({reason}); change its options") from None

    return make


def build_groups(config: OptimizerConfig) -> Callable[[Network, int], list[dict[str, Any]]] | None:
    """Return the function from a network and the index of an experience to groups of parameters with their options.

    None if all parameters have the same options in every experience.
    """
    if not config.groups and not has_rates_by_experience(config):
        return None

    def split(network: Network, experience: int) -> list[dict[str, Any]]:
        base = {"lr": rate_of(config.lr, experience)}
        if not config.groups:
            return [{"params": list(network.parameters()), **base}]
        found: dict[str, list[torch.nn.Parameter]] = {name: [] for name in (*config.groups, "")}
        for name, parameter in network.named_parameters():
            part = part_of(name)
            found[part if part in config.groups else ""].append(parameter)
        groups = []
        for part, parameters in found.items():
            options = {**base, **config.groups.get(part, {})}
            if parameters:
                groups.append({"params": parameters, **options, "lr": rate_of(options["lr"], experience),
                               "name": part or "others"})  # fmt: skip
            elif part:
                raise ConfigError(f"optimizer.groups.{part}: found no parameters of it in the network; leave it out")
        return groups

    return split


def part_of(parameter: str) -> str:
    """The group to which a parameter of a network belongs.

    >>> part_of("backbone.stages.0.weight"), part_of("heads.1.weight"), part_of("extras.prd.0.weight")
    ('backbone', 'heads', 'prd')
    """
    first, *rest = parameter.split(".")
    return "heads" if first == "ensemble" else rest[0] if first == "extras" else first


def build_scheduler(config: OptimizerConfig, epochs: int) -> Callable[..., Any] | None:
    """Return the function from the optimizer to its learning-rate schedule; None keeps the rate constant."""
    schedules = torch.optim.lr_scheduler
    main: Callable[..., Any] | None = None
    if config.schedule == "cosine":
        main = partial(schedules.CosineAnnealingLR, T_max=epochs)
    elif config.schedule == "linear":
        main = partial(schedules.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=epochs)
    elif config.schedule == "exponential":
        main = partial(schedules.ExponentialLR, gamma=config.gamma)
    elif config.schedule == "multistep":
        main = partial(schedules.MultiStepLR, milestones=list(config.milestones), gamma=config.gamma)
    elif config.schedule == "plateau":
        factor = 1 / 3 if config.factor is None else config.factor
        patience = 5 if config.patience is None else config.patience
        main = partial(schedules.ReduceLROnPlateau, factor=factor, patience=patience)
    elif config.schedule == "step":
        main = partial(schedules.StepLR, step_size=config.step or 1, gamma=config.gamma)
    if not config.warmup:
        return main

    def with_warmup(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        # All of these schedules multiply the current rate, so that chaining two of them multiplies their factors.
        rise = schedules.LinearLR(optimizer, start_factor=1 / (config.warmup + 1), total_iters=config.warmup)
        return schedules.ChainedScheduler([rise, *([] if main is None else [main(optimizer)])])

    return with_warmup


def build_average(config: TrainerConfig) -> WeightAverage | None:
    """Return the average of the weights; None without one."""
    return None if config.ema.decay is None else WeightAverage(config.ema.decay, warmup=config.ema.warmup)
