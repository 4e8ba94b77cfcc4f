"""Products that skip weights: equal to the dense product, and skipped weights are not read."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from clframe.errors import ClframeError
from clframe.sparse_decode import Rule, read_share
from clframe.sparse_decode.projection import SUM_BELOW, Projection, compute_active, compute_masked
from clframe.sparse_decode.rules import require_rules
from clframe.sparsity.functional import keep


def threshold(value):
    return Rule("threshold", value)


RULES = {
    "intermediate": {"intermediate": threshold(0.6)},
    "input": {"input": threshold(1.0)},
    "both": {"input": Rule("max_p", 0.5), "intermediate": Rule("top_p", 0.6)},
    "gate": {"gate": threshold(0.5)},
    "up": {"up": Rule("top_k", 0.3)},
    "input and gate": {"input": threshold(1.2), "gate": Rule("max_p", 0.4)},
    "input and up": {"input": threshold(1.2), "up": threshold(1.0)},
    "all active": {"input": threshold(0.0), "intermediate": threshold(0.0)},
    "none active": {"intermediate": threshold(1e3)},
    "no input": {"input": threshold(1e3), "gate": threshold(0.1)},
    "no gate": {"gate": threshold(1e3)},
}


def longhand(ffn, rules, x_TD):
    """The network with every weight, and zeros where the rules say so."""

    def masked(place, value_TN):
        if place not in rules:
            return value_TN
        rule = rules[place]
        value = round(rule.value * value_TN.shape[1]) if rule.kind == "top_k" else rule.value
        return value_TN * keep(value_TN, value, kind=rule.kind)

    x_TD = masked("input", x_TD)
    up_TF = F.linear(x_TD, *ffn.up)
    if ffn.gate is None:
        hidden_TF = ffn.activation(up_TF)
    else:
        hidden_TF = masked("up", up_TF) * masked("gate", ffn.activation(F.linear(x_TD, *ffn.gate)))
    return F.linear(masked("intermediate", hidden_TF), *ffn.down)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("gated", [True, False])
def test_one_token_and_several_equal_the_masked_network(make_layer, name, gated):
    rules = RULES[name]
    if not gated and {"gate", "up"} & set(rules):
        return
    layer, ffn = make_layer(rules, gated=gated, biased=name != "both")
    x_TD = torch.randn(5, 37, generator=torch.Generator().manual_seed(1))
    expected_TO = longhand(ffn, rules, x_TD)
    torch.testing.assert_close(layer(x_TD[None]), expected_TO[None])
    for x_D, expected_O in zip(x_TD, expected_TO, strict=True):
        torch.testing.assert_close(layer(x_D[None, None]), expected_O[None, None])
        torch.testing.assert_close(compute_active(layer.parts(), x_D[None]), expected_O[None])
    if name == "none active":
        assert torch.equal(layer(x_TD[:1])[0], ffn.down[1])
    assert layer(x_TD[:0]).shape == (0, 29)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types(make_layer, dtype):
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 3e-3, torch.float64: 1e-12}[dtype]
    for rules in (RULES["intermediate"], RULES["input and gate"]):
        layer, _ = make_layer(rules, dtype=dtype)
        x = torch.randn(1, 37, generator=torch.Generator().manual_seed(2)).to(dtype)
        found, expected = compute_active(layer.parts(), x), compute_masked(layer.parts(), x)
        assert found.dtype == dtype
        assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


def test_two_threads_add_the_same_parts(make_layer):
    layer, _ = make_layer(RULES["input and gate"])
    x = torch.randn(1, 37, generator=torch.Generator().manual_seed(3))
    one, before = layer(x), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.testing.assert_close(layer(x), one)
    finally:
        torch.set_num_threads(before)


def test_weights_of_zeros_are_not_read():
    """They are NaN here, and NaN times 0 is NaN."""
    torch.manual_seed(0)
    weight_OI, bias_O, x_1I = torch.randn(9, 40), torch.randn(9), torch.randn(1, 40)
    expected = F.linear(x_1I * (torch.arange(40) % 4 == 0), weight_OI, bias_O)
    weight_OI[:, torch.arange(40) % 4 != 0] = math.nan
    x_1I[:, torch.arange(40) % 4 != 0] = 0
    torch.testing.assert_close(Projection(weight_OI, bias_O, by_input=True).skip_inputs(x_1I), expected)
    weight_OI, index_A = torch.randn(40, 9), torch.tensor([0, 5, 39])
    expected = F.linear(x_1I[:, :9], weight_OI)[:, index_A]
    weight_OI[[n for n in range(40) if n not in (0, 5, 39)]] = math.nan
    torch.testing.assert_close(Projection(weight_OI, None, by_input=False).skip_outputs(x_1I[:, :9], index_A), expected)


def test_many_active_neurons_are_multiplied_densely(monkeypatch):
    """Then the whole weight is read, which takes less time."""
    monkeypatch.setattr("clframe.sparse_decode.projection.sum_rows", lambda *_: pytest.fail("sparse product"))
    x_1I = torch.zeros(1, 40)
    x_1I[:, : round(SUM_BELOW * 40) + 1] = 1
    assert torch.equal(Projection(torch.ones(3, 40), None, by_input=True).skip_inputs(x_1I), x_1I.sum().expand(1, 3))


def test_share_of_weights_read():
    """Of three matrices, or two; zeros of both ends of a gated network from its cost in MACs."""
    assert read_share({"input": 0.5, "intermediate": 0.9}, gated=True) == pytest.approx(1 - 2 / 3 * 0.5 - 1 / 3 * 0.9)
    assert (
        read_share({"gate": 0.9}, gated=True) == read_share({"up": 0.9}, gated=True) == pytest.approx(1 - 2 / 3 * 0.9)
    )
    assert read_share({"input": 0.5, "gate": 0.9}, gated=True) == pytest.approx((0.5 + 0.1 + 0.1) / 3)
    assert read_share({"input": 0.5, "intermediate": 0.9}, gated=False) == pytest.approx(0.3)
    assert read_share({}, gated=True) == 1


@pytest.mark.parametrize(
    ("rules", "gated", "message"),
    [
        ({}, True, "found none; give input"),
        ({"gate": 0, "intermediate": 0}, True, "found gate and intermediate; give input"),
        ({"gate": 0}, False, "found gate for ffn, which has no gate; use intermediate"),
        ({"hidden": 0}, True, "unknown place 'hidden'"),
    ],
)
def test_rules_that_are_refused(rules, gated, message):
    with pytest.raises(ClframeError, match=message):
        require_rules(rules, gated=gated, where="ffn")


@pytest.mark.parametrize(("kind", "value"), [("threshold", -1.0), ("top_k", 3), ("max_p", 1.5), ("top_p", math.nan)])
def test_values_out_of_range(kind, value):
    with pytest.raises(ClframeError, match=f"sparsity.{kind}: found"):
        Rule(kind, value)
