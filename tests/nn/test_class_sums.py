"""Sums of what exits see, by class."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from clframe.data import TensorSamples
from clframe.data.augmentation import Flip
from clframe.exits import make_head
from clframe.nn import BACKBONES, Network
from clframe.nn.features import class_sums


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_sums_are_those_of_evaluation_at_every_exit_whatever_the_batch(batch_size):
    torch.manual_seed(0)
    backbone = BACKBONES.get("resnet20")((1, 8, 8))
    tap = backbone.names[1]
    net = Network(backbone, exits=[(tap, make_head("pool", backbone.tap_shapes[tap]))])
    net.grow(range(4))
    samples = TensorSamples(torch.rand(9, 1, 8, 8), torch.tensor([0, 2, 0, 0, 2, 2, 2, 0, 2]), augment=(Flip(1.0),))
    net.train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    sums, count_C = class_sums(net, samples, batch_size=batch_size)
    assert count_C.tolist() == [4, 0, 5, 0] and net.training
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    with torch.no_grad():
        taps = net.eval()(samples.x, taps=net.exit_taps).taps
    for sum_CF, features in zip(sums, [taps[tap].mean((2, 3)), taps[backbone.names[-1]]], strict=True):
        unit = normalize(features, dim=1)
        assert not sum_CF.requires_grad and (sum_CF[1] == 0).all() and (sum_CF[3] == 0).all()
        for c in (0, 2):
            torch.testing.assert_close(sum_CF[c], unit[samples.y == c].sum(0))
