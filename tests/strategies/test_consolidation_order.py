"""Order at the end of an experience: what others store is of the network that predicts, and of the updated buffer.

The rows of the classifiers are set by hand, so that those of the network and of every copy are known without training.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.nn.functional import cross_entropy

from clframe.core import Experience, parse
from clframe.data import TensorSamples
from clframe.exits.features import write_rows
from clframe.nn import BACKBONES, Network
from clframe.training.learner import Learner

CLASSES = ((0, 1), (2, 3))
OLD, NEW = [[3.0, 4.0], [4.0, 3.0]], [[6.0, 8.0], [0.0, -10.0]]
"""Rows of lengths 5, 5 and 10, 10 at the end of the training of the second experience."""
ALIGNED = [*OLD, [3.0, 4.0], [0.0, -5.0]]
CENTERED = [[-1.0, 0.0], [0.0, 1.0]], [[5.0, 7.0], [-1.0, -11.0]]
"""Rows that ``cwr`` consolidates: [[3, 4], [4, 5]] - 4, then NEW - 1."""


def samples(index: int) -> TensorSamples:
    generator = torch.Generator().manual_seed(index)
    y = torch.arange(24) % 2 + 2 * index
    return TensorSamples(torch.randn(24, 3, generator=generator) + y[:, None], y)


def begin(learner: Learner, index: int) -> Experience:
    past = tuple(c for classes in CLASSES[:index] for c in classes)
    now = Experience(index, 2, CLASSES[index], past, (), samples(index))
    learner.begin(now, classes=CLASSES[index], epochs=1)
    learner.before_epoch(0)
    return now


def step(learner: Learner, experience: Experience, *, lr: float = 0.0) -> dict[str, torch.Tensor]:
    """Train on all samples of an experience and return the loss terms."""
    batch = learner.make_batch(experience.samples.prepare(experience.samples.x), experience.samples.y)
    terms: dict[str, torch.Tensor] = {}
    add, learner.loss_sums.add = learner.loss_sums.add, terms.update  # type: ignore[method-assign]
    learner.loss(batch, learner.network(batch.x)).sum().backward()
    learner.loss_sums.add = add  # type: ignore[method-assign]
    with torch.no_grad():
        for parameter in learner.network.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad
    learner.after_step()
    learner.network.zero_grad()
    return terms


def learn(strategy: str, *, lr: float = 0.0) -> Learner:
    """A learner after two experiences, each of which ends with rows set by hand."""
    torch.manual_seed(0)
    learner = Learner(Network(BACKBONES.get("mlp")((3,), width=2)), parse(strategy), seed=0)
    first = [[3.0, 4.0], [4.0, 5.0]] if "cwr" in strategy else OLD
    for index, rows in enumerate((first, [*OLD, *NEW])):
        step(learner, begin(learner, index), lr=lr)
        write_rows(learner.network.final, torch.tensor(rows), torch.zeros(len(rows)))
        learner.end()
    learner.network.eval()
    return learner


@pytest.mark.parametrize("name, changer", list(product(["lwf", "ancl", "ssil + er", "icarl + er", "bic"], ["wa", "cwr"])))
def test_a_teacher_is_the_network_that_predicts(name, changer):
    learner = learn(f"{name} + {changer}")
    teacher = learner.state[name.partition(" ")[0]]["teacher"]
    x = samples(1).x
    assert torch.equal(teacher(x).last, learner.network(x).last)
    expected = ALIGNED if changer == "wa" else [*CENTERED[0], *CENTERED[1]]
    assert torch.allclose(teacher.final.weight, torch.tensor(expected), atol=1e-6)


def test_stored_logits_are_of_the_network_that_predicts():
    learner = learn("der(memory=8) + wa")
    state = learner.state["der"]
    new = state["y"] >= 2
    logits = learner.network(state["x"][new]).last
    assert int(new.sum()) == 4 and torch.allclose(state["logits"][new][:, 0], logits, atol=1e-6)


@pytest.mark.parametrize("strategy, scale", [("mas(lamb=3)", 3.0), ("ewc(lamb=3, mode=online)", 1.5), ("si(c=3)", 3.0)])
def test_a_penalty_begins_at_zero_at_aligned_rows_and_rises_with_the_square_of_the_distance(strategy, scale):
    learner, name = learn(f"{strategy} + wa", lr=0.01), strategy.partition("(")[0]
    (term,) = learner.state[name]["terms"]
    names = [name for name, _ in term["layout"]]
    parts = term["importance"].split([torch.Size(shape).numel() for _, shape in term["layout"]])
    importance, element = dict(zip(names, parts, strict=True))["heads.0.weight"][4:].max(0)  # of the scaled rows
    learner.begin(third(), classes=(0, 1), epochs=1)
    learner.before_epoch(0)
    assert float(step(learner, third())[f"{name}/penalty"].detach().sum()) == 0
    with torch.no_grad():
        learner.network.final.weight.view(-1)[4 + element] += 0.5
    found = float(step(learner, third())[f"{name}/penalty"].detach().sum())
    assert importance > 0 and found == pytest.approx(scale * float(importance) * 0.5**2, rel=1e-4)


def third() -> Experience:
    return Experience(2, 3, (0, 1), (0, 1, 2, 3), (), samples(0))


def test_aligned_rows_have_the_importance_of_the_path_that_training_took():
    alone, aligned = (learn(strategy, lr=0.01).state["si"]["terms"][0] for strategy in ("si", "si + wa"))
    assert torch.equal(alone["importance"], aligned["importance"]) and float(alone["importance"].max()) > 0
    assert not torch.equal(alone["center"], aligned["center"])


@pytest.mark.parametrize("changer", ["wa", "cwr(backbone=free)"])
def test_the_bias_pair_is_the_minimum_for_the_network_that_predicts(changer):
    learner = learn(f"bic(memory=20, decay=0.1) + {changer}")
    state = learner.state["bic"]
    held = state["held"]
    assert set(held["y"].tolist()) == {0, 1, 2, 3}
    logits_NC = learner.network(held["x"]).last.detach().double()

    def objective(alpha: float, beta: float) -> float:
        """mean CE of corrected logits + decay / 2 * ((alpha - 1)^2 + beta^2)."""
        corrected = torch.cat([logits_NC[:, :2], alpha * logits_NC[:, 2:] + beta], dim=1)
        return float(cross_entropy(corrected, held["y"])) + 0.05 * ((alpha - 1) ** 2 + beta**2)

    alpha, beta = float(state["alpha_KC"][0, 2]), float(state["beta_KC"][0, 2])
    least = objective(alpha, beta)
    for up, right in ((1e-2, 0.0), (-1e-2, 0.0), (0.0, 1e-2), (0.0, -1e-2)):
        assert objective(alpha + up, beta + right) > least
    assert objective(1.0, 0.0) > least + 1e-3


def test_means_are_of_a_buffer_that_has_the_samples_of_the_experience():
    learner = learn("icarl + mir(memory=8, update=experience, selection=balanced)")
    assert learner.state["icarl"]["known_C"].tolist() == [True] * 4
