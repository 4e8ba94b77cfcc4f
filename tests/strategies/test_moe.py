"""The component moe: training as without it, routing afterwards, costs, and refusals."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from expert_learners import QUICK, close, digits, learner, logits

from clframe.core import Experience, StepContext, compose
from clframe.data import TensorSamples
from clframe.errors import ConfigError, UnsupportedError
from clframe.exits import make_head
from clframe.moe import CumulativeShare, DynamicK, TopK, count_usage, expert_usage, routed_layers, set_tau
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.seeding import generator_for
from clframe.training.learner import Learner
from strategies import ANCL, DER, ER, EWC, MAS, SI, Exits, LwF, MoE

# --- by hand ------------------------------------------------------------------------------------------


def two_experts(tau):
    """x of two numbers to four neurons, of which the first and the third are expert 0, and back to two."""
    run = learner(MoE(experts=2, router_width=2, tau=tau), backbone="mlp", shape=(2,), width=4)
    (layer,) = routed_layers(run.network).values()
    e = layer.experts
    with torch.no_grad():
        e.up.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [2.0, 0.0]]]))
        e.up_bias.copy_(torch.tensor([[0.0, -1.0], [0.5, 0.0]]))
        e.down.copy_(torch.tensor([[[1.0, 0.0, 0.0, 1.0], [2.0, 1.0, 0.0, 0.0]], [[0.0, 3.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]]))
        e.bias.copy_(torch.tensor([0.0, 0.0, 1.0, -50.0]))
        layer.router.hidden.copy_(torch.eye(2))
        layer.router.score.copy_(torch.tensor([[1.0, 0.0], [0.0, -3.0]]))
    layer.ready = True
    return run.network.eval(), layer


def test_two_experts_by_hand():
    """x = (2, 3): hidden (2, 2) and (5.5, 4), scores |2| and |-9|; x = (4, 1): (4, 0) and (5.5, 8), scores 4 and 3."""
    x = torch.tensor([[2.0, 3.0], [4.0, 1.0]])
    first, second = [[6.0, 2.0, 0.0, 2.0], [4.0, 0.0, 0.0, 4.0]], [[4.0, 16.5, 5.5, 0.0], [8.0, 16.5, 5.5, 0.0]]
    bias = torch.tensor([0.0, 0.0, 1.0, -50.0])

    def answer(*runs):
        """What ReLU leaves of the sum of those that run, token by token."""
        return [
            (sum((torch.tensor((first, second)[e][n]) for e in experts), bias)).relu().tolist()
            for n, experts in enumerate(runs)
        ]

    for tau, runs in ((1.0, ((0, 1), (0, 1))), (0.8, ((0, 1), (0, 1))), (0.3, ((1,), (0, 1))), (0.0, ((1,), (0,)))):
        network, layer = two_experts(tau)
        with torch.no_grad():
            assert network.backbone(x).tolist() == answer(*runs)
            for n in (0, 1):
                assert network.backbone(x[n : n + 1]).tolist() == [answer(*runs)[n]]
        if tau < 1:
            assert layer.keep(x).tolist() == [[e in experts for e in (0, 1)] for experts in runs]
    with torch.no_grad():  # training mode runs both, and so does a router that is not ready
        assert network.train().backbone(x).tolist() == answer((0, 1), (0, 1))
        layer.ready = False
        assert network.eval().backbone(x).tolist() == answer((0, 1), (0, 1))


@pytest.mark.parametrize(
    ("options", "gate"),
    [
        ({"tau": 0.25}, DynamicK(tau=0.25)),
        ({"gate": "cumulative", "tau": 0.7}, CumulativeShare(tau=0.7)),
        ({"gate": "top_k", "k": 3, "router": "activation"}, TopK(k=3)),
    ],
)
def test_options_become_gates_and_sizes(options, gate):
    for sizes, count in (({}, 16), ({"experts": 4}, 4), ({"expert_size": 4}, 8)):
        run = learner(MoE(**options, **sizes), **{"backbone": "vit_tiny"})
        for layer in routed_layers(run.network).values():
            assert layer.gate == gate and layer.when == "evaluation" and not layer.ready
            assert layer.experts.experts == count and len(layer.router.hidden) == 16
            assert not any(p.requires_grad for p in layer.router.parameters())
    assert learner(MoE(), backbone="mlp", width=432).network.backbone.stages[1][0].router.hidden.shape == (18, 64)


# --- laws ---------------------------------------------------------------------------------------------


OTHERS = [ER(memory=30), EWC(lamb=50.0), MAS(lamb=2.0), SI(c=5.0), LwF(), ANCL(), DER(memory=30)]


@pytest.mark.parametrize(
    ("other", "split"),
    [*((other, "kmeans") for other in OTHERS), (SI(c=5.0), "random"), (SI(c=5.0), "coactivation"), (LwF(), "coactivation")],
    ids=lambda part: getattr(part, "name", part),
)
def test_all_experts_on_is_training_without_experts(on_digits, other, split):
    """To rounding, whatever else is kept for each weight while neurons are regrouped."""
    x, runs = digits(on_digits), []
    for parts in ([other], [other, MoE(tau=1.0, split=split, experts=4, **QUICK)]):
        runs.append(on_digits.learn(learner(*parts), last=2, epochs=2, per_class=10))
    assert [layer.experts.order_F.tolist() != list(range(32)) for layer in routed_layers(runs[1].network).values()] == [True] * 2
    close(logits(runs[1], x), logits(runs[0], x))
    assert runs[1].flush_terms() == pytest.approx(runs[0].flush_terms(), rel=1e-3)


def test_a_low_tau_changes_evaluation_and_not_training(on_digits):
    x, runs = digits(on_digits), []
    for tau in (0.0, 1.0):
        runs.append(on_digits.learn(learner(ER(memory=30), MoE(tau=tau, experts=4, **QUICK)), last=2, epochs=2, per_class=10))
    a, b = (dict(run.network.state_dict()) for run in runs)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.allclose(logits(runs[0], x)[0], logits(runs[1], x)[0], atol=1e-3)
    set_tau(runs[0].network, 1.0)
    assert torch.equal(logits(runs[0], x)[0], logits(runs[1], x)[0])


def test_every_token_has_an_expert(on_digits):
    run = on_digits.learn(learner(MoE(tau=0.0, **QUICK)), last=1, epochs=1, per_class=10)
    for tau in (0.0, 0.5):
        set_tau(run.network, tau)
        usage = expert_usage(run.network, digits(on_digits))
        assert [u.experts_T.shape for u in usage.values()] == [(48, 5)] * 2  # four patches and the class token
        assert all(int(u.experts_T.min()) == 1 for u in usage.values())
    set_tau(run.network, 0.0)
    assert all(u.experts_per_token == 1 for u in expert_usage(run.network, digits(on_digits)).values())


def test_the_gate_waits_for_the_first_experience_and_for_evaluation(on_digits):
    x, seen = digits(on_digits), {}
    for training in ("dense", "gated"):
        run = learner(MoE(tau=0.0, training=training, experts=4, **QUICK))
        run.network.grow([0, 1])
        for stage in ("before", "after"):
            for mode in (True, False):
                run.network.train(mode)
                with count_usage(run.network) as usage:
                    run.network(x)
                ran = {u.experts_per_token for u in usage().values()}
                (seen[training, stage, mode],) = ran
            if stage == "before":
                on_digits.learn(run, last=1, epochs=1, per_class=10)
    assert {place for place, ran in seen.items() if ran == 1} == {
        ("dense", "after", False), ("gated", "after", False), ("gated", "after", True),
    }  # fmt: skip
    assert set(seen.values()) == {1.0, 4.0}


def test_gated_training_reaches_the_experts_that_run_and_no_router(on_digits):
    run = on_digits.learn(learner(MoE(tau=0.0, training="gated", experts=4, **QUICK)), last=1, epochs=1, per_class=10)
    on_digits.learn(run, first=1, last=2, epochs=1, per_class=10)
    run.network.zero_grad()
    run.network.train()
    layers, x = routed_layers(run.network), digits(on_digits, 1)[:1]
    with count_usage(run.network) as usage:
        run.network(x).last.sum().backward()
    for name, layer in layers.items():
        ran = torch.tensor(usage()[name].ran_E) > 0
        moved = layer.experts.down.grad.flatten(1).abs().sum(1) > 0
        assert not bool((moved & ~ran).any()) and bool(moved.any())
        assert all(p.grad is None for p in layer.router.parameters())


# --- routers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["first", "each"])
def test_routers_learn_after_the_first_experience_or_each_and_never_from_the_task(on_digits, fit):
    run = learner(ER(memory=30), MoE(fit=fit, **QUICK))

    def routers():
        return [p.detach().clone() for layer in routed_layers(run.network).values() for p in layer.router.parameters()]

    seen, orders = [routers()], []
    for index in range(3):
        on_digits.learn(run, first=index, last=index + 1, epochs=1, per_class=10)
        seen.append(routers())
        orders.append([layer.experts.order_F.clone() for layer in routed_layers(run.network).values()])
    changed = [not all(map(torch.equal, a, b)) for a, b in itertools.pairwise(seen)]
    assert changed == [True, fit == "each", fit == "each"]
    assert all(torch.equal(a, b) for later in orders[1:] for a, b in zip(orders[0], later, strict=True))  # split once
    assert run.state["moe"]["fitted"] == (1 if fit == "first" else 3) and len(run.state["moe"]["experts_per_token"]) == 2


def test_routers_come_to_foresee_what_experts_contribute(on_digits):
    run = on_digits.learn(learner(MoE(experts=4, epochs=30, lr=1e-2, router_width=64)), last=1, epochs=2)
    unexplained = []  # share of the variance, which is the error of the best guess that does not look at the token
    for layer in routed_layers(run.network).values():
        seen = []
        layer.observer = seen.append
        run.network.eval()(digits(on_digits))
        x = seen[0].detach()
        wanted = layer.experts.norms(x)
        error = (layer.router(x) - wanted).square().mean().detach()
        unexplained.append(float(error) / float(wanted.var(0).mean()))
    # Over six seeds 0.15 to 0.33, single layers up to 0.37; torch 2.11 draws other numbers, where one layer has 0.51.
    assert max(unexplained) < 0.8
    assert sum(unexplained) / len(unexplained) < 0.5


def test_samples_are_drawn_from_the_experience_and_the_memory_each_once():
    samples = TensorSamples(torch.arange(10.0)[:, None], torch.zeros(10, dtype=torch.long))
    memory = {"x": torch.arange(20.0, 26.0)[:, None], "y": torch.zeros(6, dtype=torch.long)}
    run = learner(MoE(samples=0, batch_size=3, **{"epochs": 1}), backbone="mlp", shape=(1,), width=4)
    (component,) = run.composition
    seen = []
    run.network.grow([0])
    run.network.backbone.stages[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].flatten()))
    context = StepContext(Experience(0, 1, (0,), (), (), samples), 1, 1, generator_for(0, 0), memory)
    component.after_experience(run.network, context, run.state["moe"])
    each = [*range(10), *range(20, 26)]
    assert sorted(torch.cat(seen).tolist()) == sorted(2 * each)  # to train, and to count
    assert max(map(len, seen)) == 3
    seen.clear()
    replace(component, samples=7).after_experience(run.network, context, run.state["moe"])
    assert sum(map(len, seen)) == 14


def test_one_class_and_one_sample(on_digits):
    run = learner(MoE(tau=0.5))
    for index, y in enumerate((3, 1)):
        samples = TensorSamples(torch.randn(1, 1, 8, 8), torch.tensor([y]))
        run.begin(Experience(index, 2, (y,), (), (), samples), classes=(y,), epochs=1)
        run.before_epoch(0)
        run.loss(run.make_batch(samples.raw(torch.tensor([0])), samples.y), run.network.train()(samples.x)).sum().backward()
        run.end()
    assert logits(run, samples.x)[0].isfinite().sum() == 2 and run.state["moe"]["fitted"] == 1


def test_costs_are_arithmetic(on_digits):
    component = MoE(experts=4, router_width=3, epochs=1, samples=40)
    run = learner(component)
    dense, router = 2 * 2 * 8 * 32, 2 * 3 * (8 + 4)  # two layers, up and down; routers from 8 to 3 to 4
    assert component.extra_cost(run.network, run.state["moe"]) == {"dense_macs_per_token": dense, "router_macs_per_token": router}
    on_digits.learn(run, last=1, epochs=1, per_class=10)
    ran = run.state["moe"]["experts_per_token"]
    assert all(1 <= count <= 4 for count in ran)
    cost = component.extra_cost(run.network, run.state["moe"])
    assert cost["routed_macs_per_token"] == round(router + sum(ran) * 2 * 8 * 8)


# --- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 2, "expert_size": 4}, "experts: found together with expert_size; give one of them"),
        ({"experts": 0}, "experts: found 0; give at least 1"),
        ({"tau": 1.5}, r"tau: found 1.5; give a number from 0 \(one expert a token\) to 1 \(all of them\)"),
        ({"k": 0}, "k: found 0; give at least 1"),
        ({"epochs": 0}, "epochs: found 0; give at least 1"),
        ({"samples": -1}, "samples: found -1; give a number of samples, or 0 for all"),
        ({"lr": 0.0}, "lr: found 0.0; give a number above 0"),
    ],
)
def test_numbers_that_mean_nothing(options, message):
    with pytest.raises(ConfigError, match=f"^components.moe.{message}$"):
        MoE(**options)


def test_networks_without_a_place_for_experts():
    with pytest.raises(UnsupportedError, match=r"^components\.moe: found no feed-forward network in Network; choose"):
        learner(MoE(), backbone="small_cnn", width=4)
    with pytest.raises(UnsupportedError, match=r"^components\.moe: found an exit on 'layer1', whose neurons .*; attach it to another stage"):
        learner(MoE(), Exits(at=("layer1",)), backbone="mlp", width=8, depth=2)
    with pytest.raises(ConfigError, match=r"^components\.moe: backbone.*experts: found 5; give a divisor of the 32 hidden"):
        learner(MoE(experts=5))
    run = learner(MoE(), Exits(at=("layer2",)), backbone="mlp", width=8, depth=4)
    assert list(routed_layers(run.network)) == ["backbone.stages.1.0", "backbone.stages.3.0"]


def test_heads_stay_as_they_are():
    torch.manual_seed(0)
    net = BACKBONES.get("mlp")((1, 8, 8), width=8, depth=2)
    network = Network(net, exits=[("layer2", make_head("hidden", (8,), hidden=8)), ("layer2", GrowingLinear(8))])
    Learner(network, compose(MoE()), seed=0)
    assert list(routed_layers(network)) == ["backbone.stages.1.0"]
