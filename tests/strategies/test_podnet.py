"""PODNet: which maps it holds, its terms longhand at every exit, and what it does for old classes."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from clframe.errors import ConfigError, UnknownNameError
from clframe.functional.losses import cross_entropy
from clframe.functional.representation import nca, pod
from clframe.nn import BACKBONES, Network
from clframe.nn.backbones.base import Backbone
from clframe.nn.heads import CosineLinear, GrowingLinear
from clframe.training.checkpoint import decode, encode
from strategies import ER, Exits, PODNet


def maps_of(name, shape, *exits, **options):
    network = Network(BACKBONES.get(name)(shape, **options))
    if exits:
        Exits(at=exits).setup_network(network)
    return PODNet().init_state(network)["maps"]


def test_it_holds_the_last_map_of_every_resolution_and_those_of_exits():
    assert maps_of("resnet20", (3, 16, 16)) == (("layer1.2", "layer2.2", "layer3.2"),)
    assert maps_of("resnet20", (3, 16, 16), "layer1.1", "layer3.0") == (
        ("layer1.1",),
        ("layer1.1", "layer1.2", "layer2.2", "layer3.0"),
        ("layer1.1", "layer1.2", "layer2.2", "layer3.0", "layer3.2"),
    )
    assert maps_of("small_cnn", (1, 8, 8)) == (("block1", "block2"),)
    assert maps_of("mlp", (1, 8, 8)) == ((),)


def test_maps_of_equal_size_and_other_channels_have_one_resolution():
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    stages = [("a", nn.Conv2d(1, 4, 1), (4, 8, 8)), ("b", nn.Conv2d(4, 6, 1), (6, 8, 8)),
              ("c", nn.Conv2d(6, 6, 2, stride=2), (6, 4, 4)), ("features", pool, (6,))]  # fmt: skip
    assert PODNet().init_state(Network(Backbone(stages, input_shape=(1, 8, 8))))["maps"] == (("b", "c"),)


def test_tokens_are_held_where_the_backbone_has_them():
    network = Network(BACKBONES.get("vit_tiny")((3, 8, 8)))
    (maps,) = PODNet().init_state(network)["maps"]
    names = [name for name in network.backbone.names if len(network.backbone.tap_shapes[name]) == 2]
    assert maps and maps[-1] == names[-1]


@pytest.mark.parametrize("exits", [False, True])
def test_terms_are_the_formulas_at_every_exit(on_digits, exits):
    podnet = PODNet(spatial=5.0, flat=2.0, pooling="width", proxies=3, eta=4.0)
    parts = [podnet, Exits(at=("block1", "block2"))] if exits else [podnet]
    run = on_digits.learn(on_digits.learner(*parts), last=1, epochs=1, per_class=8)
    teacher = run.state["podnet"]["teacher"]
    on_digits.changed(run, classes=(2, 3, 4))
    step = on_digits.step(run, [2, 0, 3, 4], classes=(2, 3, 4))
    terms = podnet.losses(step, run.state["podnet"])
    old, new = teacher(step.batch.x, taps=run.taps).taps, step.output.taps
    factor = sqrt(5 / 3)
    one, two = (pod(new[tap], old[tap], pooling="width") for tap in ("block1", "block2"))
    spatial = [one, (one + two) / 2, (one + two) / 2] if exits else [(one + two) / 2]
    torch.testing.assert_close(terms["spatial"], 5.0 * factor * torch.stack(spatial))
    for k, tap in enumerate(["block1", "block2", "hidden"] if exits else ["hidden"]):
        a, b = (t[tap].mean((2, 3)) if t[tap].dim() == 4 else t[tap] for t in (new, old))
        torch.testing.assert_close(terms["flat"][k], 2.0 * factor * (1 - cosine_similarity(a, b, dim=1)).mean())
    scales = [head.scale for head in run.network.heads]
    expected = nca(step.output.logits, step.batch.y, margin=0.6, scales=scales)
    torch.testing.assert_close(podnet.task_loss(step, run.state["podnet"]), expected)
    assert run.network.final.weight.shape == (5, 3, 32) and terms["spatial"].min() > 0


def test_a_backbone_without_maps_keeps_features_only(on_digits):
    run = on_digits.learn(on_digits.learner(PODNet(), backbone="mlp"), epochs=1, per_class=8)
    assert set(run.flush_terms()) == {"loss/task/ce", "loss/podnet/flat"}


def test_an_exit_in_front_of_every_chosen_map_has_no_maps(on_digits):
    podnet = PODNet(at=("block2",))
    run = on_digits.learn(on_digits.learner(podnet, Exits(at=("block1",))), last=1, epochs=1, per_class=8)
    step = on_digits.step(on_digits.changed(run), [2, 0])
    first, last = podnet.losses(step, run.state["podnet"])["spatial"].tolist()
    assert first == 0 and last > 0


def test_linear_classifiers_keep_the_cross_entropy(on_digits):
    podnet = PODNet(classifier="linear")
    run = on_digits.learn(on_digits.learner(podnet), last=1, epochs=1, per_class=8)
    assert type(run.network.final) is GrowingLinear
    step = on_digits.step(on_digits.changed(run), [2, 0, 3])
    run.begin(on_digits.experience(1, per_class=2), classes=(2, 3), epochs=1)
    run.before_epoch(0)
    run.flush_terms()
    run.loss(step.batch, step.output)
    found = run.flush_terms()
    expected = cross_entropy(step.output.logits, step.batch.y).item()
    assert found["loss/task/ce"] == pytest.approx(expected) and found["loss/podnet/spatial"] > 0
    assert type(on_digits.learner(PODNet()).network.final) is CosineLinear


def test_old_proxies_stay(on_digits):
    run = on_digits.learn(on_digits.learner(PODNet(), ER(memory=12)), last=1, epochs=1, per_class=8)
    before = run.network.final.weight.detach().clone()
    on_digits.learn(run, first=1, last=2, epochs=1, per_class=8)
    after = run.network.final.weight
    assert torch.equal(after[:2], before) and after.shape[0] == 4


def drift(on_digits, **options):
    """How far maps and features of old samples move in the second experience."""
    run = on_digits.learn(on_digits.learner(PODNet(**options), ER(memory=30)), last=1)
    before = run.state["podnet"]["teacher"]
    on_digits.learn(run, first=1, last=2, epochs=6, lr=0.01)
    samples = on_digits.samples((0, 1), 20, part="test")
    x = samples.prepare(samples.raw(torch.arange(len(samples))))
    old, new = before(x, taps=run.taps).taps, run.network.eval()(x, taps=run.taps).taps
    maps = sum(pod(new[tap], old[tap], pooling="spatial").item() for tap in ("block1", "block2"))
    return maps, (1 - cosine_similarity(new["hidden"], old["hidden"], dim=1)).mean().item()


def test_maps_and_features_of_old_classes_move_less(on_digits):
    maps, flat = drift(on_digits, spatial=3.0, eta=10.0)
    free_maps, free_flat = drift(on_digits, spatial=0.0, flat=0.0, eta=10.0)
    assert maps < 0.5 * free_maps and flat < 0.8 * free_flat, (maps, flat, free_maps, free_flat)


def test_a_resumed_run_is_the_same(on_digits, tmp_path):
    parts = (PODNet(), ER(memory=30))
    whole = on_digits.learn(on_digits.learner(*parts))
    half = on_digits.learn(on_digits.learner(*parts), last=2)
    torch.save({"network": half.network.state_dict(), "state": encode(half.state)}, tmp_path / "half")
    saved = torch.load(tmp_path / "half", weights_only=True)
    again = on_digits.learner(*parts)
    again.network.load_state_dict(saved["network"])
    again.state, again.past = decode(saved["state"], again.network), half.past
    on_digits.learn(again, first=2)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name]), name


def test_taps_that_do_not_exist_or_have_nothing_to_pool_are_named():
    network = Network(BACKBONES.get("small_cnn")((1, 8, 8), width=4))
    with pytest.raises(UnknownNameError, match=r"^components\.podnet\.at: unknown tap 'blok1'"):
        PODNet(at=("blok1",)).init_state(network)
    with pytest.raises(ConfigError, match=r"^components\.podnet\.at: found 'hidden' of shape \(16,\), with nothing to"):
        PODNet(at=("hidden",)).init_state(network)
    assert PODNet(at=("block2", "block1")).init_state(network)["maps"] == (("block1", "block2"),)
    tokens = Network(BACKBONES.get("vit_tiny")((3, 8, 8)))
    assert PODNet(at=("encoder.1",)).init_state(tokens)["maps"] == (("encoder.1",),)
    for options in ({"spatial": -1.0}, {"proxies": 0}, {"eta": 0.0}, {"margin": -0.1}):
        with pytest.raises(ConfigError, match=rf"^components\.podnet\.{next(iter(options))}: found"):
            PODNet(**options)
