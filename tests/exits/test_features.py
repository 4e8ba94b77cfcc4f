"""Embedded taps of every exit, batch by batch."""

from __future__ import annotations

import pytest
import torch

from clframe.data import TensorSamples
from clframe.data.augmentation import Flip
from clframe.exits import make_head
from clframe.nn import BACKBONES, Network
from clframe.nn.features import embed_tap, exit_features


def test_embedded_by_the_shape_of_the_tap():
    image = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert torch.equal(embed_tap(image), image.flatten(2).mean(2))
    tokens = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(embed_tap(tokens), tokens[:, 0])
    assert torch.equal(embed_tap(tokens[0]), tokens[0])


@pytest.mark.parametrize("size", [1, 3, 100])
def test_features_of_every_exit_as_in_evaluation_whatever_the_batch(size):
    torch.manual_seed(0)
    backbone = BACKBONES.get("resnet20")((1, 8, 8))
    exits = [(tap, make_head("pool", backbone.tap_shapes[tap])) for tap in ("layer1.0", "layer2.0")]
    network = Network(backbone, exits=exits)
    network.grow([0, 1])
    network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    data = TensorSamples(torch.rand(7, 1, 8, 8), torch.arange(7) % 2, augment=(Flip(1.0),))
    order = torch.tensor([6, 2, 0, 1])
    batches = list(exit_features(network, data, order=order, batch_size=size))
    assert [len(y) for _, y in batches] == ([1] * 4 if size == 1 else [3, 1] if size == 3 else [4])
    assert torch.cat([y for _, y in batches]).tolist() == [0, 0, 0, 1]
    assert network.training and all(torch.equal(t, before[n]) for n, t in network.state_dict().items())
    with torch.no_grad():
        taps = network.eval()(data.x[order], taps=network.exit_taps).taps
    for exit, name in enumerate(network.exit_taps):
        found = torch.cat([features[exit] for features, _ in batches])
        torch.testing.assert_close(found, embed_tap(taps[name]))
        assert not found.requires_grad
    assert sum(len(y) for _, y in exit_features(network, data)) == 7
    assert not network.training
