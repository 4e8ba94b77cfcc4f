"""The file of runs behind the table of strategies with exits."""

import csv

import exit_table


def test_numbers_that_a_run_lacks_are_empty(tmp_path):
    last = {
        "static": {"last": 0.5, "confident": 0.625, "mean": 0.25, "oracle": 0.75},
        "points": {"points": [{"name": "25%", "accuracy": None, "cost": None}, {"name": "50%", "accuracy": 0.5, "cost": 0.4}]},
    }
    run = {"exits": [last], "parameters": 9, "metrics": {"forgetting": None}, "train_seconds": 1.25}
    exit_table.write_runs({"er + exits": {3: run}}, tmp_path / "runs.csv")
    with open(tmp_path / "runs.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (row["row"], row["seed"], row["last"], row["confident"]) == ("er + exits", "3", "50.0", "62.5")
    assert row["forgetting"] == row["accuracy at 25%"] == "" and row["cost at 50%"] == "40.0"


def test_every_exit_has_its_accuracy_and_forgetting():
    runs = {
        seed: {"exit_names": ["layer1", "final"], "exits": [{"metrics": {"accuracy": [0.5 + seed / 10, 0.25]}}],
               "exit_forgetting": [0.125, None]}
        for seed in (0, 2)
    }  # fmt: skip
    assert exit_table.exit_by_exit({"er": runs, "er + exits": runs}).splitlines() == [
        "| row | | exit 1 | last |",
        "|---|---|---:|---:|",
        "| er + exits | accuracy | 60.0 ± 14.1 | 25.0 ± 0.0 |",
        "| er + exits | forgetting | 12.5 ± 0.0 | - |",
    ]
    assert exit_table.exit_by_exit({"er": runs}) == ""
