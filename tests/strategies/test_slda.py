"""Streaming LDA: closed form, order, exits, Avalanche's on equal features, and a run without gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import clframe
from clframe.core import Experience, StepContext
from clframe.data import SOURCES, Source, TensorSamples, class_incremental
from clframe.errors import ConfigError
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.nn.features import embed_tap
from clframe.nn.types import Output
from clframe.seeding import generator_for
from clframe.training.checkpoint import decode, encode
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy
from strategies import SLDA


def network(*, exits=1, width=12):
    torch.manual_seed(0)
    net = Network(BACKBONES.get("mlp")((1, 2, 2), width=width), exits=[("layer1", GrowingLinear(width))] * (exits - 1))
    net.grow(range(4))
    return net


def data(classes, per_class, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.tensor([c for _ in range(per_class) for c in classes])
    return TensorSamples(torch.randn(len(y), 1, 2, 2, generator=generator) + y.reshape(-1, 1, 1, 1), y)


def context(index, part):
    return StepContext(Experience(index, 3, tuple(part.y.unique().tolist()), (), (), part), 0, 1, generator_for(0, index))


def learnt(slda, net, parts):
    state = slda.init_state(net)
    for index, part in enumerate(parts):
        state = slda.after_experience(net, context(index, part), state)
    return state


def features(net, x, exit=-1):
    with torch.no_grad():
        return embed_tap(net.eval()(x, taps=net.exit_taps).taps[net.exit_taps[exit]]).double()


@pytest.mark.parametrize("exits", [1, 3])
def test_every_exit_answers_by_the_closed_form_on_all_data_of_its_own_tap(exits):
    net, parts = network(exits=exits), [data((0, 1), 40), data((2,), 7, seed=1), data((0, 3), 300, seed=2)]
    state = learnt(SLDA(shrinkage=0.01), net, parts)
    x, y = torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts])
    test = torch.randn(9, 1, 2, 2) + 1
    output = net(test, taps=net.exit_taps)
    answers = SLDA().adjust_logits(output, state)
    assert len(answers.logits) == exits and answers.taps is output.taps
    for exit in range(exits):
        f = features(net, x, exit)
        mu = torch.stack([f[y == c].mean(0) for c in range(4)])
        cov = (f - mu[y]).T @ (f - mu[y]) / len(y)
        precision = torch.linalg.inv(0.99 * cov + 0.01 * torch.eye(12).double())
        expected = features(net, test, exit) @ precision @ mu.T - 0.5 * (mu @ precision * mu).sum(1)
        found = answers.logits[exit].double()
        torch.testing.assert_close(found - found[:, :1], expected - expected[:, :1], rtol=1e-3, atol=1e-3)
        # The features are float32 and their last bits depend on the batch size; the sums are doubles.
        torch.testing.assert_close(state["mean"][exit], mu, rtol=1e-6, atol=1e-6)


def test_the_order_of_experiences_changes_nothing():
    net, parts = network(), [data((0, 1), 30), data((2,), 7, seed=1), data((0, 3), 11, seed=2)]
    one, other = (learnt(SLDA(), net, order) for order in (parts, parts[::-1]))
    for key in ("mean", "scatter"):
        torch.testing.assert_close(one[key][0], other[key][0], rtol=1e-10, atol=1e-10)
    assert one["count"].tolist() == other["count"].tolist() == [41, 30, 7, 11]


@pytest.mark.filterwarnings("ignore:No loggers specified")  # Avalanche's default evaluator has none
def test_the_published_covariance_is_avalanches_on_equal_features():
    from avalanche.training.supervised import StreamingLDA

    net, parts = network(), [data((0, 1), 20), data((2, 3), 20, seed=1)]
    state = learnt(SLDA(covariance="published"), net, parts)
    theirs = StreamingLDA(
        slda_model=torch.nn.Identity(), criterion=torch.nn.CrossEntropyLoss(), input_size=12, num_classes=4, evaluator=None
    )
    theirs.Sigma, theirs.muK, theirs.cK = theirs.Sigma.double(), theirs.muK.double(), theirs.cK.double()
    f, y = features(net, torch.cat([p.x for p in parts])), torch.cat([p.y for p in parts])
    for row, c in zip(f, y, strict=True):
        theirs.fit(row[None], c[None])
    torch.testing.assert_close(state["scatter"][0] / len(y), theirs.Sigma, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state["mean"][0], theirs.muK, rtol=1e-9, atol=1e-9)
    test = torch.randn(50, 1, 2, 2) + 1
    theirs.Lambda = torch.linalg.inv((1 - 1e-4) * theirs.Sigma + 1e-4 * torch.eye(12).double())
    expected = features(net, test) @ theirs.Lambda @ theirs.muK.T
    expected = expected - 0.5 * (theirs.muK @ theirs.Lambda * theirs.muK).sum(1)
    found = SLDA().adjust_logits(net(test, taps=net.exit_taps), state).last
    assert torch.equal(found.argmax(1), expected.argmax(1))
    within = learnt(SLDA(), net, parts)
    assert not torch.allclose(within["scatter"][0], state["scatter"][0], rtol=1e-2)


def test_before_the_first_experience_ends_the_logits_answer():
    net, output = network(), Output((torch.ones(2, 4),), {"layer2": torch.ones(2, 12)})
    assert all(a is b for a, b in zip(SLDA().adjust_logits(output, SLDA().init_state(net)).logits, output.logits, strict=True))


def test_one_sample_then_a_class_without_data():
    net = network()
    state = learnt(SLDA(), net, [data((2,), 1)])
    scores = SLDA().adjust_logits(net(torch.randn(3, 1, 2, 2), taps=net.exit_taps), state).last
    assert scores.shape == (3, 4) and scores.argmax(1).tolist() == [2, 2, 2]
    assert scores[:, [0, 1, 3]].max() == -torch.inf and bool(torch.isfinite(scores[:, 2]).all())


@pytest.mark.parametrize("value", [0.0, -0.1, 1.5, float("nan")])
def test_impossible_shrinkage(value):
    advice = "a finite number" if value != value else "a number above 0, at most 1"
    with pytest.raises(ConfigError, match=rf"components.slda.shrinkage: found .*; give {advice}"):
        SLDA(shrinkage=value)


def trained(strategy, stream, *, experiences=None, seed=0):
    torch.manual_seed(seed)
    net = Network(BACKBONES.get("small_cnn")(stream.input_shape), exits=[])
    module = ContinualModule(net, strategy, optimizer=partial(torch.optim.SGD, lr=0.05), seed=seed)
    before = {name: tensor.clone() for name, tensor in net.backbone.state_dict().items()}
    loop = LightningStrategy(
        model=module, benchmark=stream, train_mb_size=32, train_epochs=1, eval_mb_size=256, evaluator=None
    )
    for experience in list(stream.avalanche.train_stream)[:experiences]:
        loop.train(experience)
    return module, before


def accuracy(module, stream):
    right = total = 0
    for part in stream.test:
        with torch.no_grad():
            output = module.network.eval()(part.prepare(part.x), taps=module.learner.taps)
        answers = module.learner.predict(module.learner.adjust_logits(output))
        right, total = right + int((answers.argmax(1) == part.y).sum()), total + len(part)
    return right / total


@pytest.fixture(scope="module")
def stream():
    return class_incremental(SOURCES.get("digits")(), experiences=5, order="sorted")


def test_it_learns_digits_without_a_gradient_step_and_forgets_nothing(stream):
    module, before = trained(SLDA(), stream)
    assert all(torch.equal(t, before[n]) for n, t in module.network.backbone.state_dict().items())
    assert int(module.learner.state["slda"]["count"].sum()) == sum(len(p) for p in stream.train)
    assert accuracy(module, stream) > 0.85  # random features; chance is 0.1


def test_the_first_experience_may_train_the_network(stream):
    module, before = trained(SLDA(train_first=True), stream, experiences=1)
    moved = {n: t.clone() for n, t in module.network.backbone.state_dict().items()}
    assert any(not torch.equal(t, before[n]) for n, t in moved.items())
    again, _ = trained(SLDA(train_first=True), stream, experiences=3)
    assert all(torch.equal(t, moved[n]) for n, t in again.network.backbone.state_dict().items())
    assert again.learner.state["slda"]["count"].gt(0).sum() == 6


def test_a_state_out_of_a_checkpoint_goes_on_alike():
    net, parts = network(exits=3), [data((0, 1), 20), data((2, 3), 20, seed=1)]
    half = learnt(SLDA(), net, parts[:1])
    loaded = decode(encode(half), net)
    one, other = (SLDA().after_experience(net, context(1, parts[1]), state) for state in (half, loaded))
    for a, b in zip(one["weight"], other["weight"], strict=True):
        assert torch.equal(a, b)


def test_a_run_from_a_config(tmp_path):
    small = ["strategy=slda + exits", "backbone=mlp", "backbone.width=64", "trainer.progress=false", "trainer.epochs=1"]
    result = clframe.run("quickstart", small, output=tmp_path)
    assert result.steps == 0 and result.final_average_accuracy > 0.5


def test_one_class_in_all():
    blobs = TensorSamples(torch.randn(6, 1, 4, 4), torch.zeros(6).long())
    one = class_incremental(Source("one", blobs, blobs, classes=1), experiences=1, order="sorted")
    module, _ = trained(SLDA(), one)
    assert accuracy(module, one) == 1.0
