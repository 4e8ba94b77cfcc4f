"""The table of Zero Time Waste and its parts."""

import json
from statistics import mean

import ensemble_table
import pytest

import clframe

TINY = [
    "benchmark=digits", "benchmark.validation=0.15", "backbone=mlp", "backbone.width=16", "backbone.depth=3", "components.exits.at=auto",
    "components.exits.head=auto", "components.exits.every=1", "components.exits.values=[]", "trainer.epochs=3",
    "optimizer.milestones=[1,2]", "trainer.loggers=[]", "strategy=exits", "components.exits.ensemble=single",
    "trainer.figures=none", "trainer.progress=false", "seed=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensembles") / "run"
    clframe.run("zero_time_waste", TINY, folder=folder)
    return folder


def test_exits_alone_have_the_numbers_of_the_run(run) -> None:
    numbers = ensemble_table.numbers_of(run, "single", "", "max_probability", seed=0)
    record = json.loads((run / "results.json").read_text())["exits"][-1]
    points = {p["name"]: p for p in record["points"]["points"] if p["accuracy"] is not None}
    assert len(points) >= 2
    for name, point in points.items():
        assert numbers[f"accuracy at {name}"] == pytest.approx(100 * point["accuracy"])
        assert numbers[f"cost at {name}"] == pytest.approx(100 * point["cost"])
    improvable = record["metrics"]["hindsight_improvability"]
    assert numbers["hindsight improvability"] == pytest.approx(100 * mean(improvable[1:-1]))


def test_an_ensemble_wastes_less(run) -> None:
    alone = ensemble_table.numbers_of(run, "single", "", "max_probability", seed=0)
    product = ensemble_table.numbers_of(run, "product", "", "max_probability", seed=0)
    fitted = [
        ensemble_table.numbers_of(run, "geometric", "validation", "max_probability", seed=s, fit_epochs=20) for s in (0, 0, 1)
    ]
    assert product["hindsight improvability"] < alone["hindsight improvability"]
    assert fitted[0] == fitted[1] != product and fitted[2] is not None


def test_the_table() -> None:
    numbers = {f"{what} at {name}": value for name in ("25%", "50%", "75%", "100%", "max")
               for what, value in (("accuracy", 50.0), ("cost", 24.0))}  # fmt: skip
    first = {s: {**numbers, "hindsight improvability": 60.0, "accuracy at 25%": None, "cost at 25%": None} for s in (0, 1)}
    second = {s: {**numbers, "accuracy at 50%": 53.0 + s, "hindsight improvability": 30.0} for s in (0, 1)}
    lines = ensemble_table.table({"alone": first, "all": second}).splitlines()
    assert lines[2] == "| alone | - (-) | 50.0 ± 0.0 (24.0) | 50.0 ± 0.0 (24.0) | 50.0 ± 0.0 (24.0) | 50.0 ± 0.0 (24.0) |  | 60.0 ± 0.0 |"
    assert ensemble_table.differences({"alone": first, "all": second}).splitlines()[2] == (
        "| all | +nan ± nan | +3.5 ± 6.4 | +0.0 ± 0.0 | +0.0 ± 0.0 |"
    )
    assert "| 53.5 ± 0.7 (24.0) |" in lines[3] and "| +3.5 ± 6.4 | 30.0 ± 0.0 |" in lines[3]
