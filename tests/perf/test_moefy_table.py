"""The table of conversions: which options a row has, and how rows become numbers."""


import pytest
from moefy_table import BENCHES, rows_of, table

from clframe.config.load import load_config
from clframe.moe.conversion.options import Options


@pytest.mark.parametrize("name", BENCHES)
def test_rows_are_options_and_benches_are_configs(name):
    bench = BENCHES[name]
    rows = {row: Options(**options) for row, options in rows_of(bench, 3).items()}
    plain, without, full = rows["MoEfication"], rows["D2DMoE, no regulariser"], rows["D2DMoE"]
    assert (plain.penalty, without.penalty, full.penalty) == (0.0, 0.0, bench.strength)
    assert (plain.gate_kind, plain.router_kind) == ("top_k", "activation")
    assert (full.gate_kind, full.router_kind) == ("dynamic_k", "norm")
    assert len({(row.sparsify, row.swaps, row.split, row.epochs) for row in (plain, without, full)}) == 1
    assert all(row.seed == 3 and row.on in ("all", "memory") for row in rows.values())
    extra = ["backbone.pretrained=x", "benchmark.tokens=x"] if name == "text" else []
    assert load_config(bench.config, [*bench.overrides, *extra]).benchmark.validation == 0.1


def tree(accuracy, k, dense=0.9):
    numbers = {"accuracy": accuracy, "ffn_share": 0.49, "share": 0.6}
    points = [{"scope": scope, "budget": b, "k": k, "test": numbers} for scope in ("ffn", "model") for b in (0.25, 0.5)]
    points += [{"scope": "ffn", "budget": 0.75, "k": None, "test": None}]
    times = [{"k": k, "batch": n, "speedup": 1 + n / 100} for n in (1, 32)]
    return {"accuracy": {"dense": dense}, "points": points, "setting": {"k": k}, "times": times, "router_share": 0.03,
            "exits": None}  # fmt: skip


def test_numbers_of_a_row():
    text = table("vit", {"a": [tree(0.5, 3)], "b": [tree(0.5, 3), tree(0.7, 4, dense=0.8)]})
    one, two = text.splitlines()[4:6]
    assert one == "| a | 1 | 90.0 | 90.0 | 50.0 (49.0) | 50.0 (49.0) | - | 60.0 | 1.01x | 1.32x | 3.0 |"
    assert two.startswith("| b | 2 | 85.0 ± 7.1 | 85.0 ± 7.1 | 60.0 ± 14.1 (49.0 ± 0.0) |")
