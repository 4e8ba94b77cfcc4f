"""Run folders with numbers that a test chooses, written the way a run writes them."""

from __future__ import annotations

import json

import pytest
from blank_figures import leave_figures_blank

from clframe.config.load import load_config
from clframe.config.typed import to_yaml
from clframe.exits.curves import AccuracyCostCurve, BudgetPoint, BudgetPoints
from clframe.exits.diagnostics import ExitRecord
from clframe.metrics.tally import Tally
from clframe.report.latency import write_timings
from clframe.results import summarize

SAMPLES = 20


def _tally(first, second):
    """Correct predictions of 20 on each of two experiences of one class."""
    total, right = ((SAMPLES, 0), (0, SAMPLES)), ((first, 0), (0, second))
    return Tally(total, correct_EC=right, correct_aware_EC=total)


def _exits(early, late, *, at_half=None):
    """Two exits of 100 and 400 MACs on a backbone of 400; ``at_half``: cost and accuracy at the budget 50 %."""
    points = BudgetPoints(points=None, undefined="no validation samples")
    if at_half is not None:
        point = BudgetPoint(name="50%", budget_share=0.5, threshold=0.5, cost=at_half[0], accuracy=at_half[1])
        points = BudgetPoints(points=(point,))
    return ExitRecord(
        backbone_macs=400,
        macs_K=(100, 400),
        accuracy_KE=((early, early), (late, late)),
        metrics={"accuracy": (early, late), "unique_accuracy": (0.0, 0.25)},
        static={"last": late, "oracle": 1.0},
        curve=AccuracyCostCurve(thresholds=(0.1, 0.9), costs=(0.25, 1.0), accuracies=(early, late), exit_costs=(0.25, 1.0),
                    exit_accuracies=(early, late)),
        points=points,
        share_PK=((0.75, 0.25),) if at_half else (),
        accuracy_PK=((0.5, 1.0),) if at_half else (),
        similarity_K=(1.0, 1.0),
    )  # fmt: skip


@pytest.fixture
def tally():
    """Counts of correct predictions on both experiences."""
    return _tally


@pytest.fixture
def exits():
    """The record of one evaluation of two exits."""
    return _exits


@pytest.fixture
def make_run(tmp_path):
    """Write a finished run; ``final`` are the correct predictions of 20 on both experiences at the end."""

    def making(
        name, final, *, seed=0, first=(20, 0), strategy="er", overrides=(), records=(), macs=1000, classes=(0, 1),
        change=None, ledger=None, timings=None, activity=(),
    ):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = load_config("quickstart", [f"strategy={strategy}", f"seed={seed}", *overrides])
        (folder / "config.yaml").write_text(to_yaml(config))
        result = summarize(
            [_tally(*first), _tally(*final)], name=config.name, strategy=strategy, benchmark="digits",
            backbone="small_cnn", seed=seed, class_order=classes, experiences=((0,), (1,)), parameters=7, macs=macs,
            train_seconds=2.0, steps=30, state_bytes={"er": 16}, versions={"torch": "2"}, run_folder=folder,
            exit_names=("early", "final") if records else (), exits=records, activity=activity,
        )  # fmt: skip
        content = json.loads(result.to_json())
        changed = dict(change or {})
        content["metrics"].update(changed.pop("metrics", {}))
        content.update(changed)
        (folder / "results.json").write_text(json.dumps(content))
        (folder / "environment.json").write_text(json.dumps({
            "command": ["clframe", "run", "quickstart", f"strategy={strategy}", "--seed", str(seed)],
            "git_revision": "abc", "machine": {"cores": 2},
        }))  # fmt: skip
        costs = {
            "inference_macs": {"block": 750, "exit/final": 250},
            "totals": {"by_phase": {"forward": 100, "backward": 300}, "uncounted": {"aten::odd": 2}},
        }
        if ledger is not None:
            costs["ledger"] = ledger.as_tree()
            costs["totals"] = {"by_phase": ledger.by_phase(), "uncounted": ledger.uncounted()}
        (folder / "ledger.json").write_text(json.dumps(costs))
        if timings is not None:
            write_timings(timings, folder)
        (folder / "metrics.csv").write_text(
            "experience,step,name,value\n0,20,loss/task/ce,0.5\n1,40,loss/task/ce,0.25\n1,40,train/learning_rate,0.1\n"
        )
        return folder

    return making


@pytest.fixture
def without_figures(monkeypatch):
    """Leave the figures blank, which is most of the time that a report takes, where only words and numbers count."""
    leave_figures_blank(monkeypatch)


@pytest.fixture(scope="session")
def read_table():
    """A table's CSV file as rows by column."""
    import csv

    def reading(page, name):
        with open(page.parent / "tables" / f"{name}.csv", newline="") as file:
            return list(csv.DictReader(file))

    return reading
