"""The average of the weights: the formula longhand, training undisturbed, and what evaluates with it."""

from __future__ import annotations

import pytest
import torch
from capture_runs import CAPTURABLE, prepare, stream, train
from torch import nn

import clframe
from clframe.config.load import load_config
from clframe.core import COMPONENTS
from clframe.errors import ConfigError
from clframe.nn import Backbone, Network
from clframe.targets.evaluation import evaluate
from clframe.training.averaging import WeightAverage
from clframe.training.checkpoint import load_latest

TINY = [
    "backbone=small_cnn", "backbone.width=4", "benchmark.classes=4", "benchmark.experiences=2", "trainer.epochs=2",
    "trainer.progress=false", "trainer.loggers=[csv]", "trainer.figures=none",
]  # fmt: skip


def values(network):
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def longhand(average, weights, decay):
    """One update, in Python's order of operations but not torch's."""
    return {
        name: decay * average[name] + (1 - decay) * value if value.is_floating_point() else value
        for name, value in weights.items()
    }


@pytest.mark.parametrize(
    ("strategy", "recorded"),
    [
        ("naive", True),
        ("er + exits(every=1) + lwf", False),
        pytest.param("naive", False, marks=pytest.mark.slow),
        pytest.param("er + exits(every=1) + lwf", True, marks=pytest.mark.slow),
    ],
)
def test_the_average_is_that_of_the_formula_and_training_does_not_see_it(strategy, recorded):
    data = stream()
    loop, costs = prepare(strategy, data=data)
    without, _ = train(loop, costs, data, recorded=recorded)
    last = without["weights"]

    loop, costs = prepare(strategy, data=data)
    learner, seen = loop.learner, {}
    learner.average = average = WeightAverage(0.9)
    update, count = average.update, 0

    def follow(network):
        nonlocal count
        current, count = {name: value.double() for name, value in values(network).items()}, count + 1
        decay = min(0.9, count / (count + 9))
        for name, value in current.items():
            before = seen.get(name)
            if before is None or before.shape != value.shape:  # rows of new classes begin with their initial weights
                seen[name] = started[name].double()
                if before is not None:
                    seen[name][tuple(map(slice, before.shape))] = before
        seen.update(longhand(seen, current, decay))
        update(network)

    start = average.start

    def remember(network):
        started.clear()
        started.update(values(network))
        start(network)

    started = {}
    average.update, average.start = follow, remember
    found, _ = train(loop, costs, data, recorded=recorded)
    assert count == average.updates > 30
    for name, value in values(learner.network).items():  # between experiences the network has the average
        torch.testing.assert_close(value.double(), seen[name].to(torch.float64), rtol=1e-4, atol=1e-5)
    assert found["terms"] == without["terms"] or strategy != "naive"  # teachers are averages, so losses differ with lwf
    if strategy == "naive":
        learner.average.prepare(learner.network)
        assert all(map(torch.equal, loop.model.state_dict().values(), last))
        moved = [not torch.equal(value, seen[name].to(value)) for name, value in values(learner.network).items()]
        assert any(moved)


def test_decays():
    plain, rising = WeightAverage(0.75, warmup=False), WeightAverage(0.75)
    assert [plain.decay(n) for n in (1, 100)] == [0.75, 0.75]
    assert [rising.decay(n) for n in (1, 6, 27, 1000)] == [0.1, 0.4, 0.75, 0.75]


def network():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    found = Network(Backbone.of(layers, input_shape=(3,)))
    found.grow([0, 1])
    return found


