"""From a run's folder to a folder of experts: what is written is what the model does."""

import argparse
import copy
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from quick_conversion import QUICK
from torch import nn

import clframe
from clframe.accounting.macs import count_macs
from clframe.cli import moefy
from clframe.data.target import DataSplits, SampleSplit
from clframe.errors import ClframeError, ConfigError, DataError, DivergenceError, RunFolderError, UnsupportedError
from clframe.moe import CumulativeShare, DynamicK, TopK, count_usage, routed_layers, set_gate
from clframe.moe.conversion.convert import convert
from clframe.moe.conversion.options import Options, check_model
from clframe.moe.conversion.output import summary
from clframe.moe.conversion.study import moefy_target, record
from clframe.moe.conversion.sweep import time_pair
from clframe.moe.conversion.training import choose_data
from clframe.targets.folders import restore_model, write_conversion
from clframe.targets.opening import open_target


@pytest.fixture(scope="module")
def written(vit_run, tmp_path_factory):
    """One conversion by the command, into a folder of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    moefy.add_options(parser)
    folder = tmp_path_factory.mktemp("converted") / "here"
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in QUICK.items()]
    assert moefy.act(parser.parse_args([str(vit_run), *flags, "--experts", "4", "--quiet", "--output", str(folder)])) == 0
    return folder


def test_the_curve_is_what_the_loaded_model_does(vit_run, written):
    """Accuracy and cost of three settings, computed longhand on the whole test data that the limit leaves."""
    tree = json.loads((written / "moefy.json").read_text())
    model, target = clframe.load(written), open_target(str(vit_run))
    network, dense = model.network, target.model
    parts = [batch for part in target.experiences for batch in part.batches(size=7, limit=30)]
    assert tree["samples"]["test"] == sum(len(batch.targets) for batch in parts) == 60
    layers = routed_layers(network)
    assert set(layers) == {layer["name"] for layer in tree["layers"]} and len(layers) == 2
    whole = count_macs(dense, (1, 8, 8))
    ffn = 2 * 5 * 2 * 12 * 48
    assert tree["dense_macs"] == whole and tree["ffn_macs"] == ffn
    assert tree["layers"][0]["router_macs"] == 2 * (12 + 4) and tree["layers"][0]["expert_macs"] == 2 * 12 * 12
    assert tree["router_share"] == pytest.approx(2 * 16 / (2 * 12 * 48))
    for row in (tree["curve"][0], tree["curve"][len(tree["curve"]) // 2], tree["curve"][-1]):
        set_gate(network, DynamicK(tau=row["tau"]))
        with torch.no_grad(), count_usage(network) as usage:
            right = [
                (model.learner.adjust_logits(network(batch.inputs)).last.argmax(1) == batch.targets).sum() for batch in parts
            ]
        used = usage()
        spent = sum(each.total_macs for each in used.values())
        assert row["test"]["accuracy"] == pytest.approx(int(sum(right)) / 60)
        assert row["test"]["ffn_share"] == pytest.approx(spent / (60 * ffn))
        assert row["test"]["share"] == pytest.approx((spent + 60 * (whole - ffn)) / (60 * whole))
        assert row["test"]["experts"] == pytest.approx([used[name].experts_per_token for name in layers])
    assert tree["curve"][-1]["tau"] == 1.0 and tree["curve"][-1]["test"]["share"] == 1.0


def test_experts_by_class_and_experience_add_up(vit_run, written):
    """Classes and experiences divide the same samples."""
    tree = json.loads((written / "moefy.json").read_text())
    used, samples = tree["experts_per_token"], [30, 30]
    assert len(used["by_layer"]) == 2 and len(used["by_experience"]) == 2 and len(used["by_class"]) == 4
    mean = [sum(n * row[at] for n, row in zip(samples, used["by_experience"], strict=True)) / 60 for at in (0, 1)]
    assert mean == pytest.approx(used["by_layer"])
    assert sorted(used["classes"]) == [0, 1, 2, 3]
    order = clframe.load(vit_run).class_order
    assert [order.index(c) for c in used["classes"]] == [0, 1, 2, 3]
    low, high = (f(row[0] for row in used["by_class"]) for f in (min, max))
    assert low <= used["by_layer"][0] <= high and 1 <= low and high <= 4


def test_points_come_from_validation_data(written):
    tree = json.loads((written / "moefy.json").read_text())
    assert [(p["scope"], p["budget"]) for p in tree["points"]] == [
        (scope, budget) for scope in ("ffn", "model") for budget in (0.25, 0.5, 0.75)
    ]
    for point in tree["points"]:
        key = {"ffn": "ffn_share", "model": "share"}[point["scope"]]
        within = [row for row in tree["curve"] if row["validation"][key] <= point["budget"]]
        if point["test"] is None:
            assert not within and point["cheapest"] > point["budget"]
            continue
        best = max(within, key=lambda row: (row["validation"][key], row["tau"]))
        assert point["tau"] == best["tau"]
        assert point["test"] == {name: best["test"][name] for name in ("accuracy", "ffn_share", "share")}
    half = next(p for p in tree["points"] if p["scope"] == "ffn" and p["budget"] == 0.5)
    assert tree["setting"] == {"gate": "dynamic_k", "tau": half["tau"]} and tree["recipe"]["tau"] == half["tau"]
    times = {(one["tau"], one["batch"]) for one in tree["times"]}
    assert times == {(p["tau"], n) for p in tree["points"] if p["test"] for n in (1, 32)}
    assert all(one["dense"] > 0 and one["speedup"] > 0 and one["computed"] > 0 for one in tree["times"])


def test_tables_say_what_the_record_says(vit_run, written):
    tree = json.loads((written / "moefy.json").read_text())
    text = summary(tree)
    assert f"d2dmoe: {vit_run}, on memory ({tree['samples']['fit']} samples to train on" in text
    assert "their routers add 2.8 % of theirs" in text  # 2 (12 + 4) of 2 x 12 x 48
    assert "12 -> 48 -> 12  4 x 12   2.8 %" in text
    page = (written / "moefy.md").read_text()
    for row in tree["curve"]:
        test = row["test"]
        shares = " | ".join(f"{100 * test[key]:.1f} %" for key in ("accuracy", "ffn_share", "share"))
        assert f"| {row['tau']:.4g} | {shares} |" in page
    half = next(p for p in tree["points"] if p["scope"] == "ffn" and p["budget"] == 0.5)
    gain = 100 * (half["test"]["accuracy"] - tree["accuracy"]["dense"])
    assert f"| FFNs | 50 % | {half['tau']:.4g} | {100 * half['test']['accuracy']:.1f} % | {gain:+.1f} |" in page


def test_timing_stops_after_a_while():
    """At least as many pairs as asked for, whatever they take; no more than the most."""
    net = nn.Linear(2, 2).eval()
    options = {"batch": 1, "call": lambda model, x: model(x), "warmup": 1}
    assert time_pair(net, net, torch.ones(1, 2), seconds=0.0, least=3, **options).pairs == 3
    assert time_pair(net, net, torch.ones(1, 2), seconds=60.0, pairs=4, **options).pairs == 4


def test_exits_and_experts_together(written):
    found = json.loads((written / "moefy.json").read_text())["exits"]
    assert found["names"] == ["encoder.0", "final"] and set(found["curves"]) == {"both", "experts", "exits"}
    for way, stops in found["curves"].items():
        shares = [stop["share"] for stop in stops]
        assert stops and len(stops[0]["by_exit"]) == 2
        assert all(sum(stop["by_exit"]) == pytest.approx(1) for stop in stops)
        if way == "exits":
            assert all(stop["tau"] == 1.0 for stop in stops)
        if way == "experts":
            assert all(stop["by_exit"] == [0.0, 1.0] for stop in stops) and shares == sorted(shares)
    assert [point["budget"] for point in found["points"]] == [0.25, 0.5, 0.75]


def test_a_loaded_model_answers_as_the_one_in_memory(vit_run, tmp_path):
    target = open_target(str(vit_run))
    study = moefy_target(target, Options(method="moefication", expert_size=6, on="last", k=3, **QUICK))
    folder = write_conversion(study, tmp_path / "m")
    model, again = clframe.load(folder), clframe.load(folder)
    assert {type(layer.gate) for layer in routed_layers(model.network).values()} == {TopK} and study.setting == 3
    x = target.splits.test.samples[0].raw(torch.arange(20))
    prepared = model.prepare(x)
    with torch.no_grad():
        wanted = target.model(prepared).logits
        found = model.network(prepared).logits
    for one, other in zip(wanted, found, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(model.classify(x), again.classify(x)) and model.class_order == target.run.class_order
    assert all(not p.requires_grad for p in model.network.parameters())
    assert len(model.classify(x[:0])) == 0
    tree = json.loads((folder / "moefy.json").read_text())
    assert tree["options"]["router"] == "activation" and tree["options"]["strength"] == 0.0
    assert tree["setting"] == {"gate": "top_k", "k": 3.0} and tree["exits"]["curves"].keys() == {"both", "experts"}
    with pytest.raises(UnsupportedError, match="with experts; give the dense"):
        moefy_target(open_target(str(folder)), Options(**QUICK))
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert {"moefy.json", "moefy.md", "curve.csv", "config.yaml", "figures/accuracy_cost.svg",
            "figures/experts_by_class.png", "figures/experts_and_exits.png"} <= files  # fmt: skip
    rows = (folder / "curve.csv").read_text().splitlines()
    assert len(rows) == 1 + len(tree["curve"]) and rows[0].startswith("k,validation_accuracy")


def test_experts_without_training_are_written_and_loaded(vit_run, tmp_path):
    target = open_target(str(vit_run))
    options = Options(sparsify=0, router="analytical", gate="top_k", k=1, experts=4, shared=1, batch=60, limit=30)
    folder = write_conversion(moefy_target(target, options), tmp_path / "m")
    network, tree = clframe.load(folder).network, json.loads((folder / "moefy.json").read_text())
    assert tree["losses"]["routers"] == [] and tree["setting"]["k"] == 1
    assert max(point["k"] for point in tree["curve"]) == 3  # of 4 experts one is shared
    x = target.run.network.to_device(target.splits.test.samples[0].prepare(target.splits.test.samples[0].raw(torch.arange(20))))
    with torch.no_grad(), count_usage(network) as usage:
        torch.testing.assert_close(network(x).logits, target.model(x).logits)
        for name, used in usage().items():
            assert used.ran_E[0] == used.tokens and sum(used.ran_E) == 2 * used.tokens
            layer = network.get_submodule(name)
            assert used.macs.router == 3 * layer.experts.inputs and layer.experts.experts == 4


@pytest.mark.slow
def test_projections_come_before_and_count_as_what_they_were(vit_run):
    target = open_target(str(vit_run))
    dense = copy.deepcopy(target.model)
    options = Options(projections=True, projection_epochs=1, experts=3, gate="cumulative", tau=0.5, **QUICK)
    study = moefy_target(target, options)
    assert set(study.converted.accuracies) == {"dense", "projections", "sparsified"}
    assert len(study.converted.layers) == 2 * (4 + 1) and len(study.converted.distilled) == 1
    one = study.swept.test[0]
    assert set(one.dense_ffn_N.tolist()) == {2 * 5 * (2 * 12 * 48 + 4 * 12 * 12)}
    assert set(one.dense_N.tolist()) == {count_macs(dense, (1, 8, 8))}
    assert study.setting == 0.5
    assert {layer.gate for layer in study.converted.layers.values()} == {CumulativeShare(tau=0.5)}


@pytest.mark.slow
def test_same_seed_same_numbers(vit_run):
    first, second = (moefy_target(open_target(str(vit_run)), Options(**QUICK)) for _ in range(2))
    assert first.swept.values == second.swept.values
    for one, other in zip(first.swept.test, second.swept.test, strict=True):
        assert torch.equal(one.cost_KN, other.cost_KN) and torch.equal(one.confidence_KN, other.confidence_KN)


def test_data_of_a_run(vit_run, plain_vit_run):
    """Memory, last and all; what is held out where nothing was."""
    target = open_target(str(vit_run))
    kept = choose_data(target, on=None, seed=0)
    assert kept.on == "memory" and len(kept.fit) == len(target.run.learner.state["er"]["y"]) and not kept.notes
    memory = torch.cat([batch.targets for batch in kept.fit.batches()])
    assert torch.equal(memory, target.run.learner.state["er"]["y"])
    x = target.run.prepare(target.run.learner.state["er"]["x"])
    assert torch.equal(torch.cat([batch.inputs for batch in kept.fit.batches()]), x)
    last = choose_data(target, on="last", seed=0)
    assert {int(y) for batch in last.fit.batches() for y in batch.targets} == {2, 3}
    whole = choose_data(target, on="all", seed=0)
    assert len(whole.fit) == len(target.splits.fit) and "no longer a continual setting" in whole.notes[0]
    assert whole.validation is target.splits.validation
    plain = open_target(str(plain_vit_run))
    found = choose_data(plain, on=None, seed=0)
    assert found.on == "last" and "excluded from this conversion" in found.notes[0]
    count = len(plain.splits.fit.samples[-1])
    assert len(found.validation) == round(0.2 * count) and len(found.fit) + len(found.validation) == count
    rows = torch.cat([batch.inputs.flatten(1) for part in (found.fit, found.validation) for batch in part.batches()])
    own = SampleSplit(plain.splits.fit.samples[-1:], place=lambda x: x)
    wanted = torch.cat([batch.inputs.flatten(1) for batch in own.batches()])
    assert torch.allclose(rows.sum(0), wanted.sum(0), atol=1e-2) and len(rows) == len(wanted)
    with pytest.raises(ConfigError, match="no replay buffer"):
        choose_data(plain, on="memory", seed=0)
    with pytest.raises(ConfigError, match="not a run"):
        choose_data(replace(plain, run=None), on="all", seed=0)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"tau": 1.5}, "tau: found 1.5"), ({"tau": -0.1}, "tau: found -0.1"), ({"tau": float("nan")}, "tau: found nan"),
        ({"experts": 4, "expert_size": 4}, "both"), ({"method": "moe"}, "'moe'"), ({"gate": "best"}, "'best'"),
        ({"split": "x"}, "'x'"), ({"router": "x"}, "'x'"), ({"regularizer": "x"}, "'x'"), ({"schedule": "x"}, "'x'"), ({"ramp": "x"}, "'x'"),
        ({"on": "x"}, "'x'"), ({"k": 2}, "give tau"), ({"gate": "top_k", "tau": 0.5}, "give k"),
        ({"gate": "top_k", "k": 0}, "k: found 0"), ({"epochs": 0}, "epochs: found 0"), ({"lr": 0.0}, "lr: found 0.0"),
        ({"sparsify": -1}, "sparsify: found -1"), ({"strength": -1.0}, "strength: found -1.0"),
        ({"batch": 0}, "batch: found 0"), ({"limit": 0}, "limit: found 0"), ({"router_width": 0}, "router_width: found 0"),
        ({"sparsify_lr": float("inf")}, "sparsify_lr: found inf"), ({"strength": float("nan")}, "strength: found nan"),
        ({"epochs": "3"}, "moefy.epochs: found '3'"), ({"batch": 2.5}, "moefy.batch: found 2.5; give a whole number"),
        ({"projection_epochs": 5}, "moefy.projection_epochs: found 5 without projections, which has no effect; leave it out"),
        ({"projection_lr": 0.1}, "moefy.projection_lr: found 0.1 without projections"),
        ({"sparsify": 0, "strength": 0.1}, "moefy.strength: found 0.1 without fine-tuning .sparsify 0., which has no effect"),
        ({"sparsify": 0, "sparsify_lr": 0.1}, "moefy.sparsify_lr: found 0.1 without"),
        ({"sparsify": 0, "regularizer": "l1"}, "moefy.regularizer: found l1 without"),
        ({"strength": 0.0, "schedule": "linear"}, "moefy.schedule: found linear for a penalty of strength 0, which has no effect"),
        ({"method": "moefication", "ramp": "epoch"}, "moefy.ramp: found epoch for a penalty of strength 0"),
    ],
)  # fmt: skip
def test_options_out_of_range(options, found):
    with pytest.raises(ConfigError, match=found):
        Options(**options)


def test_models_that_cannot_be_converted(vit_run):
    """Each is refused before anything has changed."""
    target = open_target(str(vit_run))
    before = {name: value.clone() for name, value in target.model.state_dict().items()}

    def refused(kind, match, *, model=None, **options):
        other = target if model is None else replace(target, model=model, body_name="", run=None)
        with pytest.raises(kind, match=match):
            convert(other, Options(**{**QUICK, **options}), progress=None)

    refused(ConfigError, "found 5, no divisor of the 48 hidden neurons .* give 4 or 6", experts=5)
    refused(ConfigError, "moefy.k: found 4 of 3 routed experts; give 1 to 3", experts=4, shared=1, gate="top_k", k=4)
    refused(ConfigError, "found 100, .* give 48", expert_size=100)
    refused(ConfigError, "found 16, no divisor of the 6 hidden neurons .* give 6", experts=16, projections=True)
    refused(UnsupportedError, "meta device", model=copy.deepcopy(target.model).to("meta"))
    for dtype in (torch.bfloat16, torch.float16):
        refused(UnsupportedError, str(dtype).removeprefix("torch."), model=copy.deepcopy(target.model).to(dtype))
    diverged = copy.deepcopy(target.model)
    name, weight = list(diverged.named_parameters())[3]
    weight.view(-1)[1] = torch.nan
    refused(DivergenceError, f"not finite in {re.escape(name)}, training diverged; lower the", model=diverged)
    refused(UnsupportedError, "no feed-forward network", model=nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.ReLU()))
    now = target.model.state_dict()
    assert set(now) == set(before) and all(torch.equal(now[name], value) for name, value in before.items())
    check_model(target)
    nothing = SampleSplit([target.splits.test.samples[0].subset(torch.arange(0))], place=lambda x: x)
    with pytest.raises(DataError, match="found 0 training"):
        choose_data(replace(target, run=None, splits=DataSplits(nothing, None, nothing)), on=None, seed=0)


def test_the_record_names_model_and_data(vit_run, written):
    tree = json.loads((written / "moefy.json").read_text())["target"]
    assert tree["model"] == str(vit_run.resolve()) and tree["data"]["name"] == "digits" and tree["data"]["seed"] == 0
    assert tree["revision"] is None


@pytest.mark.slow
def test_a_dense_model_at_chance_is_noted(vit_run, caplog):
    target = open_target(str(vit_run))
    for value in target.model.heads[-1].parameters():
        value.zero_()  # always the first class
    study = moefy_target(target, Options(**QUICK))
    (note,) = [note for note in record(study)["notes"] if "most frequent" in note]
    assert note in caplog.text and "accuracy on 60 test targets" in note
    with caplog.at_level("WARNING"):
        caplog.clear()
        moefy_target(open_target(str(vit_run)), Options(**QUICK, sparsify_lr=1e-3))
    assert "most frequent" not in caplog.text


def test_folders_that_cannot_be_loaded(written, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(written, broken)
    (broken / "moefy.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"moefy\.json"):
        clframe.load(broken)
    tree = json.loads((written / "moefy.json").read_text())
    tree["recipe"]["experts"] = 6
    (broken / "moefy.json").write_text(json.dumps(tree))
    with pytest.raises(ClframeError, match="does not fit"):
        clframe.load(broken)
    with pytest.raises(RunFolderError, match=r"clframe\.load"):
        restore_model(written, nn.Linear(2, 2))
