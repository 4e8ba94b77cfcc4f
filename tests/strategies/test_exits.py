"""Exits as a component: where they go, what their losses weigh, and what they must leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import clframe
from clframe.core import Experience, Step, StepContext, compose
from clframe.data import TensorSamples
from clframe.errors import ConfigError, UnknownNameError, UnsupportedError
from clframe.functional.losses import cross_entropy
from clframe.nn import BACKBONES, Backbone, Network
from clframe.nn.types import Output
from clframe.seeding import generator_for
from clframe.training.learner import Learner
from strategies import ER, Exits

FAST = ["backbone=mlp", "backbone.width=12", "backbone.depth=3", "trainer.epochs=2", "trainer.progress=false",
        "trainer.loggers=[]", "benchmark.experiences=3"]  # fmt: skip


def network(*, depth=3, width=6, classes=4, seed=0):
    torch.manual_seed(seed)
    return Network(BACKBONES.get("mlp")((5,), width=width, depth=depth))


def edited(component, net=None, *, classes=4):
    net = network() if net is None else net
    component.setup_network(net)
    net.grow(range(classes))
    return net


def context(epoch=0, epochs=5, *, held_out=()):
    samples = TensorSamples(torch.randn(12, 5), torch.arange(12) % 4)
    experience = Experience(0, 3, (0, 1, 2, 3), (), (), samples, held_out)
    return StepContext(experience, epoch, epochs, generator_for(0, epoch))


def run(tmp_path, strategy, *more, seed=1):
    return clframe.run("quickstart", [*FAST, f"strategy={strategy}", f"seed={seed}", *more], output=tmp_path)


def final_weights(result):
    model = clframe.load(result.run_folder)
    return {n: t for n, t in model.network.state_dict().items() if n.startswith("backbone")} | {
        f"final.{n}": t for n, t in model.network.final.state_dict().items()
    }


# --- places -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ("layer1", "layer2", "final")),
        ({"at": ("layer2",)}, ("layer2", "final")),
        ({"every": 2}, ("layer2", "final")),
        ({"at_cost": (0.3,)}, ("layer1", "final")),
        ({"at": ("layer1", "layer1")}, ("layer1", "layer1#2", "final")),
    ],
)
def test_exits_sit_where_they_are_asked_for(options, names):
    assert edited(Exits(**options)).exit_names == names


def test_the_papers_places_and_weights_are_the_default_where_there_are_some():
    net = Network(BACKBONES.get("resnet32")((3, 32, 32)))
    exits = Exits()
    exits.setup_network(net)
    assert net.exit_names[:-1] == ("layer1.2", "layer1.4", "layer2.1", "layer2.3", "layer3.0", "layer3.2")
    assert exits.init_state(net)["weights"] == (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
    for name, count in (("vgg19", 10), ("wrn16_2", 5)):
        other = Network(BACKBONES.get(name)((3, 32, 32)))
        Exits().setup_network(other)
        assert len(other.heads) == count + 1, name


def test_parameters_and_the_control_of_resnet32():
    sizes = {}
    for control in ("none", "last"):
        net = Network(BACKBONES.get("resnet32")((3, 32, 32)))
        Exits(control=control).setup_network(net)
        for t in range(10):
            net.grow(range(10 * t, 10 * t + 10))
        sizes[control] = sum(p.numel() for p in net.parameters())
        if control == "last":
            assert set(net.exit_taps[:-1]) == {"layer3.4"}
    assert sizes["none"] == 1_907_016
    assert sizes["last"] == sizes["none"] - 60  # the scalars of SDN pooling


@pytest.mark.parametrize(("name", "shape", "corrected", "published"), [
    ("resnet18", (3, 224, 224), 24_233_272, 24_591_672),
    ("wrn16_2", (3, 32, 32), 3_366_234, 1_369_434),
    pytest.param("vgg19", (3, 32, 32), 41_632_722, 41_632_722, marks=pytest.mark.slow),
])  # fmt: skip
def test_parameters_of_the_published_heads(name, shape, corrected, published):
    """100 classes in 10 experiences, counted in the authors' networks."""
    for as_published, expected in ((False, corrected), (True, published)):
        net = Network(BACKBONES.get(name)(shape))
        Exits(as_published=as_published).setup_network(net)
        for t in range(10):
            net.grow(range(10 * t, 10 * t + 10))
        assert sum(p.numel() for p in net.parameters()) == expected


def test_exits_are_never_put_on_a_trained_network():
    net = edited(Exits())
    with pytest.raises(UnsupportedError, match=r"^components\.exits: found a network that has learned 4 classes"):
        Exits().setup_network(net)