def test_buffers_growth_and_changes_by_hooks():
    net, average = network(), WeightAverage(0.5, warmup=False)
    average.prepare(net)
    average.start(net)
    norm, head = net.backbone.stages[1], net.final
    with torch.no_grad():
        norm.running_mean += 2
        norm.num_batches_tracked += 3
        head.weight += 1
    raw = values(net)
    average.update(net)
    average.finish(net)
    torch.testing.assert_close(norm.running_mean, torch.full((4,), 1.0))
    assert int(norm.num_batches_tracked) == 3  # counts are not averaged
    torch.testing.assert_close(head.weight, raw["heads.0.weight"] - 0.5)
    with torch.no_grad():
        head.weight[1] = 7.0  # as a component that rescales a class
    average.settle(net)
    shown = values(net)

    average.prepare(net)  # the next experience
    assert torch.equal(head.weight[0], raw["heads.0.weight"][0]) and head.weight[1].tolist() == [7.0] * 4
    assert torch.equal(norm.running_mean, raw["backbone.stages.1.running_mean"])
    net.grow([0, 1, 2])
    with torch.no_grad():
        net.backbone.stages[0].bias.zero_()  # as a component that begins again
    average.start(net)
    with average.shown(net):
        assert torch.equal(net.final.weight[:2], shown["heads.0.weight"])
        assert net.backbone.stages[0].bias.tolist() == [0.0] * 4
        row = net.final.weight[2].clone()
    assert torch.equal(net.final.weight[2], row)
    assert torch.equal(net.final.weight[0], raw["heads.0.weight"][0])


def test_half_precision_is_averaged_in_single_precision():
    net, average = network().bfloat16(), WeightAverage(0.999, warmup=False)
    average.prepare(net)
    average.start(net)
    with torch.no_grad():
        net.final.weight += 1
    before = net.final.weight.float()
    for _ in range(300):
        average.update(net)
    state = average.state_dict(net)["average"]["heads.0.weight"]
    torch.testing.assert_close(state, before - 0.999**300, rtol=0, atol=0.01)  # in bfloat16 it would not move


@pytest.mark.parametrize("engine", ["fabric", pytest.param("trainer", marks=pytest.mark.slow)])
def test_a_run_evaluates_saves_and_predicts_with_it(engine, tmp_path):
    common = [*TINY, "strategy=naive", f"output={tmp_path}", f"trainer.engine={engine}", "trainer.eval_every=1", "optimizer.lr=0.05"]
    result = clframe.run("quickstart", [*common, "trainer.ema=0.99", "name=averaged"])
    clframe.run("quickstart", [*common, "name=plain"])
    (folder,), (plain,) = ((tmp_path / name).iterdir() for name in ("averaged", "plain"))
    content = load_latest(folder / "checkpoints", device=torch.device("cpu"))
    raw = load_latest(plain / "checkpoints", device=torch.device("cpu"))["network"]
    average, saved = content["average"], content["network"]
    assert average["updates"] == content["steps"] > 0
    # The weights that training continues from are those of a run without an average.
    assert all(torch.equal(average["raw"][name], raw[name]) for name in average["raw"])
    assert not torch.equal(saved["heads.0.weight"], average["raw"]["heads.0.weight"])
    model = clframe.load(folder)
    assert all(torch.equal(value, saved[name]) for name, value in model.network.state_dict().items())
    test = evaluate(folder)
    assert test.correct == sum(result.confusion[c][c] for c in range(4))  # of the evaluation at the end of the run


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.ema.decay=0", r"^trainer.ema.decay: found 0.0; give a number between 0 and 1 such as 0.999, or null"),
        ("trainer.ema=1.0", r"^trainer.ema.decay: found 1.0; give a number between 0 and 1"),
        ("trainer.ema.warmup=false", r"^trainer.ema.warmup: found false; set trainer.ema.decay too$"),
        ("trainer.ema.dcay=0.9", r"unknown key 'trainer.ema.dcay'; did you mean 'trainer.ema.decay'\?"),
    ],
)
def test_what_cannot_act_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config("quickstart", [override])


@pytest.mark.slow
def test_every_component_trains_with_an_average():
    data = stream(per_class=4)
    for name in CAPTURABLE:
        if COMPONENTS.get(name).name == "moe":
            continue
        loop, costs = prepare(name, data=data, epochs=1)
        loop.learner.average = WeightAverage(0.9)
        train(loop, costs, data, recorded=False)
        assert loop.learner.average.updates == int(loop.clock.train_iterations), name
        assert all(torch.isfinite(value).all() for value in loop.learner.network.parameters())
