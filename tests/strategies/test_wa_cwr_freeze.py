"""Rows of classifiers between experiences, at every kind of head; frozen backbones."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import clframe
from clframe.core import Experience, StepContext
from clframe.data import SOURCES, TensorSamples, class_incremental
from clframe.data.avalanche import import_avalanche
from clframe.errors import ConfigError
from clframe.exits import make_head
from clframe.exits.features import read_rows, write_rows
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.seeding import generator_for
from clframe.training.checkpoint import decode, encode
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy
from strategies import CWR, WA, Freeze


def network():
    """One exit of each kind: per experience, growing in layers, and the backbone's own."""
    torch.manual_seed(0)
    net = Network(BACKBONES.get("mlp")((5,), width=6))
    heads = [make_head("hidden", (6,), per_experience=each, hidden=7) for each in (True, False)]
    net.attach([("layer1", head) for head in heads])
    return net


def context(index, classes, past=(), counts=(3, 5)):
    y = torch.tensor([c for c, n in zip(classes, counts, strict=False) for _ in range(n)])
    samples = TensorSamples(torch.randn(len(y), 5), y)
    return StepContext(Experience(index, 3, tuple(classes), tuple(past), (), samples), 0, 1, generator_for(0, index))


def shuffled_rows(net):
    """Other rows in every head, as if trained."""
    for head in net.heads:
        weight, bias = read_rows(head)
        write_rows(head, torch.randn_like(weight), torch.randn_like(bias))


def rows(net):
    return [read_rows(head) for head in net.heads]


def test_rows_of_every_head_are_read_and_written_by_class():
    net = network()
    net.grow([1, 2])
    net.grow([0, 3])  # the first head gets a second part, whose classes are not behind the first's
    shuffled_rows(net)
    x = torch.randn(4, 5)
    for head, (weight, bias), logits in zip(net.heads, rows(net), net(x).logits, strict=True):
        assert weight.shape[0] == 4
        bias[2] += 10
        write_rows(head, weight, bias)
        changed = net(x).logits[list(net.heads).index(head)] - logits
        assert torch.allclose(changed, torch.tensor([0.0, 0, 10, 0]).expand(4, -1), atol=1e-5)


def test_wa_makes_new_rows_as_long_as_old_ones_at_every_exit():
    net, wa = network(), WA()
    net.grow([0, 1])
    net.grow([0, 1, 2, 3])
    shuffled_rows(net)
    before = rows(net)
    assert wa.after_experience(net, context(0, (0, 1)), {}) == {} and all(
        torch.equal(a[0], b[0]) for a, b in zip(before, rows(net), strict=True)
    )
    wa.after_experience(net, context(1, (2, 3), (0, 1)), {})
    for (weight, bias), (after, same) in zip(before, rows(net), strict=True):
        factor = weight[:2].norm(dim=1).mean() / weight[2:].norm(dim=1).mean()
        assert torch.equal(after[:2], weight[:2]) and torch.equal(bias, same)
        assert torch.allclose(after[2:], weight[2:] * factor) and abs(factor - 1) > 1e-3
    shuffled_rows(net)
    before = rows(net)
    wa.after_experience(net, context(2, (0, 3), (0, 1, 2, 3)), {})  # nothing new: nothing to align
    assert all(torch.equal(a[0], b[0]) for a, b in zip(before, rows(net), strict=True))


@pytest.mark.parametrize("length, expected", [(4.0, 1.0), (0.25, 0.25)])
def test_wa_that_only_shrinks_leaves_shorter_rows(length, expected):
    net = Network(BACKBONES.get("mlp")((5,), width=6))
    net.grow([0, 1])
    weight = torch.ones(2, 6) * torch.tensor([[1.0], [length]])
    write_rows(net.final, weight, torch.zeros(2))
    WA(direction="shrink").after_experience(net, context(1, (1,), (0,)), {})
    assert torch.allclose(net.final.weight, torch.tensor([[1.0], [expected]]).expand(2, 6))


def test_cwr_keeps_rows_aside_and_trains_the_new_ones_from_zero():
    net, cwr = network(), CWR()
    state, past, kept = cwr.init_state(net), (), {}
    counts = {}
    for index, classes in enumerate([(0, 1), (2, 3), (1, 4)]):
        net.grow((*past, *classes))
        now = context(index, classes, past)
        state = cwr.before_experience(net, now, state)
        for exit, (weight, bias) in enumerate(rows(net)):
            for c in range(len(bias)):
                known = c in classes and (exit, c) in kept
                assert torch.equal(weight[c], kept[exit, c][0] if known else torch.zeros_like(weight[c]))
                assert bias[c] == (kept[exit, c][1] if known else 0)
        shuffled_rows(net)
        trained = rows(net)
        state = cwr.after_experience(net, now, state)
        for exit, ((weight, bias), (found, found_bias)) in enumerate(zip(trained, rows(net), strict=True)):
            shift, bias_shift = weight[list(classes)].mean(), bias[list(classes)].mean()
            for c, count in zip(classes, (3, 5), strict=True):
                ratio = (counts.get(c, 0) / count) ** 0.5
                old = kept.get((exit, c), (torch.zeros_like(weight[c]), torch.zeros(())))
                kept[exit, c] = (
                    (old[0] * ratio + weight[c] - shift) / (ratio + 1),
                    (old[1] * ratio + bias[c] - bias_shift) / (ratio + 1),
                )
            for c in range(len(bias)):
                assert torch.allclose(found[c], kept[exit, c][0], atol=1e-6)
                assert torch.allclose(found_bias[c], kept[exit, c][1], atol=1e-6)
                kept[exit, c] = (found[c], found_bias[c])
        for c, count in zip(classes, (3, 5), strict=True):
            counts[c] = counts.get(c, 0) + count
        state, past = decode(encode(state), net), (*past, *classes)
    assert state["rows"][2]["count"].tolist() == [3, 8, 3, 5, 5]


