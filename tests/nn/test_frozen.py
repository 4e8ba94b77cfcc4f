"""Forward passes without side effects: values, and that nothing changes."""

from __future__ import annotations

import pytest
import torch

from clframe.data import TensorSamples
from clframe.nn import BACKBONES, Network
from clframe.nn.frozen import forward_preserving_buffers, logits_reader


def network():
    torch.manual_seed(0)
    backbone = BACKBONES.get("resnet20")((1, 8, 8))
    net = Network(backbone)
    net.grow([0, 2])
    return net.train()


def state(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_stored_logits_are_those_of_evaluation():
    net = network()
    samples = TensorSamples(torch.randint(256, (7, 1, 8, 8), dtype=torch.uint8), torch.zeros(7).long(), mean=(99.0,))
    before, index = state(net), torch.tensor([5, 0, 6, 1, 2])
    found = logits_reader(net, samples, batch_size=2)(index)
    assert found.shape == (5, 1, 3) and not found.requires_grad and net.training and same(before, state(net))
    with torch.no_grad():
        expected = net.eval()(samples.x[index].float() - 99.0).last
    torch.testing.assert_close(found[:, 0], expected)
    assert bool((found[:, 0, 1] == -torch.inf).all())


def test_no_samples_have_no_logits_but_their_shape():
    samples = TensorSamples(torch.rand(3, 1, 8, 8), torch.zeros(3).long())
    assert logits_reader(network(), samples)(torch.empty(0, dtype=torch.long)).shape == (0, 1, 3)


@pytest.mark.parametrize("size", [2, 5])
def test_a_pass_aside_is_a_training_pass_that_writes_no_buffer(size):
    net, x = network(), torch.rand(size, 1, 8, 8)
    before = state(net)
    aside = forward_preserving_buffers(net, x).last
    assert same(before, state(net)) and aside.requires_grad
    beside = net(x).last
    assert torch.equal(aside, beside) and not same(before, state(net))
