"""What a prediction costs: sums over parts, means over stops, and the way to a file and back."""

from __future__ import annotations

import math

import pytest

from clframe.accounting import Experts, Ledger, Predictions
from clframe.errors import ConfigError, RunFolderError, UnknownNameError

LAYER = Experts(
    layer="mlp", experts=4, samples=2, tokens=10, routed=10, pairs=13, expert_macs=100, router_macs=7, part="layer2",
    experience=1,
)  # fmt: skip


def filled():
    predictions = Predictions()
    predictions.add_part("layer1", kind="stage", macs=999, experience=0)
    for name, kind, macs, component in (
        ("layer1", "stage", 100, ""), ("exit/layer1", "head", 20, "exits"), ("policy/layer1", "policy", 3, "early_exit"),
        ("layer2", "stage", 400, ""), ("exit/final", "head", 30, ""),
    ):  # fmt: skip
        predictions.add_part(name, kind=kind, macs=macs, component=component, experience=1)
    predictions.add_stops(names=("layer1", "final"), cost_K=(123, 553), count_K=(7, 13), experience=1)
    predictions.add_products("convolution", macs=1000, effective_macs=300, samples=4, experience=1)
    predictions.add_products("head", macs=80, effective_macs=80, samples=4, experience=1)
    predictions.add_experts(LAYER)
    return predictions


def test_parts_add_up():
    predictions = filled()
    assert predictions.whole() == 100 + 20 + 3 + 400 + 30
    assert predictions.whole(experience=0) == 999 and predictions.whole(experience=7) == 0
    assert predictions.by_kind() == {"stage": 500, "head": 50, "policy": 3}
    assert predictions.by_component() == {"": 530, "exits": 20, "early_exit": 3}


def test_expected_costs_come_from_counts():
    predictions = filled()
    assert predictions.by_exit() == {"layer1": 123, "final": 553}
    assert predictions.samples_by_exit() == {"layer1": 7, "final": 13}
    assert predictions.expected() == (7 * 123 + 13 * 553) / 20
    assert predictions.quantile(7 / 20) == 123 and predictions.quantile(8 / 20) == 553
    assert predictions.quantile(0) == 123 and predictions.quantile(1) == 553
    assert math.isnan(Predictions().expected()) and Predictions().quantile(0.5) is None


def test_dense_and_effective_counts_stand_beside_each_other():
    predictions = filled()
    assert predictions.by_role() == {"convolution": 250, "head": 20}
    assert predictions.by_role(count="effective") == {"convolution": 75, "head": 20}


def test_experts_cost_the_pairs_that_ran_and_their_router():
    (row,) = filled().experts()
    assert row.macs == 13 * 100 + 10 * 7 and row.dense_macs == 10 * 4 * 100


def test_the_mean_leaves_out_experts_that_rest_where_samples_get_that_far():
    predictions = filled()
    # in layer2, which 13 of 20 samples reach: two samples saved 10 * 4 * 100 - 1370 there
    assert predictions.mean() == pytest.approx((7 * 123 + 13 * 553) / 20 - 13 / 20 * (4000 - 1370) / 2)
    assert predictions.mean(experience=0) != predictions.mean(experience=0)  # no samples, no number
    # Layers of experts in each part of a network with three exits; a token costs 9, dense it costs 8 * 3 tokens.
    for part, reaching in (("first", 8), ("second", 4), ("third", 2), ("exit/second", 4), ("exit/first", 8)):
        several = Predictions()
        for name in ("first", "exit/first", "second", "exit/second", "third", "exit/final"):
            several.add_part(name, kind="head" if "/" in name else "stage", macs=1, experience=5)
        several.add_stops(names=("first", "second", "final"), cost_K=(100, 200, 300), count_K=(4, 2, 2), experience=5)
        row = Experts(layer="x", part=part, experts=2, samples=2, tokens=6, routed=6, pairs=6, expert_macs=4, router_macs=1,
                      experience=5)  # fmt: skip
        several.add_experts(row)
        assert several.mean(experience=5) == pytest.approx(175 - (48 - (6 * 4 + 6)) / 2 * reaching / 8), part
    plain = Predictions()
    plain.add_part("a", kind="stage", macs=5)
    plain.add_stops(names=("final",), cost_K=(5,), count_K=(2,))
    assert plain.mean() == plain.expected() == 5


def test_there_and_back_in_a_ledger():
    ledger = Ledger()
    ledger.predictions = filled()
    back = Ledger.from_json(ledger.to_json())
    assert back.as_tree() == ledger.as_tree() and back.predictions.experts() == (LAYER,)
    assert ledger.macs == 0  # what a prediction costs is not spent
    tree = ledger.as_tree()
    tree["predictions"]["parts"][0]["of_the_future"] = 1
    del tree["predictions"]["experts"]
    # Former versions wrote a row for each test experience.
    half = [{**row, "samples": row["samples"] // 2, "of": 0} for row in tree["predictions"]["stops"]]
    rest = [{**row, "samples": row["samples"] - row["samples"] // 2, "of": 1} for row in tree["predictions"]["stops"]]
    assert Ledger.of({**tree, "predictions": {"stops": [*half, *rest]}}).predictions.samples_by_exit() == {
        "layer1": 7, "final": 13,
    }  # fmt: skip
    assert Ledger.of(tree).predictions.whole() == 553
    del tree["predictions"]
    assert Ledger.of(tree).predictions.parts() == ()


def test_what_cannot_be_is_refused():
    predictions = Predictions()
    with pytest.raises(UnknownNameError, match="kind of part.*stages.*stage"):
        predictions.add_part("a", kind="stages", macs=1)
    for add in (
        lambda: predictions.add_part("a", kind="stage", macs=-1),
        lambda: predictions.add_products("head", macs=1, effective_macs=-1, samples=1),
        lambda: predictions.add_stops(names=("a",), cost_K=(1,), count_K=(-1,)),
    ):
        with pytest.raises(ConfigError, match="predictions: found .* -1; use counts of at least 0"):
            add()
    with pytest.raises(ValueError, match="zip"):
        predictions.add_stops(names=("a",), cost_K=(1, 2), count_K=(1, 2))
    assert predictions.as_tree() == {"parts": [], "stops": [], "products": [], "experts": []}


@pytest.mark.parametrize(
    ("old", "new"), [('"macs": 400', '"macs": "x"'), ('"macs": 400', '"macs": -4'), ('"samples": 7', '"samples": null')]
)
def test_a_damaged_file_is_one_line(old, new):
    ledger = Ledger()
    ledger.predictions = filled()
    text = ledger.to_json()
    assert old in text
    with pytest.raises(RunFolderError, match="ledger: is damaged") as caught:
        Ledger.from_json(text.replace(old, new))
    assert "\n" not in str(caught.value)
