"""Sparsity fine-tuning: a model goes on learning its task while few neurons are kept active.

Shape suffixes: B batch, C classes, T tokens, N neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import cos, pi
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.analysis.places import Inputs
from clframe.errors import DataError, UnsupportedError
from clframe.functional.seeding import derive_seed
from clframe.functional.sparsity import displaced, hoyer, l1
from clframe.nn.sparsity import Site, find_sites
from clframe.nn.sparsity.watch import fired, hooked
from clframe.studies.batches import Part
from clframe.studies.experts.data import shuffled

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
