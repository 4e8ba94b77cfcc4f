"""Activity after each experience: numbers longhand, nothing in the run changes, a resume goes on with the same."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import clframe
from clframe.build import build
from clframe.config.load import load_config
from clframe.data import Source, TensorSamples, class_incremental
from clframe.moe import RoutedExperts, TopK, set_gate, to_experts
from clframe.moe.usage import active_mask
from clframe.nn import Network
from clframe.nn.backbones import Backbone
from clframe.nn.backbones.from_transformers import bert
from clframe.sparsity.activity import ActivityRecord, ExpertActivity, LayerActivity, experience_activity
from clframe.sparsity.functional import keep
from clframe.sparsity.sites import find_ffns
from clframe.training.activity_recorder import ActivityRecorder, probe_indices

NAN = float("nan")
SMALL = ["backbone=mlp", "backbone.width=12", "trainer.epochs=1", "trainer.progress=false", "benchmark.experiences=3",
         "trainer.loggers=[csv]"]  # fmt: skip


@pytest.fixture(scope="module")
def benchmark():
    return build(load_config("quickstart", SMALL)).benchmark


def network(benchmark, seed=0):
    torch.manual_seed(seed)
    made = build(load_config("quickstart", [*SMALL, f"seed={seed}"])).network
    made.grow(range(10))
    return made


def hidden(made, benchmark, experience):
    """active_TN of the first layer, longhand."""
    samples = benchmark.evaluation[experience]
    x = samples.prepare(samples.raw(torch.arange(len(samples))))
    return active_mask(made.backbone.stages[0](x)).double()


def test_record_against_longhand(benchmark):
    watch = ActivityRecorder(benchmark)
    before, after = network(benchmark, seed=1), network(benchmark, seed=2)
    first = watch.record(before, 0)
    second = watch.record(after, 1)
    sizes = tuple(len(samples) for samples in benchmark.evaluation)
    assert first.samples_E == sizes[:1]
    assert second.samples_E == sizes[:2]
    assert list(second.layers) == ["stages.0", "stages.1"]
    layer = second.layers["stages.0"]
    then_N = hidden(before, benchmark, 0).mean(0)
    now_EN = torch.stack([hidden(after, benchmark, experience).mean(0) for experience in (0, 1)])
    assert layer.neurons == 12
    assert layer.sparsity_E == pytest.approx((1 - now_EN.mean(1)).tolist(), abs=1e-4)
    assert layer.sparsity == pytest.approx(float(1 - now_EN.mean()), abs=1e-4)
    shared = float(now_EN.min(0).values.sum() / now_EN.max(0).values.sum())
    assert layer.overlap_E == (pytest.approx(shared, abs=1e-4), 1.0)
    kept = float(torch.minimum(then_N, now_EN[0]).sum() / torch.maximum(then_N, now_EN[0]).sum())
    assert layer.kept_E == (pytest.approx(kept, abs=1e-4), 1.0)
    assert 0.05 < kept < 0.95
    assert first.layers["stages.0"].overlap_E == first.layers["stages.0"].kept_E == (1.0,)


def test_padding_of_texts_does_not_count():
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids = torch.tensor([[3, 4, 5, 0, 0, 0], [6, 0, 0, 0, 0, 0], [7, 8, 3, 2, 5, 9], [4, 4, 0, 0, 0, 0]])
    data = TensorSamples(ids, torch.tensor([0, 0, 1, 1]))
    stream = class_incremental(Source("texts", data, data, classes=2), experiences=2, order="sorted")
    made = Network(bert((6,), vocabulary=12, width=8, depth=1, heads=2)).eval()
    made.grow(range(2))
    hidden: list[torch.Tensor] = []
    (ffn,) = find_ffns(made.backbone)
    hook = ffn.down.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0].detach()))
    made(ids)
    hook.remove()
    record = ActivityRecorder(stream).record(made, 1)
    (layer,) = record.layers.values()
    expected = [active_mask(hidden[0][rows][ids[rows] != 0]).double().mean().item() for rows in ([0, 1], [2, 3])]
    assert layer.sparsity_E == pytest.approx([1 - share for share in expected], abs=1e-4)
    found = experience_activity(made, stream.test, value=0.9)
    for rows, one in zip(([0, 1], [2, 3]), found, strict=True):
        kept = keep(hidden[0][rows][ids[rows] != 0], 0.9, kind="top_p").double().mean(0)
        assert torch.allclose(*(rate for rate in (kept, *one.active.values())))


def test_nothing_moves(benchmark):
    made = network(benchmark)
    made.train()
    made.backbone.stages[0].eval()  # each part has its own mode
    modes = [part.training for part in made.modules()]
    weights = {name: value.clone() for name, value in made.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    ActivityRecorder(benchmark).record(made, 2)
    assert [part.training for part in made.modules()] == modes
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()
    assert all(torch.equal(value, weights[name]) for name, value in made.state_dict().items())


def test_experts_are_counted_layer_by_layer(benchmark):
    torch.manual_seed(0)
    ffn = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    made = Network(Backbone.of([("flat", nn.Flatten()), ("ffn", ffn)], input_shape=(1, 8, 8)))
    made.grow(range(10))
    to_experts(made, experts=4, split="random")
    (name,) = [name for name, part in made.named_modules() if isinstance(part, RoutedExperts)]
    watch = ActivityRecorder(benchmark)
    set_gate(made, TopK(k=3))
    record = watch.record(made, 1)
    experts = record.experts[name]
    assert (experts.experts, experts.per_token, experts.per_token_E) == (4, 3.0, (3.0, 3.0))
    layer = made.get_submodule(name)
    assert experts.macs_share == pytest.approx((3 * layer.macs().expert + layer.macs().router) / layer.macs().dense, abs=1e-4)
    assert experts.unused in (0, 1)
    assert layer.ran is None


def test_a_network_without_hidden_neurons_has_none(benchmark):
    made = Network(Backbone.of([("flat", nn.Flatten())], input_shape=(1, 8, 8)))
    made.grow(range(10))
    record = ActivityRecorder(benchmark).record(made, 0)
    assert (record.layers, record.experts) == ({}, {})
    assert math.isnan(record.sparsity)
    assert math.isnan(record.experts_per_token)
    assert (record.overlap_E, record.kept_E) == ((), ())


def test_a_layer_that_was_another_one_keeps_nothing_defined(benchmark):
    watch = ActivityRecorder(benchmark)
    watch.record(network(benchmark), 0)
    wide = build(load_config("quickstart", [*SMALL, "backbone.width=13"])).network
    record = watch.record(wide, 1)
    assert math.isnan(record.layers["stages.0"].kept_E[0])
    assert record.layers["stages.0"].kept_E[1] == 1.0
    assert math.isnan(record.layers["stages.0"].kept)


@pytest.mark.parametrize(("samples", "experiences", "count"), [
    (1, 1, 1), (255, 2, 255), (256, 2, 256), (10_000, 8, 256), (10_000, 9, 227), (10_000, 20, 102), (10_000, 5000, 1), (0, 3, 0),
])  # fmt: skip
def test_probes_are_few_and_spread(samples, experiences, count):
    at = probe_indices(samples, experiences=experiences)
    assert len(at) == len(at.unique()) == count
    assert count * min(experiences, 2048) <= 2048 + 256
    if count > 1:
        steps = at.diff()
        assert int(at[0]) == 0
        assert int(steps.max()) - int(steps.min()) <= 1
        assert int(at[-1]) + int(steps.max()) >= samples - 1


def test_means_leave_out_what_is_undefined():
    def layer(sparsity, overlap_E, kept_E):
        return LayerActivity(neurons=3, sparsity=sparsity, sparsity_E=(sparsity,) * len(kept_E), overlap_E=overlap_E, kept_E=kept_E)

    record = ActivityRecord(
        samples_E=(4, 4, 4),
        layers={"a": layer(0.5, (0.25, 0.75, 1.0), (NAN, 0.5, 1.0)), "b": layer(0.25, (0.75, 0.25, 1.0), (0.5, 0.25, 1.0))},
        experts={"c": ExpertActivity(experts=4, per_token=1.5, per_token_E=(1.0, 1.5, 2.0), unused=1, macs_share=0.5)},
    )  # fmt: skip
    assert (record.sparsity, record.experts_per_token) == (0.375, 1.5)
    assert record.overlap_E == (0.5, 0.5, 1.0)
    assert record.kept_E == (0.5, 0.375, 1.0)
    assert (record.layers["a"].overlap, record.layers["a"].kept) == (0.5, 0.5)
    again = ActivityRecord.of(json.loads(json.dumps(dataclasses.asdict(record))))
    assert [list(value.overlap_E) for value in again.layers.values()] == [[0.25, 0.75, 1.0], [0.75, 0.25, 1.0]]
    assert ActivityRecord.of(dataclasses.asdict(ActivityRecord())) == ActivityRecord()


def test_a_run_is_the_same_with_and_without_the_watch(tmp_path, monkeypatch):
    overrides = [*SMALL, "strategy=er(memory=20)", "backbone.width=13", "trainer.record_activity=true"]
    with_watch = clframe.run("quickstart", overrides, output=tmp_path / "with")
    monkeypatch.setattr(ActivityRecorder, "record", lambda self, network, index: ActivityRecord())
    without = clframe.run("quickstart", overrides, output=tmp_path / "without")
    assert with_watch.accuracy_matrix == without.accuracy_matrix
    assert with_watch.loss_terms == without.loss_terms
    checkpoints = [
        torch.load(f"{result.run_folder}/checkpoints/experience_003.ckpt", weights_only=True)["network"]
        for result in (with_watch, without)
    ]
    assert all(torch.equal(value, checkpoints[1][name]) for name, value in checkpoints[0].items())
    assert len(with_watch.activity) == 3
    assert all(len(record.layers) == 2 for record in with_watch.activity)
    assert clframe.Result.from_json(f"{with_watch.run_folder}/results.json").activity == with_watch.activity


@pytest.mark.parametrize(("strategy", "option", "recorded"), [
    ("naive", "null", False), ("naive", "true", True), ("sparsity", "null", True), ("sparsity", "false", False),
])  # fmt: skip
def test_activity_is_recorded_where_a_component_changes_it_or_the_config_asks(strategy, option, recorded, tmp_path):
    overrides = [*SMALL, f"strategy={strategy}", f"trainer.record_activity={option}", "benchmark.experiences=2",
                 "trainer.loggers=[tensorboard]"]  # fmt: skip
    result = clframe.run("quickstart", overrides, output=tmp_path)
    found = clframe.Result.from_json(f"{result.run_folder}/results.json")
    assert len(found.activity) == (2 if recorded else 0)
    totals = json.loads((Path(result.run_folder) / "ledger.json").read_text())["totals"]
    assert ("activity" in totals["seconds"]) == recorded
    assert "exits" in totals["seconds"]
    tags = EventAccumulator(f"{result.run_folder}/tensorboard").Reload().Tags()["scalars"]
    assert ("1_progress/sparsity" in tags) == ("final/sparsity" in tags) == recorded
