"""Values that hooks of own components return: one of another kind is one line that names the component and the hook."""

from __future__ import annotations

from dataclasses import make_dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from clframe.core import Batch, Component, Experience, compose
from clframe.data.samples import TensorSamples
from clframe.errors import ComposeError
from clframe.nn import GrowingLinear, Network
from clframe.nn.backbones import mlp
from clframe.training.learner import Learner

WAY = "return a tensor of shape"


def component(hook: str, value: Any, *, slot: str = "") -> Component:
    """A component whose hook returns ``value``, or its result for the step where it is a function."""

    def returns(self: Component, *arguments: Any) -> Any:
        return value(*arguments) if callable(value) else value

    namespace = {"name": "own", hook: returns, "slots": frozenset({slot} if slot else ()), "__module__": __name__}
    kind: type[Component] = make_dataclass(
        "Own", [("name", ClassVar[str])], bases=(Component,), namespace=namespace, frozen=True, kw_only=True
    )
    return kind()


def train(own: Component, *, exits: int = 1) -> Learner:
    """Two steps of an experience, its end, and a prediction."""
    torch.manual_seed(0)
    extra = [("layer1", GrowingLinear(5)) for _ in range(exits - 1)]
    learner = Learner(Network(mlp((1, 2, 2), width=5), exits=extra), compose(own), seed=3)
    samples = TensorSamples(torch.rand(6, 1, 2, 2), torch.arange(6) % 2)
    learner.training_experiences(0, 2)
    learner.begin(Experience(0, 1, (0, 1), (), (), samples), classes=(0, 1), epochs=1)
    learner.before_epoch(0)
    for _ in range(2):
        learner.inputs()
        batch = learner.make_batch(samples.x, samples.y)
        learner.loss(batch, learner.network(batch.x)).sum().backward()
        learner.after_step()
    learner.end()
    learner.predict(learner.adjust_logits(learner.network(samples.x)))
    return learner


def per_sample(step: Any, state: Any) -> dict[str, Tensor]:
    return {"a": step.output.last.square().mean(1)}


def second_step_per_sample(step: Any, state: Any) -> dict[str, Tensor]:
    return per_sample(step, state) if step.number else {}


@pytest.mark.parametrize(
    "hook, slot, value, exits, message",
    [
        ("init_state", "", None, 1, "None; return the state, a mapping, changed or not"),
        ("init_state", "", [1], 1, "a value of type list; return the state, a mapping, changed or not"),
        ("before_experience", "", None, 1, "None; return the state, a mapping, changed or not"),
        ("after_step", "", None, 1, "None; return the state, a mapping, changed or not"),
        ("after_experience", "", None, 1, "None; return the state, a mapping, changed or not"),
        ("training_experiences", "", (2,), 1, "(2,); return numbers of experiences, from 0 to 1"),
        ("make_batch", "batch", None, 1, "None; return a Batch with the same number of inputs and targets, at least one"),
        ("make_batch", "batch", lambda batch, *_: Batch(batch.x[:0], batch.y[:0]), 1, "0 inputs and 0 targets; return a"),
        ("make_batch", "batch", lambda batch, *_: Batch(batch.x, batch.y[:2]), 1, "6 inputs and 2 targets; return a Batch"),
        ("exit_loss_weights", "exit_weights", (1.0, 2.0), 1, "2 number(s); return 1 number(s), one for each exit"),
        ("exit_loss_weights", "exit_weights", (1.0,), 3, "1 number(s); return 3 number(s), one for each exit"),
        ("exit_loss_weights", "exit_weights", None, 1, "None; return 1 number(s), one for each exit"),
        ("step_values", "", None, 1, "None; return a mapping from names to numbers, {} for none"),
        ("losses", "", None, 1, "None; return a mapping from names to tensors, {} for no term"),
        ("losses", "", [torch.tensor(1.0)], 1, "a value of type list; return a mapping from names to tensors"),
        ("losses", "", {"a": 1.0}, 1, f"a value of type float as 'a'; {WAY} [] or [1], a mean over samples"),
        ("losses", "", per_sample, 1, f"a tensor of shape [6] as 'a'; {WAY} [] or [1], a mean over samples"),
        ("losses", "", per_sample, 3, f"a tensor of shape [6] as 'a'; {WAY} [] or [3], a mean over samples for each exit"),
        ("losses", "", second_step_per_sample, 1, f"a tensor of shape [6] as 'a'; {WAY} [] or [1], a mean over samples"),
        ("task_loss", "task_loss", lambda step, _: step.output.last.mean(), 3, f"a tensor of shape []; {WAY} [3], a mean"),
        ("combine_losses", "loss_mix", None, 1, "None; return a tensor with one element"),
        ("combine_losses", "loss_mix", torch.ones(2), 1, "a tensor of shape [2]; return a tensor with one element"),
        ("adjust_logits", "logits", None, 1, "None; return logits of shape [B, C] for each of the 1 exit(s)"),
        ("adjust_exit_logits", "logits", None, 3, "None; return logits of shape [B, C] for each of the 3 exit(s)"),
        ("predict", "prediction", lambda output, _: output.last.argmax(1), 1, "a tensor of shape [6]; return scores of"),
    ],
)  # fmt: skip
def test_another_kind_of_value_is_refused(hook: str, slot: str, value: Any, exits: int, message: str) -> None:
    with pytest.raises(ComposeError) as caught:
        train(component(hook, value, slot=slot), exits=exits)
    found = str(caught.value)
    assert found.startswith(f"component 'own': {hook}() returned {message}"), found


@pytest.mark.parametrize(
    "hook, slot, value, exits",
    [
        ("losses", "", lambda step, _: {"a": step.output.last.mean()}, 3),
        ("losses", "", lambda step, _: {"a": torch.stack([z.mean() for z in step.output.logits])}, 3),
        ("task_loss", "task_loss", lambda step, _: step.output.last.mean(), 1),
        ("exit_loss_weights", "exit_weights", [1, 0.5, 0], 3),
        ("combine_losses", "loss_mix", lambda terms, *_: terms["task/ce"].sum(), 3),
        ("step_values", "", lambda *_: {"factor": 2}, 1),
    ],
)
def test_values_of_the_kinds_that_hooks_document_are_accepted(hook: str, slot: str, value: Any, exits: int) -> None:
    assert train(component(hook, value, slot=slot), exits=exits).past == (0, 1)
