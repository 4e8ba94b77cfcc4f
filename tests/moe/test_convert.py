"""Whole models to experts: the same answers until a gate leaves something out."""

import pytest
import torch
from torch import nn

from clframe.cli import main
from clframe.errors import ConfigError, DivergenceError, UnsupportedError
from clframe.moe import (
    CumulativeShare,
    DynamicK,
    RoutedExperts,
    TopK,
    count_usage,
    layer_inputs,
    regroup,
    routed_layers,
    set_gate,
    set_tau,
    to_experts,
)
from clframe.moe.dispatch import EXECUTORS
from clframe.nn import GrowingLinear, Network
from clframe.nn.backbones import mlp, small_cnn, vit_tiny


def network(make, shape=(1, 8, 8), classes=3, **options):
    torch.manual_seed(0)
    net = Network(make(shape, **options))
    net.grow(range(classes))
    return net.eval()


def vit():
    return network(vit_tiny, width=16, depth=2, patch=4)


@pytest.mark.parametrize("shared", [False, True])
def test_two_networks_in_one_module_keep_their_own_activations(shared):
    """Each has its activation by its own name: the second once replaced that of the first again."""
    torch.manual_seed(0)
    acts = [nn.ReLU()] * 2 if shared else [nn.ReLU(), nn.ReLU()]
    net = nn.Sequential(nn.Linear(4, 8), acts[0], nn.Linear(8, 4), nn.Linear(4, 8), acts[1], nn.Linear(8, 4))
    x = torch.randn(5, 4)
    with torch.no_grad():
        dense = net(x)
        assert list(to_experts(net, experts=2, router_width=3)) == ["2", "5"]
        torch.testing.assert_close(net(x), dense)
    assert [type(part) for part in net] == [nn.Identity, nn.Identity, RoutedExperts] * 2


def logits(net, x):
    return net(x).last


def bert(name="BertModel"):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12,
    )  # fmt: skip
    return BertModel(config).eval()


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=12,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=12)).eval()


def phi3():
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=12, pad_token_id=0,
    )  # fmt: skip
    return Phi3ForCausalLM(config).eval()


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


IDS = torch.randint(1, 30, (3, 7), generator=torch.Generator().manual_seed(0))
TEXT = {
    "bert": (bert, lambda m: m(IDS).last_hidden_state, 2),
    "llama": (llama, lambda m: m(IDS).logits, 2),
    "gpt2": (gpt2, lambda m: m(IDS).logits, 2),
    "fused gate": (phi3, lambda m: m(IDS).logits, 1),
    "encoder": (encoder, lambda m: m(torch.ones(3, 7, 16).cumsum(1)), 2),
    "vit": (vit, lambda m: logits(m, torch.arange(128.0).sin().view(2, 1, 8, 8)), 2),
    "mlp": (lambda: network(mlp, width=24, depth=4), lambda m: logits(m, torch.arange(128.0).sin().view(2, 1, 8, 8)), 2),
    "sequential": (
        lambda: nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Dropout(), nn.Linear(12, 6), nn.Dropout()).eval(),
        lambda m: m(torch.ones(2, 3, 6).cumsum(1)), 1,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # libraries' own, on tiny configurations
@pytest.mark.parametrize("name", TEXT)
def test_the_same_answers_with_all_experts_and_others_with_fewer(name):
    if name in ("bert", "llama", "gpt2", "fused gate"):
        pytest.importorskip("transformers")
    make, answer, count = TEXT[name]
    model = make()
    with torch.no_grad():
        before = answer(model)
        layers = to_experts(model, expert_size=4, router_width=64)
        torch.testing.assert_close(answer(model), before, rtol=1e-4, atol=1e-5)
        assert len(layers) == count and layers == routed_layers(model)
        set_gate(model, TopK(k=1000))
        torch.testing.assert_close(answer(model), before, rtol=1e-4, atol=1e-5)
        set_tau(model, 0.0)
        with count_usage(model) as usage:
            fewer = answer(model)
        assert all(u.experts_per_token == 1 and u.tokens > 0 for u in usage().values())
        assert not torch.allclose(fewer, before, atol=1e-4) and fewer.shape == before.shape
    answer(model).sum().backward()
    trained = [layer.experts.up.grad is not None for layer in layers.values()]
    assert all(trained)


def test_usage_is_counted_by_arithmetic():
    model = vit()
    layers = to_experts(model, experts=8, router_width=5)
    set_gate(model, TopK(k=3))
    x = torch.randn(4, 1, 8, 8)
    with count_usage(model) as usage, torch.no_grad():
        model(x)
        model(x[:1])
    tokens = 5 * 5  # four patches and the class token of five images
    for used in usage().values():
        assert used.tokens == tokens and sum(used.ran_E) == 3 * tokens and used.experts_per_token == 3
        assert used.macs.dense == 2 * 16 * 64 and used.macs.router == 5 * (16 + 8)
        assert used.total_macs == tokens * (3 * 2 * 16 * 8 + 5 * 24)
        assert used.share == used.total_macs / (tokens * 2048) and used.macs.router_share == 120 / 2048
    set_tau(model, 1.0)
    with count_usage(model) as usage, torch.no_grad():
        model(x)
    assert all(u.total_macs == 20 * 2048 and u.ran_E == (20,) * 8 for u in usage().values())  # no router is asked
    assert all(layer.ran is None for layer in layers.values())


def test_tau_is_a_curve():
    model = vit()
    to_experts(model, experts=16, router_width=64)
    x, seen = torch.randn(5, 1, 8, 8), []
    for tau in (0.0, 0.2, 0.5, 0.9, 1.0):
        set_tau(model, tau)
        with count_usage(model) as usage, torch.no_grad():
            model(x)
        seen.append(next(iter(usage().values())).experts_per_token)
    assert seen == sorted(seen) and seen[0] == 1 and seen[-1] == 16 and 1 < seen[2] < 16


def test_conversion_is_a_function_of_its_seed():
    states = []
    for seed in (0, 0, 1):
        model = vit()
        to_experts(model, experts=8, seed=seed)
        states.append(model.state_dict())
    same = [torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True)]
    assert all(same)
    assert any(not torch.equal(a, b) for a, b in zip(states[0].values(), states[2].values(), strict=True))


