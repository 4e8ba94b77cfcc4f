"""Conversion of a target's model, from fine-tuning to trained routers.

Shape suffixes: B batch, C classes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from clframe.data.target import IGNORED, Batch, Batches, DataSplit, Target
from clframe.errors import DataError
from clframe.moe.conversion.options import Options, check_model, check_numbers
from clframe.moe.conversion.training import ConversionData, FineTuning, Progress, choose_data, fine_tune
from clframe.moe.dense import find_dense_ffns
from clframe.moe.distill import replace_projections
from clframe.moe.pipeline import Recipe, default_most, fit_experts
from clframe.moe.routed import RoutedExperts
from clframe.nn.frozen import evaluating
from clframe.nn.types import Inputs
from clframe.sparsity import swap_for_relu
from clframe.sparsity.scores import LanguageScores, accuracy_note, language_scores, token_sums

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class Conversion:
    """A converted model, not yet evaluated.

    Attributes:
        target: The target with the converted model.
        dense: Copy of the dense model.
        options: Options of the conversion.
        recipe: Description of the architecture.
        layers: Converted layers by their names in the model.
        replaced: Dense MACs per token of replaced attention projections, by the names of the layers of experts.
        accuracies: Test accuracy after each step: ``dense``, ``projections``, ``sparsified``.
        perplexities: The same for the perplexity of a language model; empty for other models.
        distilled: Loss of each epoch of projection distillation.
        tuned: Losses of fine-tuning; None without.
        router_losses: Loss of each epoch of router training.
        data: Training and validation data.
    """

    target: Target
    dense: nn.Module
    options: Options
    recipe: Recipe
    layers: Mapping[str, RoutedExperts]
    replaced: Mapping[str, int]
    accuracies: Mapping[str, float]
    perplexities: Mapping[str, float]
    distilled: tuple[float, ...]
    tuned: FineTuning | None
    router_losses: tuple[float, ...]
    data: ConversionData

    def exit_logits(self, model: nn.Module, inputs: Inputs) -> tuple[Tensor, ...]:
        """Scores of each exit of the converted or the dense model."""
        return exit_logits(self.target, model, inputs)


def convert(target: Target, options: Options, *, progress: Progress | None = None) -> Conversion:
    """Convert a target's model in place, up to trained routers, and leave all experts active.

    Args:
        target: Target with a dense model.
        options: Options of the conversion.
        progress: Called with the progress of each step.

    Raises:
        ClframeError: See :func:`~clframe.moe.conversion.study.moefy_target`.
    """
    check_model(target)
    found = choose_data(target, on=options.on, seed=options.seed)
    batches = found.fit.batches(size=options.batch, limit=options.samples or None)
    call = _call(target)
    check_numbers(
        _hidden_widths(target, options, batches), experts=options.experts, expert_size=options.expert_size,
        shared=options.shared, k=options.k,
    )  # fmt: skip
    dense = copy.deepcopy(target.model)  # reference for costs and latency
    body, prefix = target.body, f"{target.body_name}." if target.body_name else ""
    scores = {"dense": _test_scores(target, options)}
    found = _warn_near_chance(target, found, options, scores["dense"])
    recipe = Recipe(
        body=target.body_name, relu=options.swaps, experts=options.experts, expert_size=options.expert_size,
        most=default_most(options.experts, options.expert_size), router=options.router_kind,
        router_width=options.router_width, shared=options.shared, gate=options.gate_kind, k=options.k,
    )  # fmt: skip
    distilled: tuple[float, ...] = ()
    replaced: dict[str, int] = {}
    if options.projections:
        made = replace_projections(
            body, ProgressBatches(batches, "projections", options.projection_epochs, progress),
            epochs=options.projection_epochs, learning_rate=options.projection_lr, call=call, seed=options.seed,
        )  # fmt: skip
        distilled, recipe = made.losses, replace(recipe, projections=made.sites)
        replaced = {
            prefix + name: part.up.in_features * part.down.out_features for name, part in made.projections.items()
        }
        scores["projections"] = _test_scores(target, options)
    if options.swaps:
        swap_for_relu(body)
    tuned = _fine_tune(target, found.fit, options, progress) if options.sparsify else None
    if options.swaps or options.sparsify:
        scores["sparsified"] = _test_scores(target, options)
    layers = recipe.make_experts(body, split=options.split, batches=batches, call=call, seed=options.seed)
    losses = fit_experts(
        target.model, ProgressBatches(batches, "routers", options.router_epochs, progress),
        epochs=options.router_epochs, learning_rate=options.router_lr, call=call,
    )  # fmt: skip
    target.model.eval()
    return Conversion(
        target=target, dense=dense, options=options, recipe=recipe, replaced=replaced,
        accuracies={step: one if isinstance(one, float) else one.accuracy for step, one in scores.items()},
        perplexities={step: one.perplexity for step, one in scores.items() if not isinstance(one, float)},
        layers={prefix + name: layer for name, layer in layers.items()}, distilled=distilled, tuned=tuned,
        router_losses=tuple(losses), data=found,
    )  # fmt: skip


def exit_logits(target: Target, model: nn.Module, inputs: Inputs) -> tuple[Tensor, ...]:
    """scores_BC of each exit with the strategy's correction of logits, or the scores of a model that is not a run."""
    if target.run is None:
        return (target.predict(model, inputs),)
    learner = target.run.learner
    return tuple(learner.adjust_logits(model(inputs, taps=learner.taps)).logits)


