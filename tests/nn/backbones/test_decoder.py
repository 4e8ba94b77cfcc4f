"""The causal language model: attention, rotary positions, causality, sizes and costs against closed forms."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from clframe.accounting import count_parameters, cumulative_macs
from clframe.errors import ConfigError, UnsupportedError
from clframe.nn import CosineLinear, Network
from clframe.nn.backbones.decoder import CausalAttention, decoder, rotary_table, rotate
from clframe.sparsity.sites import find_ffns

V, D, T = 29, 12, 7


def network(**options):
    torch.manual_seed(0)
    return Network(decoder((T + 1,), **{"vocabulary": V, "width": D, "depth": 2, "heads": 3, "hidden": 20, **options}))


def test_attention_equals_the_formula_written_longhand():
    torch.manual_seed(0)
    layer = CausalAttention(D, heads=3, context=T, base=100.0).double()
    x = torch.randn(2, T, D, dtype=torch.float64)
    q, k, v = (F.linear(x, part.weight) for part in (layer.q_proj, layer.k_proj, layer.v_proj))

    def turn(vector, position):  # pairs (i, i + 2) of a head of width 4, by position * 100^(-2 i / 4)
        out = vector.clone()
        for i in range(2):
            angle = torch.tensor(position * 100.0 ** (-2 * i / 4)).to(torch.float32)
            c, s = angle.cos().double(), angle.sin().double()
            out[i] = vector[i] * c - vector[i + 2] * s
            out[i + 2] = vector[i + 2] * c + vector[i] * s
        return out

    mixed = torch.zeros_like(x)
    for b in range(2):
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            for t in range(T):
                query = turn(q[b, t, part], t)
                score = torch.stack([query @ turn(k[b, s, part], s) / math.sqrt(4) for s in range(t + 1)])
                mixed[b, t, part] = score.softmax(0) @ v[b, : t + 1, part]
    torch.testing.assert_close(layer(x), F.linear(mixed, layer.o_proj.weight), rtol=1e-6, atol=1e-7)


def test_products_of_rotated_vectors_depend_on_the_distance_only():
    cos, sin = rotary_table(50, 8, base=10000.0)
    query, key = torch.randn(8), torch.randn(8)
    rotated = [rotate(x.expand(50, 8), cos, sin) for x in (query, key)]
    product = rotated[0] @ rotated[1].T
    for distance in (0, 3, 20):
        along = product.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-4)
    assert (product.diagonal(-3)[0] - product.diagonal(-20)[0]).abs() > 1e-3


@pytest.mark.parametrize("ffn", ["swiglu", "relu", "gelu"])
def test_a_token_changes_no_output_before_it(ffn):
    net = network(ffn=ffn).double().eval()
    ids = torch.randint(0, V, (1, T + 1))
    before = net(ids).last
    for t in (0, 3, T - 1):
        changed = ids.clone()
        changed[0, t] = (changed[0, t] + 1) % V
        after = net(changed).last
        torch.testing.assert_close(after[:t], before[:t], rtol=1e-12, atol=1e-12)
        assert (after[t] - before[t]).abs().max() > 1e-6
    changed = ids.clone()
    changed[0, T] = (changed[0, T] + 1) % V
    assert torch.equal(net(changed).last, before)  # the last id is only a target


@pytest.mark.parametrize("ffn, layers", [("swiglu", 3), ("relu", 2)])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_macs_are_the_closed_forms(ffn, layers, tied):
    net = network(ffn=ffn, tied=tied)
    block = 4 * D * D + layers * D * 20 + 2 * D
    assert count_parameters(net) == V * D * (1 if tied else 2) + 2 * block + D
    attention = T * 4 * D * D + 2 * T * T * D  # projections; scores and mixtures of all T x T pairs
    assert cumulative_macs(net) == (2 * (attention + T * layers * D * 20) + T * D * V,)
    assert [found.gated for found in find_ffns(net.backbone)] == [ffn == "swiglu"] * 2


def test_the_hidden_layer_has_8_3_of_the_width_if_gated():
    for ffn, width, hidden in (("swiglu", 48, 128), ("swiglu", 16, 48), ("relu", 16, 64)):
        backbone = decoder((5,), vocabulary=9, width=width, heads=2, depth=1, ffn=ffn)
        assert find_ffns(backbone)[0].d_ff == hidden


def test_a_copy_shares_its_own_embedding():
    net = network()
    twin = copy.deepcopy(net)
    assert twin.final.weight is twin.backbone.stages[0].table.weight
    assert twin.final.weight is not net.final.weight
    other = network()
    with torch.no_grad():
        other.final.weight.add_(1)
    other.load_state_dict(net.state_dict())
    ids = torch.randint(0, V, (2, T + 1))
    assert torch.equal(other.eval()(ids).last, net.eval()(ids).last)


def test_logits_have_a_row_for_each_token_window_by_window():
    net = network().eval()
    ids = torch.randint(0, V, (3, T + 1))
    rows = net(ids).last
    assert rows.shape == (3 * T, V)
    torch.testing.assert_close(rows[T : 2 * T], net(ids[1:2]).last)
    assert not net.grow([0]) and net.classes == V
    with pytest.raises(UnsupportedError, match="leave out the component"):
        net.classify_with(CosineLinear)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 5}, "decoder.heads: found 5 with width 12"),
        ({"heads": 4}, "decoder.heads: found 4 with width 12"),
        ({"ffn": "glu"}, "decoder.ffn: found 'glu'"),
        ({"dropout": 1.0}, "decoder.dropout: found 1.0"),
        ({"vocabulary": 1}, "decoder.vocabulary: found 1; give 2 or more"),
        ({"rope_base": 1.0}, "decoder.rope_base: found 1.0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        network(**options)
    with pytest.raises(ConfigError, match="give windows of ids"):
        decoder((3, 8, 8))