def test_a_state_dict_finds_its_way_into_another_conversion():
    model, other = vit(), vit()
    to_experts(model, experts=8, seed=0)
    to_experts(other, experts=8, seed=9)
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 1, 8, 8)
    for net in (model, other):
        set_tau(net, 0.5)
    assert torch.equal(logits(model, x), logits(other, x))


def test_coactivation_looks_at_batches_and_leaves_modes_alone():
    model, x = vit().train(), torch.randn(6, 1, 8, 8)
    expected = logits(model, x)
    layers = to_experts(model, experts=8, split="coactivation", batches=[x[:3], x[3:]])
    assert model.training and all(layer.training for layer in layers.values())
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-4, atol=1e-5)
    plain = vit()
    to_experts(plain, experts=8, split="kmeans")
    orders = [[layer.experts.order_F.tolist() for layer in routed_layers(net).values()] for net in (model, plain)]
    assert orders[0] != orders[1]
    with pytest.raises(ConfigError, match="found 'coactivation' without batches"):
        to_experts(vit(), experts=8, split="coactivation")


def test_dropout_keeps_its_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4), nn.Dropout(0.25)))
    (layer,) = to_experts(model, experts=4).values()
    assert (layer.experts.dropout, layer.dropout) == (0.5, 0.25)
    x = torch.randn(3, 4)
    torch.manual_seed(3)
    first = model(x)
    assert not torch.allclose(first, model(x))
    assert torch.equal(model.eval()(x), model(x))
    nn.init.ones_(layer.experts.down)
    nn.init.zeros_(layer.experts.bias)
    y = model.train()(x.expand(3, 4))
    assert bool((y.eq(0) | y.abs().gt(0)).all())


def test_frozen_weights_stay_frozen_and_types_stay():
    model = vit().requires_grad_(False).bfloat16()
    layers = to_experts(model, experts=8)
    layer = next(iter(layers.values()))
    assert not layer.experts.up.requires_grad and layer.router.hidden.dtype == torch.bfloat16
    set_tau(model, 0.3)
    assert logits(model, torch.randn(2, 1, 8, 8).bfloat16()).dtype == torch.bfloat16


def test_half_precision_agrees_with_single():
    for dtype in (torch.bfloat16, torch.float16):
        model, half = vit(), vit().to(dtype)
        for net in (model, half):
            to_experts(net, experts=8, split="random")
            set_gate(net, TopK(k=8))
        x = torch.randn(2, 1, 8, 8)
        torch.testing.assert_close(logits(half, x.to(dtype)).float(), logits(model, x), rtol=0.1, atol=0.1)


def test_empty_batches():
    model = vit()
    to_experts(model, experts=8)
    set_tau(model, 0.5)
    assert logits(model, torch.zeros(0, 1, 8, 8)).shape == (0, 3)


def test_inputs_of_layers():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
    to_experts(model, experts=2)
    x = torch.randn(2, 3, 4)
    assert torch.equal(layer_inputs(model, x)["0"], x.view(6, 4))
    assert next(iter(routed_layers(model).values())).observer is None


