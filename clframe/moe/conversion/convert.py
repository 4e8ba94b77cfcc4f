"""The steps of a conversion, up to the routers.

Shape suffixes: B batch, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from clframe.data.target import Batch, Batches, Part, Target
from clframe.errors import DataError
from clframe.moe.conversion.options import MOST, Options, check_model, check_numbers
from clframe.moe.conversion.training import Material, Tick, Tuned, material, tune
from clframe.moe.convert import to_experts
from clframe.moe.dense import dense_networks
from clframe.moe.distill import replace_projections
from clframe.moe.pipeline import Recipe, fit_routers
from clframe.moe.routed import RoutedExperts
from clframe.nn.frozen import answering
from clframe.nn.types import Inputs
from clframe.sparsity import swap_for_relu


@dataclass(frozen=True, eq=False, kw_only=True)
class Converted:
    """A model of experts, before anybody measures it.

    Attributes:
        target: Whose model it is now.
        dense: A copy of the model as it was.
        options: As asked for.
        recipe: What was done.
        layers: By their names inside the model.
        replaced: MACs of a token of projections, in the dense model, by the names of the layers that they became.
        accuracies: On test data after each step: ``dense``, ``projections``, ``sparsified``.
        distilled: Loss of each epoch of projections.
        tuned: Losses of fine-tuning; None where there was none.
        router_losses: Of each epoch.
        material: What it was trained on and is chosen by.
    """

    target: Target
    dense: nn.Module
    options: Options
    recipe: Recipe
    layers: Mapping[str, RoutedExperts]
    replaced: Mapping[str, int]
    accuracies: Mapping[str, float]
    distilled: tuple[float, ...]
    tuned: Tuned | None
    router_losses: tuple[float, ...]
    material: Material

    def answers(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, ...]:
        """Of each exit of this model or the dense one."""
        return answers_of(self.target, model, inputs)


def convert(target: Target, options: Options, *, tick: Tick | None = None) -> Converted:
    """The steps up to the routers; the model is changed in place, with all experts running.

    Args:
        target: Its model is dense.
        options: What to do.
        tick: Told of progress.

    Raises:
        ClframeError: As :func:`moefy_target`.
    """
    check_model(target)
    found = material(target, on=options.on, seed=options.seed)
    batches = found.fit.batches(size=options.batch, limit=options.samples or None)
    call = _call(target)
    check_numbers(_widths(target, options, batches), experts=options.experts, expert_size=options.expert_size)
    most = MOST if options.experts is None and options.expert_size is None else None
    dense = copy.deepcopy(target.model)
    body, prefix = target.body, f"{target.body_name}." if target.body_name else ""
    accuracies = {"dense": _accuracy(target, options)}
    recipe = Recipe(
        body=target.body_name, relu=options.swaps, experts=options.experts, expert_size=options.expert_size, most=most,
        router=options.router_kind, router_width=options.router_width, gate=options.gate_kind,
        k=None if options.gate_kind != "top_k" else options.k,
    )  # fmt: skip
    distilled: tuple[float, ...] = ()
    replaced: dict[str, int] = {}
    if options.projections:
        made = replace_projections(
            body, Shown(batches, "projections", options.projection_epochs, tick), epochs=options.projection_epochs,
            learning_rate=options.projection_lr, call=call, seed=options.seed,
        )  # fmt: skip
        distilled, recipe = made.losses, replace(recipe, projections=made.places)
        replaced = {
            prefix + name: part.up.in_features * part.down.out_features for name, part in made.projections.items()
        }
        accuracies["projections"] = _accuracy(target, options)
    if options.swaps:
        swap_for_relu(body)
    tuned = _tuned(target, found.fit, options, tick) if options.sparsify else None
    if options.swaps or options.sparsify:
        accuracies["sparsified"] = _accuracy(target, options)
    layers = to_experts(
        body, experts=options.experts, expert_size=options.expert_size, most=most, split=options.split,
        router=options.router_kind, router_width=options.router_width, batches=batches, call=call, seed=options.seed,
    )  # fmt: skip
    losses = fit_routers(
        target.model, Shown(batches, "routers", options.epochs, tick), epochs=options.epochs, learning_rate=options.lr,
        call=call,
    )  # fmt: skip
    target.model.eval()
    return Converted(
        target=target, dense=dense, options=options, recipe=recipe, replaced=replaced, accuracies=accuracies,
        layers={prefix + name: layer for name, layer in layers.items()}, distilled=distilled, tuned=tuned,
        router_losses=tuple(losses), material=found,
    )  # fmt: skip


def answers_of(target: Target, model: nn.Module, inputs: Inputs) -> tuple[Tensor, ...]:
    """scores_BC of each exit as the strategy answers, or those of a model that is no run."""
    if target.run is None:
        return (target.answer(model, inputs),)
    learner = target.run.learner
    return tuple(learner.adjust_logits(model(inputs, taps=learner.taps)).logits)


class Shown(Sequence[Batch]):
    """Batches that say how many of them have been taken.

    Args:
        batches: What to take them from.
        step: Name of the step.
        epochs: How often all will be taken.
        tick: Told of it.
    """

    def __init__(self, batches: Batches, step: str, epochs: int, tick: Tick | None) -> None:
        self._batches, self._step, self._tick = batches, step, tick
        self._done, self._whole = 0, max(1, epochs) * len(batches)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, at: Any) -> Any:
        """As the batches'."""
        return self._batches[at]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            yield batch
            self._done = min(self._done + 1, self._whole)
            if self._tick is not None:
                self._tick(self._step, self._done, self._whole)


