"""Data of a conversion, and sparsity fine-tuning.

Shape suffixes: N samples, B batch, T tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import cos, pi
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.data.samples import concatenate
from clframe.data.target import Batches, DataSplit, SampleSplit, Target, TextSplit
from clframe.errors import ConfigError, DataError, UnsupportedError
from clframe.moe.pipeline import require_finite
from clframe.nn.types import Inputs
from clframe.process_state import preserve_generators
from clframe.seeding import derive_seed, generator_for
from clframe.sparsity import Site, find_sites
from clframe.sparsity.functional import Schedule, displacement, hoyer, l1, schedule_factor
from clframe.sparsity.penalties import hooked_module, site_activations

On = Literal["memory", "all", "last"]
"""Training data: the run's replay buffer, all training data, or the last experience's."""

HELD_OUT = 0.2
"""Fraction of the training data held out for validation if the target has no validation data."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ConversionData:
    """Data of a conversion.

    Attributes:
        on: Training data of a run.
        fit: Training data.
        validation: Validation data.
        notes: Remarks for readers of the results.
    """

    on: On | None
    fit: DataSplit
    validation: DataSplit
    notes: tuple[str, ...]


def choose_data(target: Target, *, on: On | None, seed: int) -> ConversionData:
    """Select the data of a conversion.

    Args:
        target: A run, or another model.
        on: Training data of a run; None selects its replay buffer, or the last experience if there is none.
        seed: Seed of the split into training and validation data, if necessary.

    Raises:
        ConfigError: Data that the target does not have.
        DataError: Too few samples.
    """
    if on is not None and on not in get_args(On):
        raise ConfigError(f"--on: found '{on}'; choose from {', '.join(get_args(On))}")
    notes: list[str] = []
    if target.run is None:
        if on is not None:
            raise ConfigError(f"--on: found '{on}' for {target.name}, which is not a run; leave it out")
        fit: DataSplit = target.splits.fit
    else:
        on = on or ("last" if _replay_memory(target) is None else "memory")
        fit = _run_data(target, on)
        if on == "all" and len(target.experiences) > 1:
            notes.append("trained on all data of all experiences: no longer a continual setting")
    validation = target.splits.validation
    if validation is None:
        fit, validation = _hold_out(fit, seed=seed)
        notes.append(
            f"settings were chosen on {len(validation)} training samples, excluded from this conversion but not from "
            f"the model's training: the target has no validation data"
        )
    if not len(fit) or not len(validation):
        raise DataError(
            f"{target.name}: found {len(fit)} training and {len(validation)} validation samples; give more"
        )
    return ConversionData(on=on, fit=fit, validation=validation, notes=tuple(notes))


def shuffle_batches(part: DataSplit, *, size: int, seed: int, epoch: int) -> tuple[Batches, list[int]]:
    """Batches of a data split and their order, both functions of seed and epoch.

    Samples of a benchmark are reshuffled; texts stay grouped by length.
    """
    generator = generator_for(seed, "moefy", "order", epoch)
    if isinstance(part, SampleSplit):  # texts are batched by length, which a permutation would undo
        part = _subset(part, torch.randperm(len(part), generator=generator))
    batches = part.batches(size=size)
    return batches, torch.randperm(len(batches), generator=generator).tolist()


def _run_data(target: Target, on: On) -> DataSplit:
    fit = target.splits.fit
    assert isinstance(fit, SampleSplit)
    if on == "all":
        return fit
    if on == "last":
        return SampleSplit(fit.samples[-1:], place=fit.place, tokens=fit.tokens)
    memory = _replay_memory(target)
    if memory is None:
        raise ConfigError(f"--on: found 'memory', but {target.name} has no replay buffer; give last or all")
    like = fit.samples[-1]
    kept = like.subset(torch.arange(0)).with_stored(memory["x"].cpu(), memory["y"].cpu())
    return SampleSplit([kept], place=fit.place, tokens=fit.tokens)


def _replay_memory(target: Target) -> Any:
    """State of the component with a replay buffer, if there is one."""
    assert target.run is not None
    learner = target.run.learner
    states = [learner.state[component.name] for component in learner.composition if component.keeps_memory]
    return next((state for state in states if state["x"] is not None and len(state["y"])), None)


def _hold_out(part: DataSplit, *, seed: int) -> tuple[DataSplit, DataSplit]:
    order_N = torch.randperm(len(part), generator=generator_for(seed, "moefy", "held out"))
    count = max(1, round(HELD_OUT * len(part))) if len(part) > 1 else 0
    return _subset(part, order_N[count:].sort().values), _subset(part, order_N[:count].sort().values)


def _subset(part: DataSplit, index_N: Tensor) -> DataSplit:
    if isinstance(part, SampleSplit):
        whole: Any = concatenate(part.samples)
        return SampleSplit([whole.subset(index_N)], place=part.place, tokens=part.tokens)
    if isinstance(part, TextSplit):
        y_N = None if part.y is None else part.y[index_N]
        rows = [part.rows[at] for at in index_N.tolist()]
        return TextSplit(rows, y_N, padding=part.padding, device=part.device, make=part.make)
    raise DataError(f"moefy: cannot hold validation data out of a {type(part).__name__}; set benchmark.validation=0.1")


