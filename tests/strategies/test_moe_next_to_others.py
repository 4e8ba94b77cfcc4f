"""The component moe next to exits, sparsity, teachers and nearest means, in half precision, on other transformers, and in runs."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from expert_learners import QUICK, close, digits, learner, logits
from torch import nn

import clframe
from clframe.accounting import count_macs
from clframe.core import Experience, compose
from clframe.data import TensorSamples
from clframe.exits import ExitPolicy, select
from clframe.exits.dynamic import DynamicNetwork
from clframe.moe import DynamicK, count_usage, expert_usage, routed_layers, set_tau
from clframe.nn import BACKBONES, Network
from clframe.nn.frozen import freeze
from clframe.report.terminal import summary_text
from clframe.sparsity.functional import hoyer
from clframe.training.learner import Learner
from strategies import ER, NCM, EarlyExit, Exits, LwF, MoE, Sparsity

# --- next to others -----------------------------------------------------------------------------------


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
