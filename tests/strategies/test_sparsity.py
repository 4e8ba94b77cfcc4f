"""The component sparsity: its term, schedules, what it does to a run, and what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import clframe
from clframe.core import compose
from clframe.data import Source, TensorSamples, class_incremental
from clframe.errors import ConfigError, UnsupportedError
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.sparsity import experience_activity
from clframe.sparsity.functional import displacement, hoyer, l1
from clframe.training.learner import Learner
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy
from strategies import ER, Sparsity


def run_of(component, backbone="mlp", exits=0, **options):
    torch.manual_seed(0)
    net = BACKBONES.get(backbone)((1, 8, 8), **options)
    network = Network(net, exits=[(net.names[0], GrowingLinear(net.tap_shapes[net.names[0]][0])) for _ in range(exits)])
    run = Learner(network, compose(component), seed=0)
    network.grow([0, 1, 2, 3])
    return run


def term_of(component, step):
    """The penalty at a step, whose values the learner fills in."""
    values = component.step_values(step.context, step.number, {})
    return component.losses(replace(step, values=values), {})["penalty"]


@pytest.mark.parametrize("exits", [0, 2])
@pytest.mark.parametrize("regularizer, measure", [("hoyer", hoyer), ("l1", l1)])
def test_the_term_is_the_mean_over_layers_whatever_the_exits(on_digits, exits, regularizer, measure):
    component = Sparsity(strength=0.3, regularizer=regularizer)
    run = run_of(component, exits=exits, width=9)
    step = on_digits.step(run, [2, 3, 2])
    hidden = step.batch.x
    values = []
    for stage in run.network.backbone.stages:
        hidden = stage(hidden)
        values.append(measure(hidden))
    term = term_of(component, step)
    assert term.shape == () and term.item() == pytest.approx(0.3 * (values[0] + values[1]).item() / 2, rel=1e-5)
    term.backward()
    assert all(p.grad.abs().sum() > 0 for p in run.network.backbone.parameters())


def test_layers_have_their_own_weights_and_names(on_digits):
    component = Sparsity(strength=1.0, layers=(0.0, 3.0))
    run = run_of(component)
    step = on_digits.step(run, [2, 3])
    second = hoyer(run.network.backbone(step.batch.x))
    assert term_of(component, step).item() == pytest.approx(1.5 * second.item(), rel=1e-5)
    with pytest.raises(ConfigError, match=r"layers: found 1 weights for 2 layers \(stages.0, stages.1\)"):
        run_of(Sparsity(layers=(1.0,)))


@pytest.mark.parametrize(
    "schedule, shares", [("constant", [1, 1, 1, 1]), ("linear", [0.25, 0.5, 0.75, 1]), ("warmup", [0.5, 1, 1, 1])]
)
def test_schedules_over_the_epochs_of_an_experience(on_digits, schedule, shares):
    component = Sparsity(schedule=schedule)
    step = on_digits.step(run_of(component), [2, 3])
    values = []
    for epoch in range(4):
        now = replace(step, context=replace(step.context, epoch=epoch, epochs=4))
        values.append(term_of(component, now).item())
    assert [value / values[-1] for value in values] == pytest.approx(shares, rel=1e-6)


@pytest.mark.parametrize("regularizer, measure", [("displaced", hoyer), ("displaced_l1", l1)])
def test_a_transformer_that_keeps_gelu(on_digits, regularizer, measure):
    component = Sparsity(strength=1.0, regularizer=regularizer, by=-0.5)
    run = run_of(component, "vit_tiny", depth=1, width=8, heads=2)
    step = on_digits.step(run, [2, 3])
    embed, layer, _ = run.network.backbone.stages
    seen = []
    layer.mlp[0].register_forward_hook(lambda m, i, o: seen.append(o))
    layer(embed(step.batch.x))
    expected = measure(displacement(seen[0], by=-0.5))
    assert term_of(component, step).item() == pytest.approx(expected.item(), rel=1e-5)


def test_relu_is_swapped_in_for_good():
    run = run_of(Sparsity(relu=True), "vit_tiny", depth=2, width=8, heads=2)
    kinds = [type(part) for part in run.network.modules()]
    assert nn.GELU not in kinds and kinds.count(nn.ReLU) == 2
    assert list(run.network.backbone.state_dict()) == list(BACKBONES.get("vit_tiny")((1, 8, 8), depth=2, width=8, heads=2).state_dict())


def test_the_network_can_be_copied_in_the_middle_of_a_step(on_digits):
    run = run_of(Sparsity())
    step = on_digits.step(run, [2, 3])
    twin = copy.deepcopy(run.network)
    assert torch.equal(twin(step.batch.x).taps["sparsity"], step.output.taps["sparsity"])


@pytest.mark.parametrize("backbone", ["mlp", "small_cnn"])
def test_fewer_neurons_fire_on_digits_and_it_still_learns(on_digits, backbone):
    sparsities, accuracies = [], []
    for parts in ([ER(memory=60)], [ER(memory=60), Sparsity(strength=0.03)]):
        width = 64 if backbone == "mlp" else 8
        run = on_digits.learn(on_digits.learner(*parts, backbone=backbone, width=width), epochs=8)
        data = [on_digits.samples(group, 20, part="test") for group in on_digits.groups]
        layers = [one.sparsity for one in experience_activity(run.network, data, value=1.0)]
        sparsities.append(sum(sum(one.values()) / len(one) for one in layers) / len(layers))
        accuracies.append(on_digits.accuracy(run, range(6))[-1])
    assert sparsities[1] > sparsities[0] + 0.05
    assert accuracies[1] > accuracies[0] - 0.1


@pytest.mark.slow  # tests/training/test_resume_inside.py stops one with exits at three places
def test_a_run_broken_off_ends_as_one_that_was_not(tmp_path):
    options = ["backbone=mlp", "trainer.epochs=1", "strategy=er + lwf + sparsity", "trainer.progress=false"]
    whole = clframe.run("quickstart", options, output=tmp_path)
    (folder,) = (path.parent for path in tmp_path.rglob("results.json"))
    for path in sorted((folder / "checkpoints").iterdir())[-1:]:
        path.unlink()
    (folder / "results.json").unlink()
    assert clframe.run(resume=folder).accuracy_matrix == whole.accuracy_matrix


def test_mixed_precision_keeps_the_term(tmp_path):
    options = ["backbone=mlp", "trainer.epochs=1", "strategy=sparsity", "trainer.progress=false"]
    result = clframe.run("quickstart", [*options, "trainer.precision=bf16-mixed"], output=tmp_path)
    assert result.accuracy_matrix[0][0] > 0.6  # the output is converted on its way, and the term with it


@pytest.mark.parametrize("options, found", [({"strength": -1.0}, "-1.0"), ({"by": 0.0}, "0.0"), ({"layers": (1.0, -1.0)}, r"\(1.0, -1.0\)")])
def test_options_out_of_range_are_refused(options, found):
    with pytest.raises(ConfigError, match=rf"components\.sparsity\.{next(iter(options))}: found {found}"):
        Sparsity(**options)


@pytest.mark.parametrize("backbone", ["mlp", "small_cnn"])
def test_displaced_needs_pre_activations(backbone):
    with pytest.raises(UnsupportedError, match="found displaced with 'stages.0.*which does not keep its pre-activations"):
        run_of(Sparsity(regularizer="displaced"), backbone)


@pytest.mark.parametrize(
    "schedule, shares", [("constant", [1, 1, 1, 1]), ("linear", [0, 0.25, 0.5, 0.75]), ("warmup", [0, 0.5, 1, 1])]
)
def test_a_ramp_per_step_starts_at_zero_and_rises_with_every_batch(on_digits, schedule, shares):
    component = Sparsity(schedule=schedule, ramp="step")
    step = on_digits.step(run_of(component), [2, 3])
    whole = term_of(Sparsity(), step).item()
    values = []
    for epoch in range(2):
        for number in range(2):
            now = replace(step, number=number, context=replace(step.context, epoch=epoch, epochs=2, steps=2))
            values.append(term_of(component, now).item())
    assert [value / whole for value in values] == pytest.approx(shares, rel=1e-6)


@pytest.mark.parametrize("engine", ["fabric", "trainer"])
def test_the_engine_counts_the_batches_of_every_epoch(engine):
    seen = []

    class Spy(Sparsity):
        def losses(self, step, state):
            seen.append((step.context.epoch, step.number, step.context.steps))
            return super().losses(step, state)

    y = torch.arange(2).repeat(10)
    data = TensorSamples(torch.randn(20, 1, 8, 8), y)
    benchmark = class_incremental(Source("noise", data, data, classes=2), experiences=1, order="sorted")
    torch.manual_seed(0)
    network = Network(BACKBONES.get("mlp")((1, 8, 8), width=5))
    module = ContinualModule(network, Spy(ramp="step"), optimizer=partial(torch.optim.SGD, lr=0.05), seed=0)
    options = {"engine": "trainer"} if engine == "trainer" else {}
    loop = LightningStrategy(model=module, benchmark=benchmark, train_mb_size=8, train_epochs=2, evaluator=None, **options)
    loop.train(benchmark.avalanche.train_stream[0])
    assert seen == [(epoch, number, 3) for epoch in range(2) for number in range(3)]


def test_a_loader_without_a_length_is_refused_by_a_ramp_per_step(on_digits):
    component = Sparsity(schedule="linear", ramp="step")
    step = on_digits.step(run_of(component), [2, 3])
    with pytest.raises(UnsupportedError, match=r"components\.sparsity\.ramp: found step, but the loader"):
        term_of(component, step)
