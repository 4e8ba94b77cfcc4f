"""ledger.json: a table of inference costs, what training took, and every entry of the run's ledger."""

from __future__ import annotations

import json

from clframe.accounting import Energy, Ledger, backbone_macs, cumulative_macs
from clframe.accounting.ledger_file import write_ledger
from clframe.nn import GrowingLinear, Network
from clframe.nn.backbones import mlp


def written(folder, ledger):
    write_ledger(
        folder / "ledger.json", ledger, inference_macs={"layer1": 40, "exit/layer1": 30, "layer2": 100, "exit/final": 30},
        exit_macs={"layer1": 70, "final": 200}, steps=7, batches=28, train_seconds=1.5, state_bytes={"er": 12},
    )  # fmt: skip
    return json.loads((folder / "ledger.json").read_text())


def test_without_entries(tmp_path):
    tree = written(tmp_path, Ledger())
    assert Ledger.of(tree.pop("ledger")).entries == ()
    assert tree.pop("totals")["macs"] == 0
    assert tree == {
        "convention": "macs: one multiply-add counts 1; FLOPs = 2 x MACs",
        "training": {"steps": 7, "batches": 28, "seconds": 1.5},
        "inference_macs": {"layer1": 40, "exit/layer1": 30, "layer2": 100, "exit/final": 30},
        "exit_macs": {"layer1": 70, "final": 200},
        "state_bytes": {"er": 12},
    }


def test_counts_that_are_known_are_not_counted_again():
    counts = {"layer1": 1, "exit/layer1": 20, "layer2": 300, "exit/final": 4000}
    network = Network(mlp((1, 2, 2), width=10), exits=[("layer1", GrowingLinear(10))])
    assert cumulative_macs(network, counts=counts) == (21, 4321) and backbone_macs(network, counts=counts) == 4301


def test_with_the_ledger_of_a_run(tmp_path):
    ledger = Ledger()
    ledger.add("forward", macs=400, experience=0, samples=2, steps=1)
    ledger.add("replay", macs=100, experience=0, samples=1)
    ledger.add("evaluation", macs=200, experience=0, samples=1)
    ledger.add_time("training", seconds=0.5, experience=0)
    ledger.add_bytes("memory", bytes=12, component="er")
    ledger.add_energy(Energy(None, "none"), experience=0)
    ledger.add_uncounted({"aten._fft_r2c": 2})
    ledger.predictions.add_part("layer1", kind="stage", macs=40, experience=0)
    ledger.predictions.add_part("exit/layer1", kind="head", macs=30, component="exits", experience=0)
    ledger.predictions.add_stops(names=("layer1", "final"), cost_K=(70, 200), count_K=(3, 1), experience=0)
    ledger.predictions.add_products("linear", macs=400, effective_macs=100, samples=4, experience=0)
    tree = written(tmp_path, ledger)
    assert Ledger.of(tree["ledger"]).entries == ledger.entries
    assert tree["totals"] == {
        "macs": 700, "training_macs": 500, "by_phase": {"forward": 400, "replay": 100, "evaluation": 200},
        "by_component": {"": 700}, "samples": 2, "replayed_samples": 1, "seconds": {"training": 0.5},
        "bytes": {"memory": 12}, "energy": {"joules": None, "energy_source": "none"},
        "uncounted": {"aten._fft_r2c": 2},
        "prediction": {
            "whole": 70, "mean": (3 * 70 + 200) / 4, "by_component": {"": 40, "exits": 30},
            "by_exit": {"layer1": 70, "final": 200}, "samples_by_exit": {"layer1": 3, "final": 1},
            "dense_by_role": {"linear": 100.0}, "effective_by_role": {"linear": 25.0},
        },
    }  # fmt: skip


def test_a_mean_without_samples_is_null(tmp_path):
    assert written(tmp_path, Ledger())["totals"]["prediction"]["mean"] is None