def test_places_by_time_become_names_that_a_config_keeps(tmp_path):
    result = run(tmp_path, "exits", "components.exits.at_latency=[0.5]", "trainer.epochs=1")
    config = clframe.load_config(f"{result.run_folder}/config.yaml")
    kept = config.components["exits"]
    assert list(kept["at"]) == list(result.exit_names[:-1]) and len(kept["at"]) == 1
    assert list(kept["at_latency"]) == [] and list(kept["values"]) == [0.5]


# --- weights ------------------------------------------------------------------------------------------


def test_the_ramp_starts_over_in_every_experience_and_one_epoch_works():
    exits = Exits(values=(0.2, 0.6))
    state = exits.init_state(edited(exits))
    assert exits.exit_loss_weights(context(0, 5), state) == pytest.approx((0.01, 0.01, 1.0))
    assert exits.exit_loss_weights(context(2, 5), state) == pytest.approx((0.01 + 0.5 * 0.19, 0.01 + 0.5 * 0.59, 1.0))
    assert exits.exit_loss_weights(context(4, 5), state) == (0.2, 0.6, 1.0)
    assert exits.exit_loss_weights(context(0, 1), state) == (0.2, 0.6, 1.0)
    assert Exits(values=(0.2, 0.6), weights="constant", scale=0.5).exit_loss_weights(context(0, 5), state) == (0.1, 0.3, 1.0)


def test_regimes_weigh_their_phases():
    state = {"weights": (0.2, 0.6)}
    mixed, disjoint = Exits(regime="mixed"), Exits(regime="disjoint", trunk_share=0.4)
    assert mixed.exit_loss_weights(context(1, 6), state) == (0.0, 0.0, 1.0)
    assert mixed.exit_loss_weights(context(3, 6), state) == pytest.approx((0.01, 0.01, 1.0))  # its ramp begins with it
    assert mixed.exit_loss_weights(context(5, 6), state) == (0.2, 0.6, 1.0)
    assert [disjoint.exit_loss_weights(context(e, 5), state) for e in (1, 2)] == [(0.0, 0.0, 1.0), (1.0, 1.0, 0.0)]
    for share, trunk in ((0.1, 1), (0.9, 3)):  # rounded to 0 and 4 of 4 epochs, but each phase has at least one
        rounded = Exits(regime="disjoint", trunk_share=share)
        weights = [rounded.exit_loss_weights(context(e, 4), state) for e in range(4)]
        assert weights == [(0.0, 0.0, 1.0)] * trunk + [(1.0, 1.0, 0.0)] * (4 - trunk)
    assert Exits(regime="disjoint").exit_loss_weights(context(1, 2), state) == (1.0, 1.0, 0.0)
    with pytest.raises(ConfigError, match=r"^components\.exits\.regime: found mixed with 1 epoch an experience"):
        mixed.exit_loss_weights(context(0, 1), state)


def test_every_term_of_the_loss_is_weighed_exit_by_exit():
    net = network()
    learner = Learner(net, compose(Exits(values=(0.25, 0.5), weights="constant")), seed=0)
    now = context(0, 1)
    learner.begin(now.experience, classes=(0, 1, 2, 3), epochs=1)
    learner.before_epoch(0)
    x, y = torch.randn(7, 5), torch.arange(7) % 4
    output = net(x)
    loss = learner.loss(learner.make_batch(x, y), output)
    one, two, last = cross_entropy(output.logits, y)
    assert loss.item() == pytest.approx((0.25 * one + 0.5 * two + last).item(), rel=1e-6)
    assert learner.flush_terms()["loss/task/ce"] == pytest.approx(loss.item(), rel=1e-6)


def test_distillation_from_the_last_exit_reaches_the_others_only():
    net = edited(Exits(distill=0.5, temperature=2.0))
    output = Output(tuple(torch.randn(3, 4, requires_grad=True) for _ in range(3)))
    step = Step(None, output, context(), net)
    term = Exits(distill=0.5, temperature=2.0).losses(step, {})["distill"]
    assert term.shape == (3,) and term[-1] == 0 and (term[:2] > 0).all()
    teacher = (output.logits[-1] / 2).softmax(1)
    longhand = 0.5 * 4 * (teacher * (teacher.log() - (output.logits[0] / 2).log_softmax(1))).sum(1).mean()
    assert term[0].item() == pytest.approx(longhand.item(), rel=1e-5)
    term.sum().backward()
    assert output.logits[-1].grad is None and output.logits[0].grad.abs().sum() > 0


# --- gradients ----------------------------------------------------------------------------------------


