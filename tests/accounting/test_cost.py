"""``measure_cost``: what one call of any module costs, by arithmetic."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

from clframe.accounting import count_macs, measure_cost
from clframe.errors import UnsupportedError


def test_a_perceptron():
    cost = measure_cost(nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 3)), torch.zeros(4, 10))
    assert cost.macs == 4 * (10 * 7 + 7 * 3) and cost.flops == 2 * cost.macs
    assert cost.parameters == 10 * 7 + 7 + 7 * 3 + 3 and cost.bytes == 4 * cost.parameters
    assert cost.uncounted() == {}
    assert cost.by_convention()["element-wise"] == {"aten.relu": 1}


class Nested(nn.Module):
    """A list of parts, one of them called twice and one never."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4, bias=False)])
        self.idle = nn.Linear(4, 9)
        self.head = nn.Sequential(nn.Linear(4, 2))

    def forward(self, x, *, scale=1.0):
        for part in (self.parts[0], self.parts[1], self.parts[0]):
            x = part(x) * scale
        return self.head(x) @ torch.ones(2, 2, device=x.device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_by_module(device):
    cost = measure_cost(Nested().to(device), torch.zeros(3, 4))
    assert cost.by_module() == {
        "": 3 * (3 * 16 + 8 + 4), "parts": 0, "parts.0": 2 * 3 * 16, "parts.1": 3 * 16, "idle": 0,
        "head": 3 * 8, "head.0": 3 * 8,
    }  # fmt: skip
    assert cost.macs == cost.by_module()[""]


def test_examples_of_every_kind():
    module = nn.Bilinear(2, 3, 4)
    expected = 5 * 2 * 3 * 4
    assert measure_cost(module, (torch.zeros(5, 2), torch.zeros(5, 3))).macs == expected
    assert measure_cost(module, {"input1": torch.zeros(5, 2), "input2": torch.zeros(5, 3)}).macs == expected
    assert measure_cost(nn.ReLU(), torch.zeros(2)).macs == 0
    assert measure_cost(Nested(), {"x": torch.zeros(1, 4), "scale": 2.0}).macs == 60


def test_shared_parameters_and_buffers_weigh_once():
    layer = nn.Linear(3, 3, dtype=torch.float64)
    cost = measure_cost(nn.Sequential(layer, layer, nn.BatchNorm1d(3, dtype=torch.float64)), torch.zeros(2, 3).double())
    assert cost.macs == 2 * 2 * 9
    assert cost.parameters == 12 + 6
    assert cost.bytes == 8 * (12 + 6 + 6) + 8


class Drawing(nn.Module):
    """Normalizes, draws, and asks for what has no formula."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(2), nn.Dropout(0.5)

    def forward(self, x):
        x = torch.fft.fft2(self.drop(self.norm(x))).real
        return nn.functional.max_pool2d(x, 2) + torch.rand_like(x[..., ::2, ::2])


def test_measuring_leaves_no_trace_and_names_gaps():
    module = Drawing().train()
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    cost = measure_cost(module, torch.ones(2, 2, 4, 4))
    assert cost.macs == 0 and cost.uncounted() == {"aten._fft_c2c": 1}
    assert set(cost.by_convention()) >= {"normalization", "pooling", "element-wise"}
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and module.norm.training


class Picks(nn.Module):
    """Its path depends on values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x[x.sum(1) > 0])


def test_a_path_that_depends_on_values_needs_values():
    x = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [2.0, 0.0]])
    assert measure_cost(Picks(), x).macs == 2 * 4
    with pytest.raises(UnsupportedError, match=r"measure_cost: Picks cannot run on meta tensors .*real device"):
        measure_cost(Picks().to("meta"), x)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measure_cost(nn.Linear(3, 2), torch.zeros(1, 5))


def on_meta(build):
    with torch.device("meta"):
        return build()


def test_resnet18():
    network = on_meta(torchvision.models.resnet18)
    cost = measure_cost(network, torch.zeros(1, 3, 224, 224, device="meta"))
    assert cost.macs == 1_814_073_344 and cost.parameters == 11_689_512
    assert cost.by_module()["fc"] == 512 * 1000 and cost.by_module()["conv1"] == 112 * 112 * 49 * 3 * 64
    assert cost.uncounted() == {}


def test_vit_b_16():
    network = on_meta(torchvision.models.vit_b_16)
    tokens, width, hidden = 14 * 14 + 1, 768, 3072
    layer = tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width
    expected = 14 * 14 * 3 * 16 * 16 * width + 12 * layer + width * 1000
    cost = measure_cost(network, torch.zeros(1, 3, 224, 224, device="meta"))
    assert cost.macs == expected and round(expected / 1e9, 2) == 17.56
    assert cost.uncounted() == {}


def test_mobilenet_trains_at_about_three_forward_passes():
    """torch's own formula says 20 times."""
    from clframe.accounting import MacCounter

    network = on_meta(torchvision.models.mobilenet_v2)
    with MacCounter() as counter:
        out = network(torch.zeros(2, 3, 64, 64, device="meta"))
        forward = counter.macs
        out.sum().backward()
    first = 2 * 32 * 32 * 9 * 3 * 32  # the first layer hands no gradient on
    assert counter.macs == 3 * forward - first
    assert 2 * count_macs(network, (3, 64, 64)) == forward
