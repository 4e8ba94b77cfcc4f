"""The data that a conversion trains on, and those that it chooses by.

Shape suffixes: N samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from clframe.data.samples import concatenate
from clframe.errors import ConfigError, DataError
from clframe.functional.seeding import generator_for
from clframe.studies.batches import Batches, Part, SamplePart
from clframe.studies.target import Target
from clframe.studies.texts import TextPart

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
