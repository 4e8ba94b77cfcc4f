"""What a converted model does and costs, against networks whose routers were written by hand."""

import copy

import pytest
import torch
from torch import nn

from clframe.accounting.macs import cumulative_macs
from clframe.data.target import Batch, Batches
from clframe.errors import DataError, UnsupportedError
from clframe.exits import make_head
from clframe.moe import DynamicK, TopK, routed_layers, set_tau, to_experts
from clframe.moe.conversion.measure import GateEvaluator, concatenate_passes
from clframe.nn import GrowingLinear, Network
from clframe.nn.backbones import mlp, vit_tiny


def batches(*made):
    return Batches([lambda one=one: one for one in made])


def known():
    """Two inputs, four neurons in two experts of two, two outputs; the router gives expert e the score |x[e]|."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)))
    dense = copy.deepcopy(model)
    (layer,) = to_experts(model, experts=2, router_width=2, split="random").values()
    with torch.no_grad():
        layer.router.hidden.copy_(torch.eye(2))
        layer.router.score.copy_(torch.eye(2))
    return dense, model.eval(), layer


def exit_logits(model, inputs):
    return (model(inputs),)


def test_one_layer_longhand():
    """Scores are the inputs: (4, 1) runs one expert at tau 0.5, (2, 1) both, as does (1, 1)."""
    dense, model, _ = known()
    x = torch.tensor([[4.0, 1.0], [2.0, 1.0], [1.0, 1.0], [1.0, 3.0]])
    y = torch.tensor([0, 1, 1, 0])
    measure = GateEvaluator(dense, model, exit_logits=exit_logits)
    one = measure.run(batches(Batch(x[:3], y[:3], None), Batch(x[3:], y[3:], None)), DynamicK(tau=0.5))
    assert one.ran_NL.tolist() == [[1], [2], [2], [1]] and one.tokens_NL.tolist() == [[1]] * 4
    expert, router, whole = 2 * 2 + 2 * 2, 2 * 2 + 2 * 2, 2 * 4 + 4 * 2
    assert one.ffn_N.tolist() == [expert + router, 2 * expert + router, 2 * expert + router, expert + router]
    assert one.cost_KN.tolist() == [one.ffn_N.tolist()]  # nothing else in the model costs anything
    assert one.dense_N.tolist() == [whole] * 4 == one.dense_ffn_N.tolist()
    assert one.ffn_share == one.share == (6 * expert + 4 * router) / (4 * whole)
    assert one.experts_per_token() == [1.5]
    assert one.experts_per_token(one.y_N == 0) == [1.0] and one.experts_per_token(one.y_N == 1) == [2.0]
    with torch.no_grad():
        set_tau(model, 0.5)
        best = model(x).softmax(1).max(1)
    assert one.correct_KN[0].tolist() == (best.indices == y).double().tolist()
    torch.testing.assert_close(one.confidence_KN[0], best.values.double())
    assert one.accuracy == float((best.indices == y).double().mean())


def test_a_gate_that_keeps_all_costs_no_router_and_top_k_always_does():
    dense, model, layer = known()
    batch = batches(Batch(torch.ones(3, 2), torch.zeros(3, dtype=torch.long), None))
    measure, before = GateEvaluator(dense, model, exit_logits=exit_logits), layer.gate
    assert measure.run(batch, DynamicK(tau=1.0)).share == 1.0
    assert measure.run(batch, TopK(k=2)).share == (16 + 8) / 16
    assert measure.run(batch, TopK(k=1)).share == (8 + 8) / 16
    assert layer.gate is before and layer.chosen is None


def vit(exits=()):
    torch.manual_seed(0)
    backbone = vit_tiny((1, 8, 8), width=12, depth=2, heads=2)
    network = Network(backbone, exits=[(tap, make_head("token", backbone.tap_shapes[tap])) for tap in exits])
    network.grow(range(3))
    return network.eval()


def all_exits(model, inputs):
    return model(inputs).logits


@pytest.mark.parametrize("exits", [(), ("encoder.0",)])
def test_transformer_with_and_without_exits(exits):
    """Five tokens a sample; one expert of four in each of two layers; the first exit pays for the first layer only."""
    model = vit(exits)
    dense = copy.deepcopy(model)
    layers = to_experts(model, experts=4, router_width=3)
    measure = GateEvaluator(dense, model, exit_logits=all_exits)
    x, y = torch.arange(3 * 64.0).sin().view(3, 1, 8, 8), torch.tensor([0, 1, 2])
    whole = torch.tensor(cumulative_macs(dense), dtype=torch.float64)
    everything = measure.run(batches(Batch(x, y, None)), DynamicK(tau=1.0))
    torch.testing.assert_close(everything.cost_KN, whole[:, None].expand(-1, 3))
    assert everything.dense_N.tolist() == [float(whole[-1])] * 3 and everything.share == 1.0
    least = measure.run(batches(Batch(x, y, None)), TopK(k=1))
    dense_ffn, expert, router = 2 * 12 * 48, 2 * 12 * 12, 3 * (12 + 4)
    saved = 5 * (dense_ffn - expert - router)
    wanted = [float(w) - n * saved for w, n in zip(whole, (1, 2) if exits else (2,), strict=True)]
    assert least.cost_KN.tolist() == [[w] * 3 for w in wanted]
    assert least.ffn_N.tolist() == [2 * 5 * (expert + router)] * 3
    assert least.dense_ffn_N.tolist() == [2 * 5 * dense_ffn] * 3
    assert least.tokens_NL.tolist() == [[5, 5]] * 3 == least.ran_NL.tolist() and len(layers) == 2


def test_replaced_layers_are_compared_with_what_they_were():
    dense, model, _ = known()
    batch = batches(Batch(torch.ones(1, 2), torch.zeros(1, dtype=torch.long), None))
    (name,) = routed_layers(model)
    one = GateEvaluator(dense, model, exit_logits=exit_logits, replaced={name: 4}).run(batch, DynamicK(tau=1.0))
    assert one.dense_ffn_N.tolist() == [4] and one.ffn_share == 16 / 4


def test_padding_costs_but_is_no_token():
    """Texts as tensors by name; the mask of tokens hides the last of three."""

    class Texts(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = known()[1]

        def forward(self, inputs):
            return self.body(inputs["x"]).sum(1)

    model = Texts().eval()
    dense = Texts().eval()
    x = torch.tensor([[[4.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
    mask = torch.tensor([[True, True, False]])
    batch = batches(Batch({"x": x}, torch.tensor([0]), mask))
    one = GateEvaluator(dense, model, exit_logits=exit_logits).run(batch, DynamicK(tau=0.5))
    assert one.tokens_NL.tolist() == [[3]] and one.ran_NL.tolist() == [[5]]
    assert one.real_NL.tolist() == [[2]] and one.real_ran_NL.tolist() == [[3]]
    assert one.experts_per_token() == [1.5]
    assert one.ffn_N.tolist() == [5 * 8 + 3 * 8]
    both = GateEvaluator(dense, model, exit_logits=exit_logits).run(
        batches(Batch({"x": x}, torch.tensor([0]), {"prompt": mask, "generated": ~mask})), DynamicK(tau=0.5)
    )
    assert both.real_NL.tolist() == [[3]]


def test_a_language_model_is_asked_for_some_tokens():
    class Next(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = known()[1]

        def forward(self, x):
            return self.body(x)

    model = Next().eval()
    x = torch.tensor([[[4.0, 1.0], [1.0, 1.0], [1.0, 3.0]], [[1.0, 1.0], [2.0, 2.0], [0.0, 1.0]]])
    with torch.no_grad():
        set_tau(model, 1.0)
        best = model(x).argmax(-1)
    y = best.clone()
    y[0, 0] = 1 - y[0, 0]  # one is wrong
    y[1, 1:] = -100
    one = GateEvaluator(copy.deepcopy(model), model, exit_logits=exit_logits).run(batches(Batch(x, y, None)), DynamicK(tau=1.0))
    assert one.correct_KN.tolist() == [[2, 1]] and one.targets_N.tolist() == [3, 1]
    assert one.accuracy == 3 / 4 and one.y_N.tolist() == [-1, -1]


def test_tokens_first_and_those_that_cannot_be_told():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = known()[1]

        def forward(self, x):
            return self.body(x.transpose(0, 1)).sum(0)

    model = First().eval()
    x = torch.tensor([[[4.0, 1.0]] * 3, [[1.0, 1.0]] * 3])  # two samples of three tokens
    batch = batches(Batch(x, torch.tensor([0, 1]), None))
    one = GateEvaluator(First().eval(), model, exit_logits=exit_logits).run(batch, DynamicK(tau=0.5))
    assert one.ran_NL.tolist() == [[3], [6]]

    class Odd(First):
        def forward(self, x):
            return self.body(x.flatten(0, 1)[:5]).sum(0, keepdim=True).expand(2, -1)

    with pytest.raises(UnsupportedError, match="5 tokens for 2 samples"):
        GateEvaluator(Odd().eval(), Odd().eval(), exit_logits=exit_logits).run(batch, DynamicK(tau=0.5))


def test_nothing_to_measure():
    dense, model, _ = known()
    with pytest.raises(DataError, match="no samples"):
        GateEvaluator(dense, model, exit_logits=exit_logits).run(batches(), DynamicK(tau=0.5))
    with pytest.raises(DataError, match="without labels"):
        GateEvaluator(dense, model, exit_logits=exit_logits).run(batches(Batch(torch.ones(1, 2), None, None)), DynamicK(tau=0.5))


def test_joined_keeps_the_order():
    dense, model, _ = known()
    measure = GateEvaluator(dense, model, exit_logits=exit_logits)
    x, y = torch.tensor([[4.0, 1.0], [1.0, 1.0]]), torch.tensor([0, 1])
    parts = [measure.run(batches(Batch(x[at : at + 1], y[at : at + 1], None)), DynamicK(tau=0.5)) for at in (1, 0)]
    both = concatenate_passes(parts)
    assert both.ran_NL.tolist() == [[2], [1]] and both.y_N.tolist() == [1, 0] and both.cost_KN.shape == (1, 2)


def test_mlp_of_stages_counts_from_the_right_exit():
    """Pairs of stages: the exit on the second stage pays for the first pair, the last for both."""
    torch.manual_seed(0)
    network = Network(mlp((1, 2, 2), width=6, depth=4), exits=[("layer2", GrowingLinear(6))])
    network.grow(range(3))
    dense = copy.deepcopy(network.eval())
    to_experts(network, experts=3, router_width=2)
    batch = batches(Batch(torch.ones(2, 1, 2, 2), torch.tensor([0, 1]), None))
    measure = GateEvaluator(dense, network, exit_logits=all_exits)
    everything = measure.run(batch, DynamicK(tau=1.0))
    assert everything.cost_KN[:, 0].tolist() == list(cumulative_macs(dense))
    one = measure.run(batch, TopK(k=1))
    first, second = 6 * (4 + 6), 6 * (6 + 6)
    saved = [first - first // 3 - 2 * (4 + 3), second - second // 3 - 2 * (6 + 3)]
    wanted = [c - s for c, s in zip(cumulative_macs(dense), (saved[0], sum(saved)), strict=True)]
    assert one.cost_KN[:, 0].tolist() == wanted
