"""The summary of the measurements on several devices."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "perf" / "data_parallel.py"


def test_rates_are_compared_with_those_of_one_device() -> None:
    spec = importlib.util.spec_from_file_location("data_parallel", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    row = {"backbone": "vit_b_16", "strategy": "naive"}
    rows = [
        {"check": "naive", "equal_to_one_device": True},
        {**row, "setting": "one", "rate": 100.0, "eval": 200.0},
        {**row, "setting": "same share", "rate": 190.0, "eval": 300.0},
        {**row, "setting": "same batch", "rate": 150.0},
        {**row, "setting": "one, eager", "skipped": "no time left"},
        {"backbone": "resnet32", "strategy": "lwf", "setting": "same share", "rate": 5.0},
    ]
    assert script.summarize(rows) == [
        {"backbone": "vit_b_16", "strategy": "naive", "one": 100.0, "eval, one / one": 1.0, "same share / one": 1.9,
         "eval, same share / one": 1.5, "same batch / one": 1.5},
    ]  # fmt: skip


def test_shares_that_cover_an_epoch_once() -> None:
    spec = importlib.util.spec_from_file_location("data_parallel", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    one = [(0, 0, 1.0), (0, 0, 2.0), (0, 1, 1.0)]
    assert script._once(one, [one[2], one[0], one[1]])
    assert not script._once(one, one[:2]) and not script._once([*one, one[0]], [*one, one[0]])