class ProgressBatches(Sequence[Batch]):
    """Sequence of batches that reports how many have been used.

    Args:
        batches: Batches to iterate over.
        step: Name of the step.
        epochs: Number of passes over them.
        progress: Called with the progress.
    """

    def __init__(self, batches: Batches, step: str, epochs: int, progress: Progress | None) -> None:
        self._batches, self._step, self._progress = batches, step, progress
        self._done, self._total = 0, max(1, epochs) * len(batches)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, at: Any) -> Any:
        """One batch or a slice of them."""
        return self._batches[at]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            yield batch
            self._done = min(self._done + 1, self._total)
            if self._progress is not None:
                self._progress(self._step, self._done, self._total)


def _call(target: Target) -> Callable[[nn.Module, Batch], object]:
    """Function that runs the whole model, whichever submodule is converted."""
    return lambda _part, batch: target.predict(target.model, batch.inputs)


def _hidden_widths(target: Target, options: Options, batches: Batches) -> dict[str, int]:
    """Hidden neurons of each network to be split, found on a copy.

    Unsupported models are refused here, before any training.
    """
    trial = replace(target, model=copy.deepcopy(target.model))
    if options.projections:
        replace_projections(trial.body, batches[:1], epochs=0, call=_call(trial))
    if options.swaps:
        swap_for_relu(trial.body)
    return {network.name: len(network.up[0]) for network in find_dense_ffns(trial.body)}


def _fine_tune(target: Target, part: DataSplit, options: Options, progress: Progress | None) -> FineTuning:
    def logits(model: nn.Module, inputs: Inputs) -> Sequence[Tensor]:
        if target.run is None:
            return (target.predict(model, inputs),)
        found: tuple[Tensor, ...] = model(inputs).logits
        return found

    return fine_tune(
        target.model, target.body, part, logits=logits, epochs=options.sparsify, batch=options.batch,
        learning_rate=options.sparsify_lr, strength=options.penalty, regularizer=options.regularizer,
        schedule=options.schedule, ramp=options.ramp, seed=options.seed, progress=progress,
    )  # fmt: skip


def test_batches(target: Target, options: Options) -> list[Batches]:
    """Test data, by experience if there are experiences."""
    parts = target.experiences or (target.splits.test,)
    limit = None if options.limit is None else max(1, options.limit // len(parts))
    return [part.batches(size=options.batch, limit=limit) for part in parts]


def _test_scores(target: Target, options: Options) -> float | LanguageScores:
    """Test accuracy of the last exit; of a language model also perplexity."""
    correct, count, sums = 0, 0, []
    with evaluating(target.model):
        for batch in (batch for part in test_batches(target, options) for batch in part):
            y = require_targets(batch)
            asked = y != IGNORED
            logits = exit_logits(target, target.model, batch.inputs)[-1]
            if target.logits_at is not None:
                sums.append(token_sums(logits[asked], y[asked]))
                continue
            correct += int(((logits.argmax(-1) == y) & asked).sum())
            count += int(asked.sum())
    if sums:
        return language_scores(sums)
    if not count:
        raise DataError(f"{target.name}: found no test data; give some")
    return correct / count


def _warn_near_chance(
    target: Target, data: ConversionData, options: Options, scores: float | LanguageScores
) -> ConversionData:
    """Log a warning and add a note if the dense model is not significantly above chance, which makes any curve flat.

    See :func:`~clframe.functional.chance.above_chance`, on test data.
    """
    note = _chance_note(target, options, scores) if isinstance(scores, float) else scores.note
    if not note:
        return data
    _log.warning("moefy: %s; check the model and its data", note)
    return replace(data, notes=(*data.notes, note))


def _chance_note(target: Target, options: Options, accuracy: float) -> str:
    y_N = torch.cat([require_targets(batch).flatten() for part in test_batches(target, options) for batch in part])
    return accuracy_note(accuracy, y_N[y_N != IGNORED], kind="test targets")


def require_targets(batch: Batch) -> Tensor:
    """Labels of a batch.

    Raises:
        DataError: A batch without labels.
    """
    if batch.targets is None:
        raise DataError("moefy: found data without labels; give a benchmark with labels")
    return batch.targets