def test_cwr_freezes_all_but_linear_layers_and_what_is_new():
    net, cwr = network(), CWR()
    net.grow([0, 1])
    cwr.add_classes(net, context(0, (0, 1)).experience)
    assert all(p.requires_grad for p in net.parameters())
    cwr.add_classes(net, context(1, (2,), (0, 1)).experience)
    net.grow([0, 1, 2])
    cwr.before_epoch(net, context(1, (2,), (0, 1)), {})
    learning = {name.rpartition(".")[0] for name, p in net.named_parameters() if p.requires_grad}
    assert learning == {
        "heads.0.heads.0.classifier", "heads.0.heads.1.layers.0", "heads.0.heads.1.classifier", "heads.1.classifier",
        "heads.2",
    }  # fmt: skip
    assert not net.backbone.training
    cwr = CWR(backbone="free")
    net.requires_grad_(True)
    cwr.add_classes(net, context(1, (2,), (0, 1)).experience)
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy copies of tensors, in Avalanche
def test_cwr_weights_are_avalanches():
    """Avalanche does the same to weights; it leaves biases as they were trained."""
    import_avalanche()
    from avalanche.training.plugins import CWRStarPlugin

    torch.manual_seed(0)
    net, theirs = Network(BACKBONES.get("mlp")((5,), width=6)), nn.Sequential(nn.Linear(6, 4))
    cwr, plugin = CWR(), CWRStarPlugin(theirs, "0")
    state, past = cwr.init_state(net), ()
    for index, (classes, counts) in enumerate([((0, 1), (3, 5)), ((2, 3), (2, 2)), ((1, 3), (4, 1))]):
        net.grow(range(4))
        now = context(index, classes, past, counts)
        state = cwr.before_experience(net, now, state)
        plugin.model.cur_j = dict(zip(classes, counts, strict=True))
        plugin.cur_class = list(classes)
        plugin.reset_weights(plugin.cur_class)
        assert np.allclose(net.final.weight.detach(), theirs[0].weight.detach(), atol=1e-6)
        trained = torch.randn(4, 6)
        for layer in (net.final, theirs[0]):
            layer.weight.data.copy_(trained)
        state = cwr.after_experience(net, now, state)
        plugin.consolidate_weights()
        plugin.set_consolidate_weights()
        met = sorted({*past, *classes})
        assert np.allclose(net.final.weight.detach()[met], theirs[0].weight.detach()[met], atol=1e-5)
        past = tuple(met)


def run(strategy, exits=1, experiences=3):
    """The network before the second experience and after the last, on some digits."""
    source = SOURCES.get("digits")()
    stream = class_incremental(source, experiences=5, order="sorted")
    torch.manual_seed(0)
    net = Network(BACKBONES.get("mlp")(stream.input_shape, width=64), exits=[("layer1", GrowingLinear(64))] * exits)
    module = ContinualModule(net, strategy, optimizer=partial(torch.optim.Adam, lr=5e-3), seed=0)
    loop = LightningStrategy(
        model=module, benchmark=stream, train_mb_size=16, train_epochs=2, eval_mb_size=512, evaluator=None
    )
    states = []
    for experience in list(stream.avalanche.train_stream)[:experiences]:
        loop.train(experience)
        states.append({name: p.detach().clone() for name, p in net.named_parameters()})
    net.eval()
    parts = [(data.prepare(data.raw(torch.arange(len(data)))), data.y) for data in stream.test[:experiences]]
    return states, [(net(x).last.argmax(1) == y).float().mean().item() for x, y in parts]


@pytest.mark.parametrize("strategy, after", [(Freeze(), 1), (Freeze(after=2), 2), (Freeze(after=0), 0), (CWR(), 1)])
def test_a_frozen_backbone_stays_and_classifiers_go_on(strategy, after):
    states, _ = run(strategy)
    moved = [
        any(not torch.equal(a[name], b[name]) for name in a if name.startswith("backbone")) for a, b in pairwise(states)
    ]
    assert moved == [index + 1 < after for index in range(2)]
    for a, b in pairwise(states):
        for name in ("heads.0.weight", "heads.1.weight"):
            rows_moved = not torch.equal(a[name], b[name][: len(a[name])])
            assert rows_moved == isinstance(strategy, Freeze)  # CWR* puts old rows back as they were


def test_cwr_remembers_what_fine_tuning_forgets():
    (_, plain), (_, cwr) = run("naive", experiences=5), run(CWR(), experiences=5)
    assert plain[0] < 0.05 < 0.8 < cwr[0] and sum(cwr) > 1.5 * sum(plain)


def test_frozen_normalization_stands_still():
    net = Network(BACKBONES.get("resnet20")((3, 8, 8)))
    net.grow([0, 1])
    net.train()
    Freeze().before_epoch(net, context(0, (0, 1)), {})
    assert net.backbone.training and all(p.requires_grad for p in net.parameters())
    Freeze().before_epoch(net, context(1, (0, 1)), {})
    assert not any(module.training for module in net.backbone.modules())
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["heads.0.weight", "heads.0.bias"]


def test_preset_and_options(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("defaults: [benchmark/digits, backbone/small_cnn, strategy/wa]\n")
    assert clframe.load_config(str(file)).strategy == "er + lwf + wa" and clframe.explain(str(file))
    with pytest.raises(ConfigError, match=r"components.freeze.after: found -1"):
        Freeze(after=-1)
