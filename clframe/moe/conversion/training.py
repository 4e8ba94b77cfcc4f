"""Data of a conversion, and sparsity fine-tuning.

Shape suffixes: N samples.
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
from clframe.data.target import Batches, Part, SamplePart, Target, TextPart
from clframe.errors import ConfigError, DataError, UnsupportedError
from clframe.nn.types import Inputs
from clframe.seeding import derive_seed, generator_for
from clframe.sparsity import Site, find_sites
from clframe.sparsity.functional import displaced, hoyer, l1
from clframe.sparsity.penalties import fired, hooked

On = Literal["memory", "all", "last"]
"""What the run's memory keeps; all training data; those of the last experience."""

HELD_OUT = 0.2
"""Share of the training data that is held out where the target holds none."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Material:
    """Data of a conversion.

    Attributes:
        on: Which training data, for a run.
        fit: To train on.
        validation: To choose by.
        notes: What a reader of the results has to know of them.
    """

    on: On | None
    fit: Part
    validation: Part
    notes: tuple[str, ...]


def material(target: Target, *, on: On | None, seed: int) -> Material:
    """The data for a target.

    Args:
        target: A run, or another model.
        on: Which training data of a run; None takes its memory, and the last experience where it keeps none.
        seed: Draws what is held out, where that has to be done.

    Raises:
        ConfigError: A choice that the target does not have.
        DataError: Too few samples.
    """
    if on is not None and on not in get_args(On):
        raise ConfigError(f"--on: found '{on}'; choose from {', '.join(get_args(On))}")
    notes: list[str] = []
    if target.run is None:
        if on is not None:
            raise ConfigError(f"--on: found '{on}' for {target.name}, which is no run; leave it out")
        fit: Part = target.parts.fit
    else:
        on = on or ("last" if _memory(target) is None else "memory")
        fit = _of_run(target, on)
        if on == "all" and len(target.experiences) > 1:
            notes.append("trained on all data of all experiences: no longer a continual setting")
    validation = target.parts.validation
    if validation is None:
        fit, validation = _held_out(fit, seed=seed)
        notes.append(
            f"settings were chosen on {len(validation)} training samples, held out of this conversion but not of the "
            f"training before it: the target has no validation data"
        )
    if not len(fit) or not len(validation):
        raise DataError(
            f"{target.name}: found {len(fit)} samples to train on and {len(validation)} to choose by; give more"
        )
    return Material(on=on, fit=fit, validation=validation, notes=tuple(notes))


def shuffled(part: Part, *, size: int, seed: int, epoch: int) -> tuple[Batches, list[int]]:
    """Batches of a part and the order to take them in, functions of seed and epoch.

    Samples of a benchmark are mixed anew; texts stay with others of their length.
    """
    generator = generator_for(seed, "moefy", "order", epoch)
    if isinstance(part, SamplePart):
        part = _chosen(part, torch.randperm(len(part), generator=generator))
    batches = part.batches(size=size)
    return batches, torch.randperm(len(batches), generator=generator).tolist()


def _of_run(target: Target, on: On) -> Part:
    fit = target.parts.fit
    assert isinstance(fit, SamplePart)
    if on == "all":
        return fit
    if on == "last":
        return SamplePart(fit.samples[-1:], place=fit.place, tokens=fit.tokens)
    memory = _memory(target)
    if memory is None:
        raise ConfigError(f"--on: found 'memory', but {target.name} keeps none; give last or all")
    like = fit.samples[-1]
    kept = like.subset(torch.arange(0)).extended(memory["x"].cpu(), memory["y"].cpu())
    return SamplePart([kept], place=fit.place, tokens=fit.tokens)


def _memory(target: Target) -> Any:
    """The state of the component that keeps samples, if it has some."""
    assert target.run is not None
    learner = target.run.learner
    states = [learner.state[component.name] for component in learner.composition if component.keeps_memory]
    return next((state for state in states if state["x"] is not None and len(state["y"])), None)


def _held_out(part: Part, *, seed: int) -> tuple[Part, Part]:
    order_N = torch.randperm(len(part), generator=generator_for(seed, "moefy", "held out"))
    count = max(1, round(HELD_OUT * len(part))) if len(part) > 1 else 0
    return _chosen(part, order_N[count:].sort().values), _chosen(part, order_N[:count].sort().values)


def _chosen(part: Part, index_N: Tensor) -> Part:
    if isinstance(part, SamplePart):
        whole: Any = concatenate(part.samples)
        return SamplePart([whole.subset(index_N)], place=part.place, tokens=part.tokens)
    if isinstance(part, TextPart):
        y_N = None if part.y is None else part.y[index_N]
        rows = [part.rows[at] for at in index_N.tolist()]
        return TextPart(rows, y_N, padding=part.padding, device=part.device, make=part.make)
    raise DataError(f"moefy: can hold nothing out of a {type(part).__name__}; set benchmark.validation=0.1")


Regularizer = Literal["hoyer", "l1", "displaced", "displaced_l1"]
Schedule = Literal["constant", "linear", "warmup"]
Tick = Callable[[str, int, int], None]
"""Called with a step's name, how much of it is done and how much there is."""

