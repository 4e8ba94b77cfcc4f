"""Training routers, the whole conversion, and what it buys."""

import math
from collections import UserDict

import pytest
import torch
from torch import nn

from clframe.errors import ConfigError, DivergenceError, UnsupportedError
from clframe.moe import (
    ActivationRouter,
    CumulativeShare,
    DynamicK,
    NormRouter,
    TopK,
    count_usage,
    expert_usage,
    fit_router,
    fit_routers,
    moefy,
    routed_layers,
    set_gate,
    to_experts,
    tune,
)
from clframe.moe.pipeline import fit_experts


def model_of(d=6, f=24, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Linear(d, f), nn.ReLU(), nn.Linear(f, d)), nn.LayerNorm(d),
        nn.Sequential(nn.Linear(d, f), nn.ReLU(), nn.Linear(f, d)),
    )  # fmt: skip


def batches(count=8, size=32, d=6, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, d, generator=generator) for _ in range(count)]


def test_norm_router_longhand():
    router = NormRouter(5, 3, width=4).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    for n in range(6):
        hidden = [max(0.0, float(row @ x[n])) for row in router.hidden.detach()]
        for e in range(3):
            score = abs(sum(v * h for v, h in zip(router.score[e].tolist(), hidden, strict=True)))
            assert math.isclose(router(x)[n, e].detach().item(), score, rel_tol=1e-9, abs_tol=1e-12)
    torch.testing.assert_close(router(x[:1]), router(x)[:1])
    for rows in (x[:1], x):  # one token takes another way
        rows.requires_grad_(False)
        loss = router.loss(rows, torch.ones(len(rows), 3, dtype=torch.float64))
        expected = ((router(rows) - 1) ** 2).mean()
        torch.testing.assert_close(loss, expected)
        assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, list(router.parameters())))
    assert {tuple(p.shape) for p in router.parameters()} == {(4, 5), (3, 4)}


def test_activation_router_foresees_summed_positive_activations():
    model = model_of()
    layer = next(iter(to_experts(model, experts=4, router="activation", router_width=5).values()))
    x = torch.randn(7, 6)
    assert isinstance(layer.router, ActivationRouter)
    torch.testing.assert_close(layer.router.targets(layer.experts, x), layer.experts.hidden(x).clamp_min(0).sum(2))
    scores = layer.router(x)
    assert bool(((scores > 0) & (scores < 1)).all())
    set_gate(model, TopK(k=2))
    assert layer.keep(x).sum(1).tolist() == [2] * 7


def test_fit_router_learns_norms_and_nothing_else_moves():
    model = model_of()
    layer = next(iter(to_experts(model, experts=4, router_width=32).values()))
    x = torch.cat(batches())
    before = {k: v.clone() for k, v in layer.experts.state_dict().items()}
    norms = layer.experts.norms(x)
    first = float(((layer.router(x) - norms) ** 2).mean().detach())
    losses = fit_router(layer, x, epochs=30, batch_size=64, learning_rate=1e-2)
    last = float(((layer.router(x) - norms) ** 2).mean().detach())
    assert last < 0.1 * first and last < float(norms.var()) and losses[-1] < losses[0]
    assert all(torch.equal(before[k], v) for k, v in layer.experts.state_dict().items())
    again = next(iter(to_experts(model_of(), experts=4, router_width=32).values()))
    assert fit_router(again, x, epochs=30, batch_size=64, learning_rate=1e-2) == losses


def test_fit_routers_of_a_model_one_step_longhand():
    model, (batch,) = model_of().train(), batches(1)
    layers = to_experts(model, experts=4, router_width=8)
    gate = DynamicK(tau=0.2)
    set_gate(model, gate)
    expected = []
    with torch.no_grad():
        x = batch
        for part, layer in ((0, layers["0"]), (2, layers["2"])):
            x = model[1](x) if part else x
            target = layer.experts.norms(x)
            expected.append(((layer.router(x) - target) ** 2).mean())
            x = layer.experts(x)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    (loss,) = fit_routers(model, [batch], epochs=1, learning_rate=1e-3)
    assert math.isclose(loss, float(sum(expected)) / 2, rel_tol=1e-5)
    moved = {n for n, p in model.named_parameters() if not torch.equal(weights[n], p)}
    assert moved == {f"{n}.router.{part}" for n in ("0", "2") for part in ("hidden", "score")}
    biggest = max(float((weights[n] - p.detach()).abs().max()) for n, p in model.named_parameters())
    assert math.isclose(biggest, 1e-3, rel_tol=1e-2)  # Adam's first step
    assert model.training and all(layer.gate == gate and layer.observer is None for layer in layers.values())
    assert all(p.grad is None for p in model.parameters())


def test_frozen_routers_learn_and_stay_frozen():
    model = model_of()
    to_experts(model, experts=4)
    model.requires_grad_(False)
    first, last = (fit_routers(model, batches(4), epochs=2)[i] for i in (0, -1))
    assert last < first and not any(p.requires_grad for p in model.parameters())


def test_a_trained_router_chooses_better_than_chance_at_the_same_cost():
    """Fewer experts by the trained router leave less error than by one that was not trained."""
    errors = {}
    x = torch.cat(batches(4, seed=8))
    for epochs in (1, 40):
        model = model_of(f=48)
        with torch.no_grad():
            expected = model(x)
            layers = moefy(
                model, batches(16, 64), experts=12, epochs=epochs, learning_rate=1e-5 if epochs == 1 else 1e-2,
                gate=TopK(k=6), router_width=64,
            )  # fmt: skip
            with count_usage(model) as usage:
                errors[epochs] = float((model(x) - expected).square().mean())
        assert all(u.experts_per_token == 6 for u in usage().values()) and len(layers) == 2
    assert errors[40] < 0.8 * errors[1]


