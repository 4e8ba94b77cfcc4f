"""The component moe: training as without it, routing afterwards, and what must go on working on top of it."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import clframe
from clframe.accounting import count_macs
from clframe.core import Experience, StepContext, compose
from clframe.data import TensorSamples
from clframe.errors import ConfigError, UnsupportedError
from clframe.exits import ExitPolicy, make_head, select
from clframe.exits.dynamic import DynamicNetwork
from clframe.moe import CumulativeShare, DynamicK, TopK, count_usage, expert_usage, routed_layers, set_tau
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.nn.frozen import freeze
from clframe.report.terminal import summary_text
from clframe.seeding import generator_for
from clframe.sparsity.functional import hoyer
from clframe.training.learner import Learner
from strategies import ANCL, DER, ER, EWC, MAS, NCM, SI, EarlyExit, Exits, LwF, MoE, Sparsity

VIT = {"patch": 4, "width": 8, "depth": 2, "heads": 2}
QUICK = {"epochs": 1, "samples": 40, "router_width": 64}
"""Wide enough that no token's scores are all zero, which would say nothing and run all."""


def learner(*components, backbone="vit_tiny", shape=(1, 8, 8), exits=(), seed=0, **options):
    torch.manual_seed(seed)
    net = BACKBONES.get(backbone)(shape, **(VIT if backbone == "vit_tiny" and not options else options))
    heads = [(tap, make_head("token", net.tap_shapes[tap])) for tap in exits]
    return Learner(Network(net, exits=heads), compose(*components), seed=seed)


def digits(on_digits, count=8):
    samples = on_digits.samples(range(6), count, part="test")
    return samples.prepare(samples.raw(torch.arange(len(samples))))


@torch.no_grad()
def logits(run, x):
    return run.network.eval()(x).logits


def close(ours, theirs, tolerance=2e-4):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


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


BESIDE = [ER(memory=30), EWC(lamb=50.0), MAS(lamb=2.0), SI(c=5.0), LwF(), ANCL(), DER(memory=30)]