DISPLACED_BY = -10.0


@dataclass(frozen=True)
class Tuned:
    """Means over the batches of each epoch."""

    task: tuple[float, ...]
    penalty: tuple[float, ...]
    """Without its weight."""


def tune(
    model: nn.Module,
    body: nn.Module,
    part: Part,
    *,
    logits: Callable[[nn.Module, Inputs], Sequence[Tensor]],
    epochs: int,
    batch: int,
    learning_rate: float,
    strength: float,
    regularizer: Regularizer = "hoyer",
    schedule: Schedule = "warmup",
    seed: int = 0,
    tick: Tick | None = None,
) -> Tuned:
    """Train all of ``model`` on its task with ``strength`` times the mean penalty over the hidden layers of ``body``.

    The task's loss is the mean over exits of the cross-entropy. Adam, its rate falling along a cosine to a thousandth.
    Afterwards the model is in evaluation mode and holds no gradients.

    Args:
        model: Changed in place.
        body: The part of it whose hidden layers are watched.
        part: Labeled data, in another order in each epoch.
        logits: Of each exit, from the model and inputs; with gradients.
        epochs: Passes.
        batch: Samples of a batch.
        learning_rate: At the start.
        strength: Weight of the penalty.
        regularizer: ``hoyer``, ``l1``, or either of pre-activations' distance above -10.
        schedule: Of the strength over the steps: ``constant``; ``linear``, up to its value at the end; ``warmup``,
            linear up to it at half of them.
        seed: Of order and dropout.
        tick: Told of progress.

    Raises:
        DataError: Data without labels.
        UnsupportedError: A displaced penalty on layers that do not keep their pre-activations.
    """
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    sites = find_sites(body)
    lost = [site.name for site in sites if site.fused or getattr(site.module, "inplace", False)]
    if lost and regularizer.startswith("displaced"):
        raise UnsupportedError(
            f"--regularizer: found {regularizer} with '{lost[0]}', which does not keep its pre-activations; give hoyer "
            f"or l1"
        )
    task, penalty = [], []
    devices = {p.device for p in parameters if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.enable_grad(), _learning(model):
        torch.manual_seed(derive_seed(seed, "moefy", "dropout"))
        done = 0
        for epoch in range(epochs):
            batches, order = shuffled(part, size=batch, seed=seed, epoch=epoch)
            total_2 = torch.zeros(2)
            for at in order:
                share = done / (epochs * len(order))
                _set_rate(optimizer, learning_rate * (0.001 + 0.999 * (1 + cos(pi * share)) / 2))
                inputs, y, _ = batches[at]
                if y is None:
                    raise DataError("moefy: found data without labels to fine-tune on; set --sparsify 0")
                with _measuring(sites, regularizer) as values:
                    exits = logits(model, inputs)
                loss = torch.stack([_cross_entropy(scores, y) for scores in exits]).mean()
                extra = torch.stack(values).mean() if values else loss.new_zeros(())
                optimizer.zero_grad()
                (loss + strength * _ramp(schedule, (done + 1) / (epochs * len(order))) * extra).backward()
                optimizer.step()
                total_2 += torch.stack([loss.detach(), extra.detach()]).float().cpu()
                done += 1
                if tick is not None:
                    tick("sparsify", done, epochs * len(order))
            task.append(float(total_2[0]) / len(order))
            penalty.append(float(total_2[1]) / len(order))
    return Tuned(tuple(task), tuple(penalty))


def _ramp(schedule: Schedule, share: float) -> float:
    return {"constant": 1.0, "linear": share, "warmup": min(1.0, 2 * share)}[schedule]


def _cross_entropy(scores: Tensor, y: Tensor) -> Tensor:
    """Of scores_BC and y_B, or of scores_BTC and y_BT with -100 where nothing is asked."""
    return F.cross_entropy(scores.flatten(0, -2), y.flatten())


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


@contextmanager
def _learning(model: nn.Module) -> Iterator[None]:
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
def _measuring(sites: Sequence[Site], regularizer: Regularizer) -> Iterator[list[Tensor]]:
    """The penalty of each site as a pass goes by."""
    values: list[Tensor] = []

    def see(site: Site, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        pre_TN, fired_TN = fired(site, inputs[0], output)
        x_TN = displaced(pre_TN, by=DISPLACED_BY) if regularizer.startswith("displaced") else fired_TN
        values.append(l1(x_TN) if regularizer.endswith("l1") else hoyer(x_TN))

    hooks = [hooked(site).register_forward_hook(partial(see, site)) for site in sites]
    try:
        yield values
    finally:
        for hook in hooks:
            hook.remove()
