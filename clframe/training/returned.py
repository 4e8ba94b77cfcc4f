"""Checks of what the hooks of components return: by types and shapes only, so that none waits for a device.

Shape suffixes: B batch, C classes, K exits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any, NoReturn

from torch import Tensor

from clframe.core import Batch, State
from clframe.errors import ComposeError
from clframe.nn.types import Output


def check_state(component: str, hook: str, state: Any) -> State:
    """Return a state that a hook has returned.

    Raises:
        ComposeError: It is not a mapping, as for all functions here: the hook of the component has returned another
            kind of value than its documentation asks for.
    """
    if not isinstance(state, Mapping):
        _refuse(component, hook, _kind(state), "return the state, a mapping, changed or not")
    return state


def check_sources(component: str, sources: Collection[Any], count: int) -> tuple[int, ...]:
    """Return the experiences to train on, of ``count``."""
    if any(not isinstance(index, int) or not 0 <= index < count for index in sources):
        advice = f"return numbers of experiences, from 0 to {count - 1}"
        _refuse(component, "training_experiences", str(tuple(sources)), advice)
    return tuple(sources)


def check_batch(component: str, batch: Any) -> Batch:
    """Return a batch that has samples and a target for each."""
    advice = "return a Batch with the same number of inputs and targets, at least one"
    if not isinstance(batch, Batch):
        _refuse(component, "make_batch", _kind(batch), advice)
    inputs, targets = len(batch.x), len(batch.y)
    if not targets or inputs != targets:
        _refuse(component, "make_batch", f"{inputs} inputs and {targets} targets", advice)
    return batch


def check_terms(component: str, terms: Any) -> Mapping[str, Any]:
    """Return the terms of ``losses``; :func:`check_term` checks their values."""
    if not isinstance(terms, Mapping):
        _refuse(component, "losses", _kind(terms), "return a mapping from names to tensors, {} for no term")
    return terms


def check_term(component: str, hook: str, value: Any, exits: int, *, term: str = "") -> None:
    """Check a term: a tensor with one value per exit, or with a single one, which is of all exits together.

    Args:
        component: Name of the component.
        hook: ``losses`` or ``task_loss``; with several exits, the latter has one value for each.
        value: The term.
        exits: K, the number of exits.
        term: Its name.
    """
    shapes = ((exits,),) if hook == "task_loss" and exits > 1 else ((), (exits,))
    if isinstance(value, Tensor) and tuple(value.shape) in shapes:
        return
    found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else _kind(value)
    wanted = " or ".join(str(list(shape)) for shape in shapes)
    advice = f"return a tensor of shape {wanted}, a mean over samples" + (" for each exit" if exits > 1 else "")
    _refuse(component, hook, f"{found} as '{term}'" if term else found, advice)


def check_total(component: str, loss: Any) -> Tensor:
    """Return the loss to minimize, a single number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else _kind(loss)
        _refuse(component, "combine_losses", found, "return a tensor with one element")
    return loss


def check_exit_weights(component: str, weights: Any, exits: int) -> tuple[float, ...]:
    """Return the weights of the exits' losses, one for each."""
    advice = f"return {exits} number(s), one for each exit"
    try:
        found = tuple(float(weight) for weight in weights)
    except (TypeError, ValueError):
        _refuse(component, "exit_loss_weights", _kind(weights), advice)
    if len(found) != exits:
        _refuse(component, "exit_loss_weights", f"{len(found)} number(s)", advice)
    return found


def check_step_values(component: str, values: Any) -> Mapping[str, float]:
    """Return the numbers of a step."""
    if not isinstance(values, Mapping) or not all(isinstance(value, Real) for value in values.values()):
        found = str(dict(values)) if isinstance(values, Mapping) else _kind(values)
        _refuse(component, "step_values", found, "return a mapping from names to numbers, {} for none")
    return values


def check_output(component: str, hook: str, output: Any, former: Output) -> Output:
    """Return the output with corrected logits, of the exits and samples that ``former`` has."""
    advice = f"return logits of shape [B, C] for each of the {len(former.logits)} exit(s)"
    if not isinstance(output, Output) or len(output.logits) != len(former.logits):
        _refuse(component, hook, _kind(output), advice)
    for logits_BC in output.logits:
        check_scores(component, hook, logits_BC, advice=advice)
    return output


def check_scores(component: str, hook: str, scores_BC: Any, *, advice: str = "return scores of shape [B, C]") -> Tensor:
    """Return scores of classes, one row per sample."""
    if not isinstance(scores_BC, Tensor) or scores_BC.ndim != 2:
        found = f"a tensor of shape {list(scores_BC.shape)}" if isinstance(scores_BC, Tensor) else _kind(scores_BC)
        _refuse(component, hook, found, advice)
    return scores_BC


def _kind(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _refuse(component: str, hook: str, found: str, advice: str) -> NoReturn:
    raise ComposeError(f"component '{component}': {hook}() returned {found}; {advice}")