def test_dynamic_k_keeps_the_experts_that_contribute():
    x = torch.cat(batches(8, seed=8))
    model = model_of(f=48)
    layers = moefy(model, batches(16, 64), experts=12, epochs=40, learning_rate=1e-2, router_width=64)
    layer, norms = layers["0"], layers["0"].experts.norms(x)
    layer.gate = DynamicK(tau=0.7)
    kept = layer.keep(x)
    share = (norms * kept).sum(1) / norms.sum(1)
    assert 1 <= float(kept.sum(1).float().mean()) < 12
    assert float(norms[kept].mean() / norms[~kept].mean()) > 1.5 and float(share.mean()) > float(kept.float().mean())


def test_steps_come_in_order_and_gates_at_the_end():
    seen = []

    def sparsify(model):
        seen.append(len(routed_layers(model)))
        with torch.no_grad():
            model[0][0].bias.fill_(-0.5)

    model = model_of()
    gate = CumulativeShare(tau=0.8)
    layers = moefy(model, batches(2), expert_size=6, epochs=1, sparsify=sparsify, gate=gate, split="coactivation")
    assert seen == [0] and all(layer.gate == gate for layer in layers.values())
    assert bool((layers["0"].experts.up_bias == -0.5).all())
    assert model(batches(1)[0]).shape == (32, 6)


def test_converted_models_go_on_learning():
    model, data = model_of(), batches(4)
    moefy(model, data, experts=6, epochs=2, gate=DynamicK(tau=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(80):
        loss = torch.stack([(model(x) - x).square().mean() for x in data]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for layer in routed_layers(model).values() for p in layer.router.parameters())


class NamedInputs(nn.Module):
    """A model that is called as those of transformers are."""

    def __init__(self):
        super().__init__()
        self.body = model_of()

    def forward(self, *, x, shift):
        return self.body(x + shift)


@pytest.mark.parametrize("kind", [dict, UserDict])  # a tokenizer of transformers returns a UserDict
def test_named_inputs_are_keyword_arguments(kind):
    named, plain = NamedInputs(), model_of()
    inputs = [kind(x=x - 2, shift=2.0) for x in batches()]
    shifted = [x - 2 + 2.0 for x in batches()]
    options = {"experts": 4, "router_width": 5, "split": "coactivation", "epochs": 2, "gate": TopK(k=2)}
    assert list(moefy(named, inputs, **options)) == [f"body.{name}" for name in moefy(plain, shifted, **options)]
    for one, other in zip(routed_layers(named).values(), routed_layers(plain).values(), strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert p.equal(q)
    (first, *_), (second, *_) = expert_usage(named, inputs[0]).values(), expert_usage(plain, shifted[0]).values()
    assert first.experts_T.equal(second.experts_T) and first.routed_macs == second.routed_macs
    assert [times.tokens for times in tune(named, inputs[0]).values()] == [32, 32]


def test_bad_input():
    with pytest.raises(UnsupportedError, match="moe: found no experts in Sequential; convert it first"):
        fit_routers(model_of(), batches(1))
    model = model_of()
    layer = next(iter(to_experts(model, experts=4).values()))
    for call in (
        lambda: fit_routers(model, []),
        lambda: fit_routers(model, batches(1), epochs=0),
        lambda: fit_router(layer, torch.zeros(0, 6)),
        lambda: fit_router(layer, torch.zeros(2, 6), batch_size=0),
    ):
        with pytest.raises(ConfigError, match="give one or more"):
            call()
    with pytest.raises(ConfigError, match="moe.k: found 0; give 1 or more"):
        TopK(k=0)
    with pytest.raises(ConfigError, match="moe.tau: found 1.5"):
        CumulativeShare(tau=1.5)


def test_router_training_that_diverges_is_one_line():
    model = model_of()
    layer = next(iter(to_experts(model, experts=4).values()))
    broken = [torch.full((3, 6), torch.nan)]
    for call in (lambda: fit_routers(model, broken, epochs=2), lambda: fit_router(layer, broken[0], epochs=2)):
        with pytest.raises(DivergenceError, match="^moe: found a loss of nan in epoch 1 of router training; lower its learning rate"):
            call()


def test_experts_of_a_model_that_is_trained_afterwards():
    """Converted before training: regrouping, new routers and routing come together; nothing moves without a split."""
    model, data = model_of(), batches(2)
    layers = to_experts(model, experts=4, split=None)
    for layer in layers.values():
        layer.ready = False
    dense = [model(x) for x in data]
    before = {name: layer.router.score.clone() for name, layer in layers.items()}
    losses = fit_experts(model, data, split="kmeans", generator=torch.Generator().manual_seed(2), epochs=2)
    assert len(losses) == 2 and all(layer.ready for layer in layers.values())
    for x, y in zip(data, dense, strict=True):
        torch.testing.assert_close(model(x), y)
    assert any(not torch.equal(layer.experts.order_F, torch.arange(24)) for layer in layers.values())
    assert all(not torch.equal(layer.router.score, before[name]) for name, layer in layers.items())
    order = [layer.experts.order_F.clone() for layer in layers.values()]
    fit_experts(model, data, epochs=1)
    assert all(torch.equal(layer.experts.order_F, old) for layer, old in zip(layers.values(), order, strict=True))