Regularizer = Literal["hoyer", "l1", "displaced", "displaced_l1"]
Ramp = Literal["step", "epoch"]
Progress = Callable[[str, int, int], None]
"""Called with the name of a step, the amount done and the total."""

DISPLACED_BY = -10.0


@dataclass(frozen=True)
class FineTuning:
    """Losses of fine-tuning, averaged over each epoch."""

    task: tuple[float, ...]
    penalty: tuple[float, ...]
    """Without its weight."""


def fine_tune(
    model: nn.Module,
    body: nn.Module,
    part: DataSplit,
    *,
    logits: Callable[[nn.Module, Inputs], Sequence[Tensor]],
    epochs: int,
    batch: int,
    learning_rate: float,
    strength: float,
    regularizer: Regularizer = "hoyer",
    schedule: Schedule = "warmup",
    ramp: Ramp = "step",
    seed: int = 0,
    progress: Progress | None = None,
) -> FineTuning:
    """Train ``model`` on its task plus ``strength`` times the mean sparsity penalty over the hidden layers of ``body``.

    The task loss is the cross-entropy averaged over exits. Adam with cosine decay to a thousandth of the initial rate.
    Leaves the model in evaluation mode without gradients.

    Args:
        model: Changed in place.
        body: Submodule whose hidden layers are penalized.
        part: Labeled data, reshuffled in each epoch.
        logits: Differentiable scores of each exit, from model and inputs.
        epochs: Passes over the data.
        batch: Batch size.
        learning_rate: Initial rate.
        strength: Weight of the penalty.
        regularizer: ``hoyer``, ``l1``, or either of the pre-activations' distance above -10 (``displaced``).
        schedule: Schedule of the weight, see :func:`~clframe.sparsity.functional.schedule_factor`.
        ramp: Whether the weight changes with every step, from 0 at the first one, or with every epoch.
        seed: Seed of order and dropout.
        progress: Called with the progress.

    Raises:
        DataError: Data without labels.
        DivergenceError: A loss that is not finite.
        UnsupportedError: A displaced penalty on layers that do not expose their pre-activations.
    """
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    sites = find_sites(body)
    lost = [site.name for site in sites if site.overwrites]
    if lost and regularizer.startswith("displaced"):
        raise UnsupportedError(
            f"--regularizer: found {regularizer} with '{lost[0]}', which does not keep its pre-activations; use hoyer "
            f"or l1"
        )
    task, penalty = [], []
    # Dropout draws from the global generators, whose state the caller gets back.
    with preserve_generators(), torch.enable_grad(), _training_mode(model):
        torch.manual_seed(derive_seed(seed, "moefy", "dropout"))
        done = 0
        for epoch in range(epochs):
            batches, order = shuffle_batches(part, size=batch, seed=seed, epoch=epoch)
            steps = epochs * len(order)
            total_2 = torch.zeros(2)
            for at in order:
                _set_rate(optimizer, learning_rate * (0.001 + 0.999 * (1 + cos(pi * (done / steps))) / 2))
                inputs, y, _ = batches[at]
                if y is None:
                    raise DataError("moefy: found data without labels to fine-tune on; set --sparsify 0")
                with _collect_penalties(sites, regularizer) as values:
                    exits = logits(model, inputs)
                loss = torch.stack([_cross_entropy(scores, y) for scores in exits]).mean()
                extra = torch.stack(values).mean() if values else loss.new_zeros(())
                optimizer.zero_grad()
                # From 0 at the first step, as the authors' code and the component ``sparsity``.
                fraction = done / steps if ramp == "step" else (epoch + 1) / epochs
                (loss + strength * schedule_factor(schedule, fraction) * extra).backward()
                optimizer.step()
                total_2 += torch.stack([loss.detach(), extra.detach()]).float().cpu()
                done += 1
                if progress is not None:
                    progress("sparsify", done, steps)
            task.append(float(total_2[0]) / len(order))
            penalty.append(float(total_2[1]) / len(order))
            require_finite(task, of="fine-tuning")
            require_finite(penalty, of="fine-tuning (penalty)")
    return FineTuning(tuple(task), tuple(penalty))


def _cross_entropy(scores: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of scores_BC and y_B, or of scores_BTC and y_BT with targets -100 ignored."""
    return F.cross_entropy(scores.flatten(0, -2), y.flatten())


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


@contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    model.train()
    try:
        for p, _ in wanted:
            p.requires_grad_(p.is_floating_point())
        yield
    finally:
        model.eval()
        for p, flag in wanted:
            p.requires_grad_(flag)
            p.grad = None


@contextmanager
def _collect_penalties(sites: Sequence[Site], regularizer: Regularizer) -> Iterator[list[Tensor]]:
    """Context that collects the penalty of each site during a forward pass."""
    values: list[Tensor] = []

    def add(site: Site, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        pre_TN, fired_TN = site_activations(site, inputs[0], output)
        x_TN = displacement(pre_TN, by=DISPLACED_BY) if regularizer.startswith("displaced") else fired_TN
        values.append(l1(x_TN) if regularizer.endswith("l1") else hoyer(x_TN))

    hooks = [hooked_module(site).register_forward_hook(partial(add, site)) for site in sites]
    try:
        yield values
    finally:
        for hook in hooks:
            hook.remove()
