"""Low-rank adaptation: identity at zero, merging, and what is trained."""

from __future__ import annotations

import pytest
import torch

from clframe import parse
from clframe.core import Experience
from clframe.data.samples import TensorSamples
from clframe.errors import ComposeError, ConfigError
from clframe.nn import Network
from clframe.nn.backbones.decoder import decoder
from clframe.nn.low_rank import AdaptedLinear
from clframe.training.learner import Learner
from strategies import LoRA


def network(seed=0):
    torch.manual_seed(seed)
    return Network(decoder((7,), vocabulary=20, width=8, depth=2, heads=2)).double()


def adapters(net):
    return [part for part in net.modules() if isinstance(part, AdaptedLinear)]


def test_new_adapters_change_nothing_and_merging_keeps_the_output():
    ids = torch.randint(0, 20, (3, 7))
    plain, net = network(), network()
    lora = LoRA(targets=("q_proj", "down_proj"), rank=3, alpha=6.0)
    lora.setup_network(net)
    assert torch.equal(net(ids).last, plain(ids).last)
    for layer in adapters(net):
        layer.draw()
    assert len(adapters(net)) == 4
    assert torch.equal(net(ids).last, plain(ids).last)  # B is zero
    for layer in adapters(net):
        torch.nn.init.normal_(layer.up_OR)
    unmerged, layer = net(ids).last, adapters(net)[0]
    longhand = layer.weight + 6.0 / 3 * layer.up_OR @ layer.down_RI
    assert (unmerged - plain(ids).last).abs().max() > 1e-4
    for part in adapters(net):
        part.merge()
    torch.testing.assert_close(layer.weight, longhand)
    torch.testing.assert_close(net(ids).last, unmerged, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("merge", ["experience", "never"])
def test_only_adapters_train_after_the_first_experience(merge):
    net = network()
    learner = Learner(net, parse(f"lora(targets=['q_proj', 'v_proj'], rank=2, merge='{merge}')"), seed=0)
    ids = torch.randint(0, 20, (8, 7), generator=torch.Generator().manual_seed(1))
    moved = []
    for index in range(3):
        samples = TensorSamples(ids, torch.full((8,), index), mean=(), std=())
        experience = Experience(index, 3, (index,), tuple(range(index)), (), samples)
        learner.begin(experience, classes=(index,), epochs=1)
        learner.before_epoch(0, steps=1)
        trained = [p for p in net.parameters() if p.requires_grad]
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        batch = learner.make_batch(ids, torch.full((8,), index))
        for _ in range(2):  # A has no gradient while B is zero
            learner.loss(batch, net(batch.x)).backward()
            torch.optim.SGD(trained, lr=0.5).step()
            net.zero_grad()
        moved.append({name for name, p in net.named_parameters() if not torch.equal(p, before[name])})
        learner.end()
    own = {f"backbone.stages.{at}.attention.{layer}.{part}" for at in ("1", "2.0") for layer in ("q_proj", "v_proj")
           for part in ("down_RI", "up_OR")}  # fmt: skip
    assert moved[1] == moved[2] == own
    assert not moved[0] & own and len(moved[0]) == len(list(net.named_parameters())) - len(own)
    kept = [bool(layer.up_OR.any()) for layer in adapters(net)]
    assert kept == [merge == "never"] * 4


@pytest.mark.parametrize("merge", ["experience", "never", "apart"])
def test_a_stored_network_computes_with_its_adapters(merge):
    """Whether an adapter is computed is not stored: it follows from the weights."""
    nets, ids = [network(), network(1)], torch.randint(0, 20, (3, 7))
    for net in nets:
        LoRA(rank=2, merge=merge).setup_network(net)
    torch.manual_seed(2)
    for _ in range(2):
        for layer in adapters(nets[0]):
            layer.draw()
            torch.nn.init.normal_(layer.up_OR)
            {"experience": layer.merge, "never": lambda: None, "apart": layer.keep}[merge]()
    plain, expected = network()(ids).last, nets[0](ids).last
    assert (expected - plain).abs().max() > 1e-4
    nets[1].load_state_dict(nets[0].state_dict())
    torch.testing.assert_close(nets[1](ids).last, expected, rtol=0, atol=0)
    if merge == "apart":
        assert [len(layer.kept_down_ERI) for layer in adapters(nets[1])] == [2] * 14
        assert not any(p.requires_grad for layer in adapters(nets[1]) for p in (layer.kept_down_ERI, layer.kept_up_EOR))
        layer, x = adapters(nets[1])[0], torch.randn(5, 8, dtype=torch.float64)
        longhand = x @ (layer.weight + 8.0 * layer.kept_up_EOR[1] @ layer.kept_down_ERI[1]).T
        torch.testing.assert_close(layer(x), longhand)


def test_values_of_single_weights_need_lasting_adapters():
    for other in ("ewc", "si", "mas"):
        with pytest.raises(ComposeError, match=f"'{other}' keeps values of single weights, and 'lora' trains new ones"):
            parse(f"lora + {other}").check_needs()
        parse(f"lora(merge='never') + {other}").check_needs()


def test_layers_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match=r"components.lora.targets: found 'query'; linear layers are called down_proj"):
        LoRA(targets=("query",)).setup_network(network())
    with pytest.raises(ConfigError, match="components.lora.rank: found 9 for"):
        LoRA(rank=9).setup_network(network())