def test_one_layer_perceptron_pairs_change_their_taps():
    net = network(mlp, width=24, depth=3)
    to_experts(net, experts=4)
    out = net(torch.randn(2, 1, 8, 8), taps=["layer1", "layer2"])
    assert net.backbone.tap_shapes == {"layer1": (64,), "layer2": (24,), "layer3": (24,)}
    assert all(out.taps[name].shape[1:] == net.backbone.tap_shapes[name] for name in ("layer1", "layer2"))
    with_exit = Network(mlp((1, 8, 8), width=24), exits=[("layer1", GrowingLinear(24))])
    with pytest.raises(UnsupportedError, match="moe: found an exit on 'layer1'"):
        to_experts(with_exit, experts=4)


def test_bad_input_is_one_line_and_changes_nothing():
    for make, options, message in [
        (vit, {"expert_size": 5}, "moe: .*.expert_size: found 5; give a divisor of the 64 hidden neurons"),
        (vit, {"experts": 4, "split": "kmean"}, "moe.split: found 'kmean'; choose from kmeans, random, coactivation"),
        (vit, {"experts": 4, "router": "mlp"}, "moe.router: found 'mlp'; choose from norm, activation"),
        (vit, {"experts": 4, "router_width": 0}, "moe.router_width: found 0; give 1 or more"),
        (lambda: network(small_cnn), {"experts": 4}, "found no feed-forward network"),
        (lambda: nn.Sequential(nn.Linear(2, 4, device="meta")), {"experts": 2}, "moe: found Sequential on the meta device"),
    ]:
        model = make()
        with pytest.raises((ConfigError, UnsupportedError), match=message) as caught:
            to_experts(model, **options)
        assert "\n" not in str(caught.value) and not routed_layers(model)
    model = vit()
    to_experts(model, experts=4)
    with pytest.raises(UnsupportedError, match="moe: found Network with experts"):
        to_experts(model, experts=4)
    for tau in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="moe.tau: found .*; give a number from 0"):
            set_tau(model, tau)
    assert all(isinstance(layer, RoutedExperts) for layer in routed_layers(model).values())


@pytest.mark.parametrize("gate", [DynamicK(tau=t) for t in (0.0, 0.3, 0.61, 0.9)] + [TopK(k=3), CumulativeShare(tau=0.6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_token_takes_a_shorter_way_to_the_same_answer(gate, dtype):
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 6))).to(dtype).eval()
    (layer,) = to_experts(model, experts=12, router_width=32).values()
    set_gate(model, gate)
    for x in torch.randn(40, 1, 6, generator=torch.Generator().manual_seed(2)).to(dtype):
        scores = layer.router(x)
        assert sorted(gate.select(scores[0])) == gate(scores)[0].nonzero().flatten().tolist()
        with torch.no_grad():
            assert layer.experts.can_run_one(x)
            expected = EXECUTORS["reference"](layer.experts.weights(), x, layer.keep(x), None)
            tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(model(x[None])[0], model(x))
        assert not layer.experts.can_run_one(x)
        torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("split", ["kmeans", "random", "coactivation"])
def test_weights_of_a_diverged_training_name_the_layer(split):
    """Before a conversion and, of a model converted earlier, when its experts are made."""
    net, x = network(mlp, width=8, depth=4), torch.ones(2, 1, 8, 8)
    broken = network(mlp, width=8, depth=4)
    with torch.no_grad():
        broken.backbone.stages[2].weight[0, 0] = torch.nan
    with pytest.raises(DivergenceError, match=r"^moe: found weights that are not finite in backbone\.stages\.2\.weight, training diverged; lower"):
        to_experts(broken, experts=4, split=split, batches=[x])
    assert not routed_layers(broken)
    layers = to_experts(net, experts=4, split=None)
    with torch.no_grad():
        layers["backbone.stages.3.0"].experts.up[0, 0, 0] = torch.inf
    kind = "activations" if split == "coactivation" else "weights"
    with pytest.raises(DivergenceError, match=rf"^moe: backbone\.stages\.3\.0: found {kind} that are not finite, training diverged; lower"):
        regroup(net, split=split, generator=torch.Generator(), batches=[x])


def test_a_router_has_a_24th_of_the_neurons_and_at_least_16(capsys):
    for neurons, width in ((48, 16), (480, 20)):
        model = nn.Sequential(nn.Sequential(nn.Linear(4, neurons), nn.ReLU(), nn.Linear(neurons, 4)))
        layers = to_experts(model, experts=2, router_width=None)
        assert [layer.router.hidden.shape for layer in layers.values()] == [(width, 4)]
    with pytest.raises(SystemExit):
        main(["moefy", "--help"])
    assert "max(16, d_ff // 24)" in " ".join(capsys.readouterr().out.split())