@pytest.mark.parametrize(
    ("other", "split"),
    [*((other, "kmeans") for other in BESIDE), (SI(c=5.0), "random"), (SI(c=5.0), "coactivation"), (LwF(), "coactivation")],
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


# --- beside others ------------------------------------------------------------------------------------


def test_sparsity_sees_the_hidden_neurons_of_experts(on_digits):
    for training in ("dense", "gated"):
        run = learner(Sparsity(strength=1.0), MoE(training=training, tau=0.3, **QUICK), width=8, patch=4, depth=1, heads=2)
        on_digits.learn(run, last=1, epochs=1, per_class=6)
        run.network.grow([2, 3])
        step = on_digits.step(run, [2, 3])
        (layer,) = routed_layers(run.network).values()
        seen = []
        layer.observer = seen.append
        step = replace(step, output=run.network.train()(step.batch.x))
        expected = hoyer(layer.experts.hidden(seen[0]).flatten(1))
        term = Sparsity(strength=1.0).losses(replace(step, values={"strength": 1.0}), {})["penalty"]
        assert term.item() == pytest.approx(expected.item(), rel=1e-5)
        term.backward()
        assert bool((layer.experts.up.grad.flatten(1).abs().sum(1) > 0).all())
    swapped = learner(Sparsity(relu=True), MoE())
    assert not any(isinstance(part, nn.GELU) for part in swapped.network.modules())


def test_exits_sparsity_and_experts_in_one_strategy(on_digits):
    parts = [ER(memory=60), Exits(at=("encoder.0",)), EarlyExit(threshold=0.5), Sparsity(strength=0.01), MoE(tau=0.5, **QUICK)]
    run = on_digits.learn(learner(*parts, width=16, patch=2, depth=2, heads=2), epochs=2)
    x, network = digits(on_digits), run.network.eval()
    confidence_B = logits(run, x)[0].softmax(1).amax(1)
    policy = ExitPolicy(thresholds=float(confidence_B.median()))
    with torch.no_grad():
        expected = select(network(x).logits, policy)
        with count_usage(network) as whole:
            network(x)
        with count_usage(network) as stopped:
            found = DynamicNetwork(network, policy, compact=0)(x)
    torch.testing.assert_close(found.scores_BC, expected.scores_BC, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.exit_B, expected.exit_B) and 0 < int((found.exit_B == 0).sum()) < len(x)
    tokens = [[u.tokens for u in usage().values()] for usage in (whole, stopped)]
    behind = int((found.exit_B == 1).sum())
    assert tokens == [[17 * 48] * 2, [17 * 48, 17 * behind]]
    assert all(1 <= u.experts_per_token < 16 for u in whole().values())


def test_means_are_those_of_the_network_that_answers(on_digits):
    """moe acts before everybody else at the end of an experience, ncm among them."""
    run = on_digits.learn(learner(NCM(), MoE(tau=0.0, experts=4, **QUICK)), last=1, epochs=1, per_class=10)
    samples = on_digits.experience(0, per_class=10).samples
    with torch.no_grad():
        features = run.network.eval().backbone(samples.prepare(samples.raw(torch.arange(20))))
    f = nn.functional.normalize(features, dim=1)
    sums = torch.stack([f[samples.y == c].sum(0) for c in (0, 1)])
    torch.testing.assert_close(run.state["ncm"]["sums"][-1], sums, rtol=1e-4, atol=1e-4)


def test_teachers_route_as_the_network_did(on_digits):
    run = on_digits.learn(learner(LwF(), MoE(tau=0.2, **QUICK)), last=2, epochs=1, per_class=10)
    x, teacher = digits(on_digits), run.state["lwf"]["teacher"]
    assert all(layer.ready and layer.gate == DynamicK(tau=0.2) for layer in routed_layers(teacher).values())
    assert torch.equal(teacher(x).last, logits(run, x)[0])
    twin = freeze(run.network)
    set_tau(twin, 1.0)
    assert next(iter(routed_layers(run.network).values())).gate == DynamicK(tau=0.2)
    assert not torch.allclose(twin(x).last, logits(run, x)[0], atol=1e-3)
    copy.deepcopy(run.network.train())(x).last.sum().backward()


def test_autocast_costs_no_more_than_half_precision_does(on_digits):
    x, run = digits(on_digits), on_digits.learn(learner(MoE(tau=0.5, **QUICK)), last=1, epochs=2, per_class=10)
    exact = logits(run, x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        halved = logits(run, x)[0].float()
        whole = run.network.train()(x).last
        hidden = routed_layers(run.network).popitem()[1].experts(torch.randn(3, 8))
    whole.float().sum().backward()
    assert hidden.dtype == torch.bfloat16  # all experts at once, cast as a dense network's products are
    assert float((halved - exact).abs().mean()) < 0.1 * float(exact.std())
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in run.network.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["bert", "timm", "dropout"])
def test_other_transformers(name):
    if name != "dropout":
        pytest.importorskip("transformers" if name == "bert" else "timm")
    if name == "dropout":
        net = BACKBONES.get("vit_tiny")((3, 16, 16), patch=8, width=12, depth=1, heads=3, dropout=0.1)
    elif name == "timm":
        net = BACKBONES.get("timm")((3, 224, 224), model="test_vit")
    else:
        net = BACKBONES.get("bert")((6,), vocabulary=20, width=8)
    network = Network(net)
    network.grow([0, 1, 2])
    x = torch.randint(1, 20, (5, 6)) if name == "bert" else torch.randn(5, *network.input_shape)
    with torch.no_grad():
        before = network.eval()(x).last
        run = Learner(network, compose(MoE(tau=0.0, **QUICK)), seed=0)
        close([network(x).last], [before], 1e-4)
        samples = TensorSamples(x, torch.tensor([0, 1, 2, 0, 1]))
        run.begin(Experience(0, 1, (0, 1, 2), (), (), samples), classes=(0, 1, 2), epochs=1)
    run.end()
    usage = expert_usage(network, x)
    assert usage and all(u.experts_per_token == 1 and u.experts in (16, 24) for u in usage.values())
    set_tau(network, 1.0)
    with torch.no_grad():
        close([network.eval()(x).last], [before], 1e-4)


# --- runs ---------------------------------------------------------------------------------------------

RUN = ["backbone=vit_tiny", "backbone.width=8", "backbone.depth=1", "backbone.patch=4", "backbone.heads=2", "trainer.epochs=1",
       "strategy=er + lwf + moe", "components.moe.tau=0.4", "components.moe.fit=each", "components.moe.samples=60",
       "trainer.progress=false", "benchmark.experiences=3"]  # fmt: skip


def test_every_output_has_the_same_macs_of_the_whole_network(tmp_path, on_digits):
    """All experts, no router: those of the network without ``moe``."""
    short = [*RUN, "strategy=er + moe", "benchmark.experiences=1", "trainer.figures=none", "trainer.loggers=[]"]
    result = clframe.run("quickstart", short, output=tmp_path)
    costs = json.loads((Path(result.run_folder) / "ledger.json").read_text())
    assert result.macs == costs["exit_macs"]["final"] == sum(costs["inference_macs"].values())
    found = costs["totals"]["prediction"]
    assert result.macs == found["whole"] == found["by_exit"]["final"] == sum(found["dense_by_role"].values())
    dense = Network(BACKBONES.get("vit_tiny")((1, 8, 8), width=8, depth=1, patch=4, heads=2))
    dense.grow(range(10))
    assert result.macs == count_macs(dense, (1, 8, 8)) == result.exits[-1].backbone_macs
    assert f"{100 * found['mean'] / result.macs:.1f} % of the dense network" in " ".join(summary_text(result).split())


@pytest.mark.slow
def test_a_run_broken_off_ends_as_one_that_was_not_and_loads_as_it_was(tmp_path, on_digits):
    whole = clframe.run("quickstart", RUN, output=tmp_path)
    (folder,) = (path.parent for path in tmp_path.rglob("results.json"))
    model = clframe.load(folder)
    weights = copy.deepcopy(dict(model.network.state_dict()))
    x = on_digits.samples(range(6), 10, part="test").x
    answers = model.outputs(x).last
    for path in sorted((folder / "checkpoints").iterdir())[-1:]:
        path.unlink()
    (folder / "results.json").unlink()
    again = clframe.run(resume=folder)
    assert again.accuracy_matrix == whole.accuracy_matrix
    resumed = clframe.load(folder)
    assert all(torch.equal(t, weights[name]) for name, t in resumed.network.state_dict().items())
    assert torch.equal(resumed.outputs(x).last, answers)
    (layer,) = routed_layers(resumed.network).values()
    assert layer.ready and layer.gate == DynamicK(tau=0.4)
    assert next(iter(expert_usage(resumed.network, resumed.prepare(x)).values())).experts_per_token < 16
    set_tau(resumed.network, 1.0)
    assert not torch.equal(resumed.outputs(x).last, answers)


@pytest.mark.parametrize("preset", ["moe", "moe_paper"])
def test_presets_train(tmp_path, preset):
    short = [option for option in RUN if not option.startswith(("strategy", "components", "backbone.width"))]
    short.append("backbone.width=12")
    more = [f"strategy={preset}", "components.moe.samples=20", "components.moe.epochs=1", "benchmark.experiences=2"]
    result = clframe.run("quickstart", [*short, *more], output=tmp_path)
    assert "moe" in result.strategy


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