def _call(target: Target) -> Callable[[nn.Module, Batch], object]:
    """Runs the whole model, whichever part of it is looked at."""
    return lambda _part, batch: target.answer(target.model, batch.inputs)


def _widths(target: Target, options: Options, batches: Batches) -> dict[str, int]:
    """Hidden neurons of each network that will be split, found on a copy: what cannot be done is refused here."""
    trial = replace(target, model=copy.deepcopy(target.model))
    if options.projections:
        replace_projections(trial.body, batches[:1], epochs=0, call=_call(trial))
    if options.swaps:
        swap_for_relu(trial.body)
    return {network.name: len(network.up[0]) for network in dense_networks(trial.body)}


def _tuned(target: Target, part: Part, options: Options, tick: Tick | None) -> Tuned:
    def logits(model: nn.Module, inputs: Inputs) -> Sequence[Tensor]:
        if target.run is None:
            return (target.answer(model, inputs),)
        found: tuple[Tensor, ...] = model(inputs).logits
        return found

    return tune(
        target.model, target.body, part, logits=logits, epochs=options.sparsify, batch=options.batch,
        learning_rate=options.sparsify_lr, strength=options.penalty, regularizer=options.regularizer,
        schedule=options.schedule, seed=options.seed, tick=tick,
    )  # fmt: skip


def tests_of(target: Target, options: Options) -> list[Batches]:
    """Test data, experience by experience where there are some."""
    parts = target.experiences or (target.parts.test,)
    limit = None if options.limit is None else max(1, options.limit // len(parts))
    return [part.batches(size=options.batch, limit=limit) for part in parts]


def _accuracy(target: Target, options: Options) -> float:
    """Of the last exit on test data."""
    right, asked = 0, 0
    with answering(target.model):
        for batch in (batch for part in tests_of(target, options) for batch in part):
            y = targets_of(batch)
            choice = answers_of(target, target.model, batch.inputs)[-1].argmax(-1)
            right += int(((choice == y) & (y != -100)).sum())
            asked += int((y != -100).sum())
    if not asked:
        raise DataError(f"{target.name}: found no test data; give some")
    return right / asked


def targets_of(batch: Batch) -> Tensor:
    """The labels of a batch.

    Raises:
        DataError: It has none.
    """
    if batch.targets is None:
        raise DataError("moefy: found data without labels; give a benchmark with labels")
    return batch.targets