def pulls(gradient, exits=3):
    """Gradient of each exit's loss at the input of a trunk of identities."""
    stages = [(f"s{i}", nn.Identity(), (4,)) for i in range(exits)]
    net = Network(Backbone(stages, input_shape=(4,)))
    Exits(at=tuple(f"s{i}" for i in range(exits - 1)), head="linear", heads="growing", gradient=gradient).setup_network(net)
    net.grow(range(2))
    for head in net.heads:  # every exit the same function: only the branches can make a difference
        linear = next(part for part in head.modules() if hasattr(part, "weight") and part.weight.ndim == 2)
        with torch.no_grad():
            linear.weight.fill_(1.0)
    found = []
    for k in range(exits):
        x = torch.ones(1, 4, requires_grad=True)
        net(x).logits[k].sum().backward()
        found.append(0.0 if x.grad is None else x.grad.sum().item())
    return found


def test_gradients_go_through_stop_or_pull_alike():
    full = pulls("through")
    assert full == [full[0]] * 3 and full[0] != 0
    assert pulls("detached") == [0.0, 0.0, full[0]]
    assert pulls("equilibrium") == pytest.approx([full[0] / 3] * 3)  # 1/3; 2/3 * 1/2; 2/3 * 1/2 * 1


def test_linear_probes_leave_the_run_as_it_is_without_exits_bit_for_bit(tmp_path):
    plain = run(tmp_path, "er")
    probed = run(tmp_path, "er + exits", "components.exits.gradient=detached")
    assert len(probed.exit_names) == 3
    assert probed.accuracy_matrix == plain.accuracy_matrix
    ours, theirs = final_weights(probed), final_weights(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(not torch.equal(a, b) for a, b in zip(
        final_weights(run(tmp_path, "er + exits")).values(), theirs.values(), strict=True))  # fmt: skip


def test_scale_zero_removes_the_exits():
    assert str(ER() + Exits(scale=0)) == "er"


# --- regimes ------------------------------------------------------------------------------------------


class Noted(nn.Sequential):
    """A trunk with batch normalization, whose statistics move in every training pass."""


def trained(regime):
    torch.manual_seed(0)
    stages = [("one", Noted(nn.Linear(5, 6), nn.BatchNorm1d(6)), (6,)), ("two", nn.Linear(6, 6), (6,))]
    net = Network(Backbone(stages, input_shape=(5,)))
    learner = Learner(net, compose(Exits(regime=regime)), seed=0)
    now = context()
    learner.begin(now.experience, classes=(0, 1, 2, 3), epochs=2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    kept = []
    for epoch in range(2):
        net.train()
        learner.before_epoch(epoch)
        for _ in range(3):
            optimizer.zero_grad()
            batch = learner.make_batch(torch.randn(6, 5), torch.arange(6) % 4)
            learner.loss(batch, net(batch.x)).backward()
            optimizer.step()
        kept.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
    learner.end()
    assert all(parameter.requires_grad for parameter in net.parameters())
    return kept


def moved(one, other):
    """Which parts differ: trunk, exit or final."""
    kinds = {"backbone": "trunk", "heads.0": "exit", "heads.1": "final"}
    names = [name for name in one if not torch.equal(one[name], other[name])]
    return {kind for name in names for prefix, kind in kinds.items() if name.startswith(prefix)}


def test_the_first_phase_freezes_all_added_exits():
    exits = Exits(regime="disjoint")
    net = edited(exits)
    assert len(net.heads) == 3
    for epoch in range(2):
        exits.before_epoch(net, context(epoch, 2), exits.init_state(net))
        assert {p.requires_grad for head in net.heads[:-1] for p in head.parameters()} == {epoch == 1}


def test_disjoint_holds_the_trunk_and_its_statistics_still():
    first, second = trained("disjoint")
    assert moved(first, second) == {"exit"}


def test_mixed_trains_the_trunk_first_and_then_everything():
    first, second = trained("mixed")
    assert moved(first, second) == {"trunk", "exit", "final"}
    alone, _ = trained("disjoint")
    assert moved(first, alone) == set()  # the first phase is the same


# --- ensembles ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_geometric_ensemble_is_fitted_on_data_held_out(tmp_path):
    with pytest.raises(ConfigError, match=r"fit_on: found 'validation' .*held-out data; set benchmark.validation=0.1"):
        run(tmp_path, "exits(ensemble='geometric')")
    result = run(tmp_path, "er + exits", "components.exits={ensemble: geometric, fit_epochs: 3}",
                 "benchmark.validation=0.2")  # fmt: skip
    ensemble = clframe.load(result.run_folder).network.ensemble
    assert ensemble.classes == 10
    assert any(parameter.abs().max() > 0 for parameter in ensemble.parameters())
    own = run(tmp_path, "exits(ensemble='geometric', fit_on='training', fit_epochs=1)")
    assert own.exit_names == ("layer1", "layer2", "final")


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain"), "exits", "trainer.epochs=1")


@pytest.mark.parametrize("ensemble", ["product", "mean", "boosted"])
def test_the_other_ensembles_run(ensemble, one_epoch, tmp_path):
    result = run(tmp_path, f"exits(ensemble='{ensemble}')", "trainer.epochs=1")
    record = result.exits[-1]
    assert len(record.accuracy_K) == 3
    assert record.static["last"] == record.accuracy_K[-1]
    if ensemble != "boosted":  # the backbone's own classifier stays out of these
        assert result.accuracy_matrix == one_epoch.accuracy_matrix


# --- heads and bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["head='hidden', hidden=7", "cascade=True, cascade_norm=True", "heads='growing'"])
def test_heads_of_every_kind_train(options, tmp_path):
    result = run(tmp_path, f"er + exits({options})", "trainer.epochs=1")
    assert result.loss_terms[-1]["loss/task/ce"] > 0 and len(result.exit_names) == 3


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"every": 1, "at_cost": (0.5,)}, r"components\.exits\.every: found together with at_cost; use one of them"),
        ({"trunk_share": 1.0}, r"components\.exits\.trunk_share: found 1\.0; give a share between 0 and 1"),
        ({"values": (0.1, -1.0)}, r"components\.exits\.values: found"),
        ({"cascade_norm": True}, r"components\.exits\.cascade_norm: found true without a cascade"),
        ({"control": "last", "cascade": True}, r"components\.exits\.control: found last with a cascade"),
        ({"distill": -1.0}, r"components\.exits\.distill: found -1\.0"),
    ],
)
def test_options_that_cannot_be_are_one_line(options, error):
    with pytest.raises(ConfigError, match=rf"^{error}"):
        Exits(**options)


