"""The cross-entropy over the classes of an experience, and its place in the presets of methods without a memory."""

from __future__ import annotations

import pytest
import torch

from clframe.config.files import read_yaml, shipped_configs
from clframe.core import Batch, Experience, Step, StepContext, compose
from clframe.data import TensorSamples
from clframe.errors import ComposeError
from clframe.nn import Network
from clframe.nn.backbones import mlp
from clframe.nn.types import Output
from clframe.seeding import generator_for
from strategies import ER, SSIL, CurrentClasses

INF = float("inf")


def step(logits, y, *, classes, past, weight_B=None):
    part = TensorSamples(torch.zeros(1, 1, 2, 2), torch.zeros(1).long())
    now = StepContext(Experience(1, 3, tuple(classes), tuple(past), (), part), 0, 1, generator_for(0))
    return Step(Batch(torch.zeros(len(y), 1, 2, 2), torch.tensor(y), weight_B), Output(tuple(logits), {}), now, Network(mlp((1, 2, 2))))


def longhand(logits_BC, y, allowed):
    """-log of the target's share of the exponentials of the allowed classes, for each sample."""
    values = []
    for row, c, classes in zip(logits_BC.tolist(), y, allowed, strict=True):
        exponentials = {k: torch.tensor(row[k], dtype=torch.float64).exp() for k in classes}
        values.append(-float((exponentials[c] / sum(exponentials.values())).log()))
    return values


@pytest.mark.parametrize("classes, past", [((2, 3), (0, 1)), ((1, 4), (0, 2)), ((5,), (0, 1, 2, 3, 4))])
def test_samples_of_the_experience_compete_among_its_classes_at_every_exit(classes, past):
    torch.manual_seed(0)
    logits = [torch.randn(3, 6, dtype=torch.float64) for _ in range(3)]
    for each in logits:
        each[:, [c for c in range(6) if c not in {*classes, *past}]] = -INF  # classes that come later
    y = [classes[0], classes[-1], classes[0]]
    loss_K = CurrentClasses().task_loss(step(logits, y, classes=classes, past=past), {})
    expected = [sum(longhand(each, y, [classes] * 3)) / 3 for each in logits]
    torch.testing.assert_close(loss_K, torch.tensor(expected, dtype=torch.float64))


def test_other_samples_compete_among_all_classes_and_weights_average():
    torch.manual_seed(1)
    logits, y = torch.randn(3, 4, dtype=torch.float64), [3, 0, 2]
    now = step([logits], y, classes=(2, 3), past=(0, 1), weight_B=torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64))
    a, b, c = longhand(logits, y, [(2, 3), (0, 1, 2, 3), (2, 3)])
    assert CurrentClasses().task_loss(now, {}).tolist() == pytest.approx([(a + 3 * b + 2 * c) / 6])


def test_old_logits_have_no_gradient_and_recurring_classes_change_nothing():
    logits = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    CurrentClasses().task_loss(step([logits], [2, 3], classes=(2, 3), past=(0, 1)), {}).sum().backward()
    assert logits.grad[:, :2].eq(0).all() and logits.grad[:, 2:].ne(0).all()
    for past in [(), (0, 1, 2, 3)]:
        now = step([logits], [2, 0], classes=(0, 1, 2, 3), past=past)
        assert torch.equal(CurrentClasses().task_loss(now, {})[0], torch.nn.functional.cross_entropy(logits, now.batch.y))


def test_it_owns_the_task_loss():
    compose(ER(), CurrentClasses()).check_needs()
    with pytest.raises(ComposeError, match="task_loss"):
        compose(ER(), SSIL(), CurrentClasses())


@pytest.mark.parametrize("preset", ["lwf_paper", "ewc_paper", "ancl_paper"])
def test_published_methods_without_a_memory_use_it(preset):
    strategy = read_yaml(shipped_configs() / "strategy" / f"{preset}.yaml")["strategy"]
    assert strategy == f"{preset.removesuffix('_paper')} + current_classes"
