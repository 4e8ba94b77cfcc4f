"""L2P: what learns, what it is taught, and a run on digits."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from clframe.core import Batch, Experience, Step, StepContext, compose
from clframe.data import SOURCES, class_incremental
from clframe.errors import ConfigError, UnsupportedError
from clframe.nn import BACKBONES, Network, freeze
from clframe.nn.prompts import prompt_pool
from clframe.seeding import generator_for
from clframe.training.checkpoint import decode, encode
from clframe.training.learner import Learner
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy
from strategies import ER, L2P, Exits

SMALL = L2P(prompts=4, length=2, top=2)
EXITS = Exits(at=("encoder.0", "encoder.1"), weights="constant")


def vit(shape=(1, 8, 8)):
    torch.manual_seed(0)
    return Network(BACKBONES.get("vit_tiny")(shape, width=16, depth=3, heads=2))


def edited(component, *, classes=3):
    net = vit()
    component.setup_network(net)
    net.grow(range(classes))
    return net


def context(classes, past=()):
    return StepContext(Experience(1, 3, tuple(classes), tuple(past), (), None), 0, 1, generator_for(0, 1))


def step_of(component, net, now, y):
    x = torch.randn(len(y), 1, 8, 8, generator=torch.Generator().manual_seed(1))
    output = net(x, taps=component.taps(net))
    return Step(Batch(x, torch.tensor(y)), output, now, net)


def test_the_pull_longhand_and_its_gradient_reaches_selected_keys_only():
    net, component = edited(SMALL), SMALL
    step = step_of(component, net, context((1, 2), (0,)), [1, 2, 1])
    term = component.losses(step, component.init_state(net))["pull"]
    keys, query = prompt_pool(net).keys, step.output.taps["query"]
    cosine = torch.nn.functional.cosine_similarity(query[:, None], keys[None], dim=2)
    nearest = cosine.topk(2, dim=1)
    torch.testing.assert_close(term, 0.5 * (1 - nearest.values).sum(1).mean())
    assert term.ndim == 0 and not query.requires_grad
    (gradient,) = torch.autograd.grad(term, keys)
    assert {i for i, row in enumerate(gradient) if row.abs().sum() > 0} == set(nearest.indices.flatten().tolist())
    assert L2P(pull=0.0).losses(step, {}) == {}


@pytest.mark.parametrize("exits", [False, True])
def test_new_samples_compete_with_the_classes_of_their_experience(exits):
    learner = Learner(vit(), compose(SMALL, EXITS) if exits else compose(SMALL), seed=0)
    net, now = learner.network, context((1, 2), (0,))
    net.grow(range(3))
    state = SMALL.before_experience(net, now, SMALL.init_state(net))
    step = step_of(SMALL, net, now, [1, 2, 0])  # the last one is replayed
    loss_K = SMALL.task_loss(step, state)
    assert loss_K.shape == (3 if exits else 1,)
    for exit, logits in enumerate(step.output.logits):
        own, all_ = logits[:, 1:].log_softmax(1), logits.log_softmax(1)
        torch.testing.assert_close(loss_K[exit], -(own[0, 0] + own[1, 1] + all_[2, 0]) / 3)
    everything = L2P(classes="all")
    loss_K = everything.task_loss(step, everything.before_experience(net, now, everything.init_state(net)))
    expected = [torch.nn.functional.cross_entropy(logits, step.batch.y) for logits in step.output.logits]
    torch.testing.assert_close(loss_K, torch.stack(expected))


def test_the_backbone_is_held_still_again_after_exits_thaw_it():
    net = edited(SMALL)
    net.freeze_trunk()
    net.unfreeze_trunk()
    assert all(p.requires_grad for p in net.backbone.parameters())
    SMALL.before_epoch(net, context((0,)), {})
    assert {n for n, p in net.backbone.named_parameters() if p.requires_grad} == {"stages.2.keys", "stages.2.prompts"}


@pytest.mark.parametrize("read", ["prompts", "first"])
def test_a_teacher_keeps_its_prompts_and_comes_back_from_a_checkpoint(read):
    net = edited(L2P(prompts=4, length=2, top=2, read=read))
    teacher = freeze(net)
    x = torch.randn(2, 1, 8, 8)
    expected = teacher(x).last
    with torch.no_grad():
        prompt_pool(net).prompts.add_(1)
    net.grow(range(5))
    loaded = decode(encode({"teacher": teacher}), net)["teacher"]
    assert torch.equal(loaded(x).last, expected) and torch.equal(teacher(x).last, expected)


@pytest.mark.parametrize(
    "options, key",
    [({"prompts": 0}, "prompts"), ({"length": 0}, "length"), ({"top": 11}, "top"), ({"top": 0}, "top"), ({"pull": -1.0}, "pull")],
)
def test_impossible_options(options, key):
    with pytest.raises(ConfigError, match=rf"components\.l2p\.{key}: found"):
        L2P(**options)


def test_a_backbone_without_tokens_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r"components\.l2p: found a backbone with taps \(16, 8, 8\) to \(64,\)"):
        L2P().setup_network(Network(BACKBONES.get("resnet20")((1, 8, 8))))


@pytest.fixture(scope="module")
def stream():
    return class_incremental(SOURCES.get("digits")(), experiences=3, order="sorted")


def trained(strategy, stream, *, experiences=3, epochs=1, start=None):
    module = ContinualModule(vit(), strategy, optimizer=partial(torch.optim.Adam, lr=0.02), seed=0)
    loop = LightningStrategy(
        model=module, benchmark=stream, train_mb_size=32, train_epochs=epochs, eval_mb_size=256, evaluator=None
    )
    if start is not None:
        module.network.load_state_dict(start["network"])
        module.learner.past, module.learner.state = start["past"], decode(start["state"], module.network)
    first = 0 if start is None else start["finished"]
    for experience in list(stream.avalanche.train_stream)[first:experiences]:
        loop.train(experience)
    return module


def accuracy(module, part):
    with torch.no_grad():
        return (module.network.eval()(part.prepare(part.x)).last.argmax(1) == part.y).float().mean().item()


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(SMALL, marks=pytest.mark.slow), pytest.param(compose(SMALL, EXITS), marks=pytest.mark.slow),
        compose(SMALL, EXITS, ER(memory=40)),
    ],
)
def test_it_trains_prompts_and_classifiers_and_resumes_alike(strategy, stream):
    module = trained(strategy, stream)
    fresh = vit().backbone.state_dict()
    kept = [t for n, t in module.network.backbone.state_dict().items() if not n.startswith("stages.2.")]
    assert len(kept) == len(fresh) and all(torch.equal(a, b) for a, b in zip(kept, fresh.values(), strict=True))
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
    half = trained(strategy, stream, experiences=1)
    learner = half.learner
    start = {"network": half.network.state_dict(), "past": learner.past, "state": encode(learner.state), "finished": 1}
    again = trained(strategy, stream, start=start)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


@pytest.mark.slow
def test_prompts_make_a_frozen_random_transformer_learn_and_keys_come_nearer(stream):
    near = trained(SMALL, stream, experiences=1, epochs=6)
    far = trained(L2P(prompts=4, length=2, top=2, pull=0.0), stream, experiences=1, epochs=6)
    x = stream.test[0].prepare(stream.test[0].x)
    similarity = []
    for module in (near, far):
        assert accuracy(module, stream.test[0]) > 0.7  # four classes
        with torch.no_grad():
            query = module.network.eval()(x, taps=["query"]).taps["query"]
            similarity.append(prompt_pool(module.network).select(query)[0].mean().item())
    assert similarity[0] > similarity[1] + 0.1
