"""Dark experience replay: what is stored, how it joins a batch, and what it adds to the loss."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from clframe.core import Batch, Experience, Step, StepContext, compose, parse
from clframe.data import Source, TensorSamples, class_incremental
from clframe.data.augmentation import Flip
from clframe.data.avalanche import import_avalanche
from clframe.errors import ConfigError
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.seeding import generator_for
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy
from strategies import DER, DERpp

import_avalanche()

from avalanche.training.supervised import DER as TheirDER


def samples(sizes, *, offset=0, **options):
    """Images whose first pixel is their number, from ``offset``."""
    y = torch.tensor([c for c, n in sizes.items() for _ in range(n)], dtype=torch.long)
    x = torch.rand(len(y), 1, 2, 2)
    x[:, 0, 0, 0] = offset + torch.arange(len(y))
    return TensorSamples(x, y, mean=(0.5,), std=(2.0,), **options)


def context(index, sizes, past=(), *, seed=0, **options):
    part = samples(sizes, offset=100 * index, **options)
    return StepContext(Experience(index, 9, tuple(sizes), tuple(past), (), part), 0, 1, generator_for(seed, index))


def network(exits=1, classes=2):
    torch.manual_seed(0)
    heads = [("layer1", GrowingLinear(5)) for _ in range(exits - 1)]
    net = Network(BACKBONES.get("mlp")((1, 2, 2), width=5), exits=heads)
    net.grow(range(classes))
    return net


def after_one(component, net):
    """The state after an experience of classes 0 and 1, of which 9 samples each."""
    return component.after_experience(net, context(0, {0: 9, 1: 9}), component.init_state(net))


def joined(component, net, state, size, now=None):
    now = now or context(1, {2: 9}, (0, 1))
    x, y = now.experience.samples.batch(torch.arange(size))
    batch = component.make_batch(Batch(x, y), now, state, net)
    return batch, Step(batch, net(batch.x), now, net)


KINDS = [DER(), DERpp(), DERpp(draws="one")]
IDS = ["der", "derpp", "one draw"]


@pytest.mark.parametrize("component", KINDS, ids=IDS)
def test_nothing_is_replayed_while_there_is_nothing(component):
    net = network()
    batch, step = joined(component, net, component.init_state(net), 3, context(0, {0: 9, 1: 9}))
    assert batch.weight_B is None and len(batch.y) == 3 and component.losses(step, component.init_state(net)) == {}
    now = context(0, {0: 9})
    assert component.training_set(now.experience.samples, 7, component.init_state(net)) == (now.experience.samples, 7)
    assert component.training_set(now.experience.samples, 7, after_one(component, net))[1] == 4


@pytest.mark.parametrize("exits", [1, 3])
@pytest.mark.parametrize("selection", ["reservoir", "balanced", "random", "herding"])
def test_logits_of_all_exits_are_stored_with_each_sample_as_evaluation_gives_them(selection, exits):
    der, net = DER(memory=7, selection=selection), network(exits)
    states = [after_one(der, net)]
    net.grow(range(4))
    states.append(der.after_experience(net, context(1, {2: 9, 3: 9}, (0, 1)), states[-1]))
    part = TensorSamples(states[1]["x"], states[1]["y"], mean=(0.5,), std=(2.0,))
    with torch.no_grad():
        fresh = torch.stack(net(part.prepare(part.x)).logits, 1)
    stored, old = states[1]["logits"], states[1]["y"] < 2
    assert states[0]["logits"].shape == (7, exits, 2) and stored.shape == (7, exits, 4)
    torch.testing.assert_close(stored[~old], fresh[~old])
    assert 0 < old.sum() < 7 and bool((stored[old][..., 2:] == -torch.inf).all())
    before = dict(zip(states[0]["x"][:, 0, 0, 0].tolist(), states[0]["logits"], strict=True))
    for number, row in zip(states[1]["x"][old][:, 0, 0, 0].tolist(), stored[old], strict=True):
        assert torch.equal(row[:, :2], before[number])


@pytest.mark.parametrize("component, draws", list(zip(KINDS, [1, 2, 1], strict=True)), ids=IDS)
@pytest.mark.parametrize("size", [1, 4])
def test_draws_follow_the_new_samples_and_have_no_part_in_their_cross_entropy(component, draws, size):
    net = network(3)
    state = after_one(component, net)
    batch, _ = joined(component, net, state, size)
    assert batch.y[:size].tolist() == [2] * size and set(batch.y[size:].tolist()) <= {0, 1}
    assert len(batch.y) == size * (1 + draws) and batch.weight_B.tolist() == [1.0] * size + [0.0] * size * draws
    numbers = (batch.x[size:, 0, 0, 0] * 2 + 0.5).round()
    place = {n: i for i, n in enumerate(state["x"][:, 0, 0, 0].tolist())}
    rows = [place[n] for n in numbers[:size].tolist()]
    assert torch.equal(batch.extras["logits"], state["logits"][rows])
    if draws == 2 and size > 1:
        assert not torch.equal(numbers[:size], numbers[size:])


@pytest.mark.parametrize(
    "replay, options, size, drawn", [("fixed", {"replayed": 5}, 2, 5), ("extra", {"ratio": 0.5}, 3, 2)]
)
def test_draws_have_the_size_that_replay_says(replay, options, size, drawn):
    derpp, net = DERpp(replay=replay, **options), network()
    batch, _ = joined(derpp, net, after_one(derpp, net), size)
    assert len(batch.y) == size + 2 * drawn and len(batch.extras["logits"]) == drawn
    assert "training_set" not in derpp.acts_at() and "training_set" in DERpp().acts_at()


@pytest.mark.parametrize("exits", [1, 3])
def test_the_loss_is_the_published_sum_at_every_exit(exits):
    derpp, net, size = DERpp(alpha=0.3, beta=0.7), network(exits), 4
    state = after_one(derpp, net)
    net.grow(range(3))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    batch, step = joined(derpp, net, state, size)
    terms = derpp.losses(step, state)
    for k, logits in enumerate(step.output.logits):
        first, second = logits[size : 2 * size], logits[2 * size :]
        matched = ((first[:, :2] - batch.extras["logits"][:, k]) ** 2).sum() / (2 * size)
        assert torch.allclose(terms["logits"][k], 0.3 * matched, rtol=1e-5)
        assert torch.allclose(terms["replay"][k], 0.7 * F.cross_entropy(second, batch.y[2 * size :]), rtol=1e-5)
    assert terms["logits"].shape == terms["replay"].shape == (exits,)
    one, der = DERpp(alpha=0.3, beta=0.7, draws="one"), DER(alpha=0.3, columns="stored")
    batch, step = joined(one, net, state, size)
    terms = one.losses(step, state)
    assert torch.equal(terms["logits"], der.losses(step, state)["logits"]) and set(der.losses(step, state)) == {
        "logits"
    }
    for k, logits in enumerate(step.output.logits):
        assert torch.allclose(terms["replay"][k], 0.7 * F.cross_entropy(logits[size:], batch.y[size:]), rtol=1e-5)


def test_unchanged_logits_cost_nothing():
    der, net = DER(alpha=5.0, columns="stored"), network(3)
    state = after_one(der, net)
    net.grow(range(3))
    _, step = joined(der, net, state, 4)
    assert der.losses(step, state)["logits"].abs().max() < 1e-9


def test_replayed_samples_are_augmented_as_new_ones_are():
    derpp, net = DERpp(), network()
    state = after_one(derpp, net)
    plain, _ = joined(derpp, net, state, 3)
    mirrored, _ = joined(derpp, net, state, 3, context(1, {2: 9}, (0, 1), augment=(Flip(1.0),)))
    assert torch.equal(plain.x[3:].flip(-1), mirrored.x[3:])


@pytest.mark.filterwarnings("ignore:No loggers specified:UserWarning")
def test_one_draw_is_avalanches_loss():
    """Their step on the same batch, memory and weights, with a learning rate of 0."""
    derpp, net, size = DERpp(alpha=0.3, beta=0.7, draws="one", columns="padded"), network(), 4
    state = after_one(derpp, net)
    net.grow(range(3))
    batch, step = joined(derpp, net, state, size)
    module = ContinualModule(net, compose(), optimizer=partial(torch.optim.SGD, lr=0.0))
    theirs = TheirDER(
        model=module, optimizer=torch.optim.SGD(net.parameters(), lr=0.0), mem_size=7, batch_size_mem=size,
        alpha=0.3, beta=0.7, train_mb_size=size, evaluator=None,
    )  # fmt: skip
    padded = F.pad(batch.extras["logits"][:, 0], (0, 1))
    tasks = torch.zeros(size).long()
    theirs.replay_loader = iter([(batch.x[size:], batch.y[size:], tasks, padded)])
    theirs.dataloader, theirs.is_training = [[batch.x[:size], batch.y[:size], tasks]], True
    theirs.training_epoch()
    new = F.cross_entropy(step.output.last[:size], batch.y[:size])
    ours = new + sum(term.sum() for term in derpp.losses(step, state).values())
    assert torch.allclose(theirs.loss, ours, rtol=1e-5) and bool(ours > 0.5)


@pytest.mark.parametrize(
    "make, key",
    [
        (lambda: DER(alpha=-1.0), "components.der.alpha"),
        (lambda: DERpp(alpha=float("nan")), "components.derpp.alpha"),
        (lambda: DERpp(beta=-0.1), "components.derpp.beta"),
        (lambda: DERpp(memory=0), "components.derpp.memory"),
        (lambda: DER(budget="per_class"), "components.der.budget"),
        (lambda: DER(replayed=0, replay="fixed"), "components.der.replayed"),
    ],
)
def test_impossible_options(make, key):
    with pytest.raises(ConfigError, match=key):
        make()


# --- runs ------------------------------------------------------------------------------------------------------------


def blobs(classes=6, per_class=24):
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(classes).repeat(per_class)
    centers = 3 * torch.randn(classes, 1, 2, 2, generator=generator)
    data = TensorSamples(centers[y] + 0.3 * torch.randn(len(y), 1, 2, 2, generator=generator), y)
    return class_incremental(Source("blobs", data, data, classes=classes), experiences=3, order="sorted")


def accuracies(expression, *, exits=1, epochs=8):
    benchmark = blobs()
    torch.manual_seed(2)
    heads = [("layer1", GrowingLinear(16)) for _ in range(exits - 1)]
    net = Network(BACKBONES.get("mlp")((1, 2, 2), width=16), exits=heads)
    module = ContinualModule(net, parse(expression), optimizer=partial(torch.optim.SGD, lr=0.1), seed=0)
    loop = LightningStrategy(model=module, benchmark=benchmark, train_mb_size=8, train_epochs=epochs, evaluator=None)
    for experience in benchmark.avalanche.train_stream:
        loop.train(experience)
    with torch.no_grad():
        hits = [[logits.argmax(1) == part.y for logits in net.eval()(part.x).logits] for part in benchmark.test]
    found = [[part[k].float().mean().item() for part in hits] for k in range(exits)]
    return found, module.learner.flush_terms()


@pytest.mark.parametrize("exits", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_they_remember_what_training_on_new_data_forgets(exits):
    naive, _ = accuracies("naive", exits=exits)
    der, terms = accuracies("der(memory=30)", exits=exits)
    derpp, both = accuracies("derpp(memory=30)", exits=exits)
    for k in range(exits):
        assert sum(naive[k][:2]) < 0.7 and min(derpp[k]) > 0.8 and min(der[k]) > 0.8
    assert terms.keys() == {"loss/task/ce", "loss/der/logits"}
    assert both.keys() == {"loss/task/ce", "loss/derpp/logits", "loss/derpp/replay"} and min(both.values()) > 0


def test_without_labels_and_columns_of_later_classes_old_samples_are_lost_to_these():
    stored, _ = accuracies("der(memory=30, columns='stored')")
    padded, _ = accuracies("der(memory=30)")
    assert stored[0][0] < 0.6 < 0.8 < padded[0][0]
