"""Fine-tuning with a penalty: what it does to losses, to the model, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

from clframe.data.samples import TensorSamples
from clframe.data.target import Batch, Batches, SampleSplit
from clframe.errors import DataError, DivergenceError, UnsupportedError
from clframe.moe.conversion import training
from clframe.moe.conversion.training import fine_tune, shuffle_batches
from clframe.nn import Network
from clframe.nn.backbones import mlp
from clframe.sparsity.functional import hoyer, schedule_factor

X = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long()
PART = SampleSplit([TensorSamples(X, Y)], place=lambda x: x)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4)), nn.Linear(4, 2)).eval()


def tuned(net, *, part=PART, epochs=6, strength=0.0, **options):
    return fine_tune(
        net, net, part, logits=lambda m, x: (m(x),), epochs=epochs, batch=8, learning_rate=1e-2, strength=strength,
        **options,
    )  # fmt: skip


def active(net):
    with torch.no_grad():
        return float(hoyer(net[0][1](net[0][0](X))))


def test_the_task_is_learnt_and_the_penalty_leaves_fewer_active():
    plain, sparse = model(), model()
    first = tuned(plain, epochs=20)
    second = tuned(sparse, epochs=20, strength=1.0)
    assert first.task[-1] < 0.5 * first.task[0] and len(first.task) == len(first.penalty) == 20
    assert active(sparse) < 0.7 * active(plain)
    assert second.penalty[-1] < second.penalty[0]


def test_first_step_longhand():
    """One batch of all: the mean of the hoyer measure and of the cross-entropy before any update."""
    net = model()
    with torch.no_grad():
        task = float(nn.functional.cross_entropy(net(X), Y))
    value = active(net)
    found = fine_tune(net, net, PART, logits=lambda m, x: (m(x),), epochs=1, batch=40, learning_rate=1e-2, strength=0.1)
    assert found.task[0] == pytest.approx(task, rel=1e-5) and found.penalty[0] == pytest.approx(value, rel=1e-5)


def test_the_mean_over_exits():
    net = model()
    with torch.no_grad():
        one, two = nn.functional.cross_entropy(net(X), Y), nn.functional.cross_entropy(3 * net(X), Y)
    found = fine_tune(
        net, net, PART, logits=lambda m, x: (m(x), 3 * m(x)), epochs=1, batch=40, learning_rate=1e-2, strength=0.0
    )
    assert found.task[0] == pytest.approx(float(one + two) / 2, rel=1e-5)


def test_the_model_is_left_as_it_was_but_for_its_weights():
    net = model().requires_grad_(False)
    torch.manual_seed(4)
    drawn = torch.rand(1)
    torch.manual_seed(4)
    tuned(net, epochs=1, seed=5)
    assert torch.equal(torch.rand(1), drawn)
    assert not net.training and all(not p.requires_grad and p.grad is None for p in net.parameters())
    assert not any(part._forward_hooks for part in net.modules())
    again = model()
    tuned(again, epochs=1, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    other = model()
    tuned(other, epochs=1, seed=6)
    assert not torch.equal(other[1].weight, again[1].weight)


@pytest.mark.parametrize("regularizer", ["l1", "displaced", "displaced_l1"])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_every_penalty_is_a_number_that_falls(regularizer, schedule):
    found = tuned(model(), strength=0.3, regularizer=regularizer, schedule=schedule)
    assert found.penalty[-1] < found.penalty[0]


@pytest.mark.parametrize(
    ("schedule", "ramp", "expected"),
    [
        ("linear", "step", [n / 10 for n in range(10)]), ("linear", "epoch", [0.5] * 5 + [1.0] * 5),
        ("warmup", "step", [0.0, 0.2, 0.4, 0.6, 0.8] + [1.0] * 5), ("warmup", "epoch", [1.0] * 10), ("constant", "step", [1.0] * 10),
    ],
)  # fmt: skip
def test_the_penalty_rises_by_step_or_by_epoch(schedule, ramp, expected, monkeypatch):
    factors = []

    def recorded(*args):
        factors.append(schedule_factor(*args))
        return factors[-1]

    monkeypatch.setattr(training, "schedule_factor", recorded)
    tuned(model(), epochs=2, strength=0.1, schedule=schedule, ramp=ramp)
    assert factors == pytest.approx(expected)


def test_a_diverged_loss_is_one_line():
    with pytest.raises(DivergenceError, match="found a loss of (nan|inf) in epoch 2 of fine-tuning.*; lower its learning rate"):
        fine_tune(model(), model(), PART, logits=lambda m, x: (m(x),), epochs=2, batch=40, learning_rate=1e30, strength=0.0)


def test_language_models_are_asked_for_some_tokens():
    net = model()
    x, y = X.view(8, 5, 4), Y.view(8, 5).clone()
    y[:, 3:] = -100

    class DataSplit:
        def __len__(self):
            return 8

        def batches(self, *, size=64, limit=None):
            return Batches([lambda: Batch(x, y, None)])

    with torch.no_grad():
        wanted = float(nn.functional.cross_entropy(net(x)[:, :3].flatten(0, 1), y[:, :3].flatten()))
    found = fine_tune(net, net, DataSplit(), logits=lambda m, x: (m(x),), epochs=1, batch=8, learning_rate=1e-3, strength=0.0)
    assert found.task[0] == pytest.approx(wanted, rel=1e-5)


def test_ticks_and_refusals():
    seen = []
    tuned(model(), epochs=2, progress=lambda *told: seen.append(told))
    assert seen == [("sparsify", n, 10) for n in range(1, 11)]

    class Bare:
        def __len__(self):
            return 8

        def batches(self, *, size=64, limit=None):
            return Batches([lambda: Batch(X, None, None)])

    with pytest.raises(DataError, match="without labels"):
        tuned(model(), part=Bare())
    stages = Network(mlp((1, 2, 2), width=8))
    with pytest.raises(UnsupportedError, match="pre-activations"):
        tuned(stages, regularizer="displaced")


def test_order_is_a_function_of_seed_and_epoch():
    def targets(**place):
        batches, order = shuffle_batches(PART, size=8, **place)
        return torch.cat([batches[at].inputs for at in order])

    first = targets(seed=0, epoch=0)
    assert torch.equal(first, targets(seed=0, epoch=0)) and not torch.equal(first, targets(seed=0, epoch=1))
    assert not torch.equal(first, targets(seed=1, epoch=0))
    assert torch.equal(first.sort(0).values, X.sort(0).values)
    assert copy.deepcopy(PART.samples[0].x).equal(X)
