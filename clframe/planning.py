"""Plan of a run with a budget: the steps of each experience that it affords, and the size of the replay buffer."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from clframe.build import Setup, build_backbone
from clframe.config.named import WHERE, plugin_list
from clframe.config.trainer import CheckpointConfig
from clframe.core import Composition
from clframe.errors import ConfigError, UnsupportedError
from clframe.nn import Network
from clframe.optimization import build_scheduler
from clframe.process_state import preserve_generators
from clframe.run_folder import RunFolder
from clframe.sessions import new_session

if TYPE_CHECKING:
    from clframe.training.budget import ExperienceCost, TrainingPlan

_log = logging.getLogger(__name__)


def plan_training(setup: Setup) -> TrainingPlan | None:
    """Return the steps of each experience that the budget of a run affords; None without a budget.

    Args:
        setup: The objects of the run, before components have changed the network; they stay as they are.

    Raises:
        ConfigError: The budget affords no step, or the run is an extension.
        UnsupportedError: The run has Avalanche plugins.
    """
    from clframe.training.budget import TrainingPlan, plan_steps, pool_budgets

    config, budget = setup.config, setup.config.trainer.budget
    if not budget.is_set:
        return None
    if config.earlier:
        key, value = ("macs", budget.macs) if budget.relative is None else ("relative", budget.relative)
        raise ConfigError(
            f"trainer.budget.{key}: found {value:.4g} for an extended run, whose earlier experiences cannot be "
            f"counted; set trainer.budget.{key}=null"
        )
    if config.benchmark.online is not None:
        raise ConfigError(
            f"benchmark.online: found {config.benchmark.online} with trainer.budget, but such a stream takes every "
            f"sample once and has a fixed number of steps; leave out one of them"
        )
    _refuse_plugins(setup, "trainer.budget", "MACs")
    costs = _count_costs(setup)
    if not any(cost.batches for cost in costs):
        raise ConfigError(f"trainer.budget: {config.strategy} takes no training steps, whose number a budget would "
                          f"set; set trainer.budget.macs=null and trainer.budget.relative=null")  # fmt: skip
    if budget.macs is not None:
        budgets = [round(budget.macs)] * len(costs)
    else:
        assert budget.relative is not None
        budgets = [round(budget.relative * macs) for macs in naive_costs(setup)]
    budgets = pool_budgets(costs, budgets, training_experiences(setup))
    return TrainingPlan(plan_steps(costs, budgets), partial(build_scheduler, config.optimizer))


def fit_memory(setup: Setup) -> Setup:
    """Return the objects of a run whose components keep as much as ``trainer.memory`` allows.

    The replay buffer gets what teachers and importances leave of it. Without a limit the setup is returned as it is.

    Args:
        setup: The objects of the run, before components have changed the network.

    Raises:
        ConfigError: The strategy cannot keep so little, or has no buffer whose size can be chosen.
        UnsupportedError: The run has Avalanche plugins.
    """
    from clframe.training.budget import fit_buffer

    limit = setup.config.trainer.memory.bytes
    if limit is None:
        return setup
    where = f"trainer.memory: found {limit:,.0f} bytes"
    if setup.config.earlier:
        raise ConfigError(f"{where} for an extended run, which keeps the buffer of the run before; set "
                          f"trainer.memory.bytes=null")  # fmt: skip
    _refuse_plugins(setup, "trainer.memory", "memory")
    owner = next((component for component in setup.composition if component.keeps_memory), None)
    if owner is None or not hasattr(owner, "memory"):
        raise ConfigError(f"{where}, but {setup.config.strategy} has no replay buffer whose size it would set; set "
                          f"trainer.memory.bytes=null or add er")  # fmt: skip
    costs = _count_costs(setup)
    per_class = getattr(owner, "budget", "total") == "per_class"
    size = fit_buffer(costs, int(limit), per_class=per_class)
    if size < 1:
        others, sample = max(cost.others for cost in costs), max(cost.buffer // max(cost.stored, 1) for cost in costs)
        raise ConfigError(f"{where}, but teachers and importances take {others:,} and a stored sample {sample:,}; give "
                          f"more, or components that keep less")  # fmt: skip
    _log.info("trainer.memory: components.%s.memory=%d, not %d", owner.name, size, owner.memory)
    samples = sum(map(len, setup.benchmark.train))
    if size * (len(setup.benchmark.class_order) if per_class else 1) > samples:
        _log.warning("trainer.memory: %s bytes hold more than the %s samples of the stream and are not used up",
                     f"{limit:,.0f}", f"{samples:,}")  # fmt: skip
    changed = setup.composition.replace(lambda c: replace(c, memory=size) if c.keeps_memory else c)  # type: ignore[call-arg]  # checked above
    options = {**setup.config.components, owner.name: {**setup.config.components[owner.name], "memory": size}}
    return replace(setup, composition=changed, config=replace(setup.config, components=options))


def naive_costs(setup: Setup) -> list[int]:
    """Return the MACs of ``trainer.epochs`` epochs of each experience with ``naive`` and a network without exits."""
    epochs, benchmark = setup.config.trainer.epochs, setup.benchmark
    network = Network(build_backbone(setup.config.backbone)(benchmark.input_shape))
    config = replace(setup.config, strategy="naive", components={})
    costs = _count_costs(Setup(config, Composition(), benchmark, network))
    return [epochs * cost.epoch for cost in costs]


def _refuse_plugins(setup: Setup, limit: str, uncounted: str) -> None:
    """Refuse Avalanche plugins next to a limit of what training may cost, which theirs would exceed unnoticed.

    Raises:
        UnsupportedError: The run has plugins.
    """
    names = plugin_list(setup.config.components)
    if names:
        raise UnsupportedError(
            f"{WHERE}: found {names} with {limit}, but the {uncounted} of Avalanche plugins cannot be counted; leave "
            f"out the plugins, or {limit}"
        )


def training_experiences(setup: Setup) -> list[Sequence[int]]:
    """Return the experiences on whose data each experience trains."""
    count = len(setup.benchmark)
    owner = next(iter(setup.composition.acting_at("training_experiences")), None)
    return [(index,) if owner is None else owner.training_experiences(index, count) for index in range(count)]


def _count_costs(setup: Setup) -> tuple[ExperienceCost, ...]:
    """Count what every experience costs, on a copy of the run that takes one step per epoch and writes nothing."""
    quiet = replace(
        setup.config.trainer, loggers=(), figures="none", progress=False, on_nonfinite="warn",
        checkpoint=CheckpointConfig(every=None),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config = replace(setup.config, trainer=quiet)
        copied = replace(setup, config=config, network=copy.deepcopy(setup.network))
        session = new_session(copied, RunFolder(Path(folder)))
        try:
            with preserve_generators():
                return session.count_costs()
        finally:
            session.close()