def test_taps_and_heads_that_do_not_fit_are_named():
    with pytest.raises(UnknownNameError, match=r"unknown tap 'layer9'; did you mean"):
        edited(Exits(at=("layer9",)))
    with pytest.raises(ConfigError, match=r"exits\.head: found 'pool' for a tap of shape \(6,\); use linear"):
        edited(Exits(head="pool"))
    with pytest.raises(ConfigError, match=r"found 3 weights for 2 exits"):
        edited(Exits(values=(0.1, 0.2, 0.3)))


@pytest.mark.parametrize("calibration", ["temperature", "vector", "isotonic"])
def test_a_calibrated_run_loads_and_stops_early_with_the_same_scores(tmp_path, calibration):
    """Evaluation, the loaded model and dynamic inference apply one calibration."""
    import clframe

    options = ["backbone=mlp", "trainer.epochs=1", "benchmark.experiences=2", "benchmark.validation=0.2", "trainer.progress=false",
               "benchmark.classes=6", "trainer.loggers=[]"]  # fmt: skip
    strategy = f"strategy=er + exits(calibration='{calibration}', ensemble='mean') + early_exit(threshold=0.6)"
    result = clframe.run("quickstart", [*options, strategy], output=tmp_path)
    model = clframe.load(result.run_folder)
    ensemble = model.network.ensemble
    assert bool(ensemble.fitted) and ensemble.kind == calibration
    x = clframe.data.digits().test.x[:60]
    whole, early = model.outputs(x), model.dynamic()(model.prepare(x))
    picked = torch.stack(whole.logits)[early.exit_B, torch.arange(60)]
    torch.testing.assert_close(early.scores_BC, picked, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.ids(early.scores_BC), model.classify(x))
    again = clframe.load(result.run_folder).outputs(x)
    assert all(torch.equal(a, b) for a, b in zip(whole.logits, again.logits, strict=True))


def test_calibration_needs_held_out_data(tmp_path):
    import clframe
    from clframe.errors import ConfigError

    with pytest.raises(ConfigError, match=r"benchmark\.validation"):
        clframe.run("quickstart", ["backbone=mlp", "strategy=er + exits(calibration='temperature')"], output=tmp_path)


def test_options_without_effect_are_refused():
    for wrong, key in (({"values": (0.0, 1.0)}, "values"), ({"weights": "linear"}, "weights")):
        with pytest.raises(ConfigError, match=rf"^components\.exits\.{key}: found .*; with regime=disjoint"):
            Exits(regime="disjoint", **wrong)
    assert Exits(regime="disjoint", values=(1, 1), weights="constant").exit_loss_weights(context(1, 2), {"weights": (1, 1)})[-1] == 0
    for way in ({"at": ("layer1",)}, {"every": 2}, {"at_cost": (0.5,)}):
        with pytest.raises(ConfigError, match=r"^components\.exits\.count: found together with"):
            Exits(count=3, **way)
