"""Which neurons fire on which experience."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import clframe
from clframe.data import TensorSamples
from clframe.data.sources.characters import digits
from clframe.errors import ConfigError
from clframe.nn import BACKBONES, Network
from clframe.sparsity import activity, experience_activity, overlap
from clframe.sparsity.functional import jaccard, keep


@pytest.fixture
def network():
    torch.manual_seed(1)
    network = Network(BACKBONES.get("mlp")((1, 2, 3), width=7))
    network.grow([0, 1])
    return network


def samples(seed, count=9):
    return TensorSamples(torch.randn(count, 1, 2, 3, generator=torch.Generator().manual_seed(seed)), torch.zeros(count, dtype=torch.long))


def test_rates_are_shares_of_tokens_in_the_unmasked_model(network):
    x = samples(0).x
    first, second = network.backbone.stages
    found = activity(network.backbone, [(x[:4], None), (x[4:], None)], value=0.7)
    for layer, hidden in (("stages.0", first(x)), ("stages.1", second(first(x)))):
        on = (keep(hidden, 0.7, kind="top_p") & (hidden > 0)).double()
        assert torch.allclose(found.active[layer], on.mean(0))
        assert found.sparsity[layer] == pytest.approx(1 - on.mean().item())
    assert not any(part._forward_hooks for part in network.modules())


def test_masked_tokens_do_not_count():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    rate = activity(model, [(x, mask)], value=1.0).active[""]
    assert torch.allclose(rate, (model[0](x[mask.bool()]) > 0).double().mean(0))


def test_overlap_between_experiences(network):
    first, second = experience_activity(network, [samples(0), samples(1)], value=1.0, limit=5, batch_size=2)
    x = samples(0).x[:5]
    assert torch.allclose(first.active["stages.0"], (network.backbone.stages[0](x) > 0).double().mean(0))
    found = overlap([first, second])["stages.0"]
    a, b = first.active["stages.0"], second.active["stages.0"]
    assert found.diagonal().tolist() == [1, 1] and found[0, 1] == found[1, 0] == jaccard(a, b)
    hard = overlap([first, second], active_above=0.5)["stages.0"][0, 1].item()
    assert hard == ((a > 0.5) & (b > 0.5)).sum().item() / ((a > 0.5) | (b > 0.5)).sum().item()
    assert overlap([]) == {}


def test_nothing_to_look_at_is_refused(network):
    with pytest.raises(ConfigError, match="sparsity.batches: found none"):
        experience_activity(network, [samples(0, count=0)])


def test_a_finished_run(tmp_path):
    options = ["backbone=mlp", "trainer.epochs=1", "strategy=sparsity", "trainer.progress=false"]
    clframe.run("quickstart", options, output=tmp_path)
    (folder,) = (path.parent for path in tmp_path.rglob("results.json"))
    trained = clframe.load(folder)
    test = digits().test
    experiences = [test.subset((test.y == label).nonzero().flatten()) for label in range(3)]
    found = experience_activity(trained.network, experiences)
    matrix = overlap(found)["stages.1"]
    assert matrix.shape == (3, 3) and torch.equal(matrix, matrix.T) and 0 < matrix[0, 1] < 1
    assert all(0 < one.sparsity["stages.0"] < 1 for one in found)
