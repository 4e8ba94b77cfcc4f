"""Routers read from activations and experts that always run, against values computed by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clframe.errors import ConfigError, UnsupportedError
from clframe.moe import TopK, count_usage, fit_routers, moefy, set_gate, to_experts
from clframe.moe.analytical import active_neurons, most_active, representatives
from clframe.moe.conversion.options import Options, check_numbers
from clframe.moe.pipeline import Recipe, fit_experts
from strategies.moe import MoE


class Gated(nn.Module):
    def __init__(self, width=4, hidden=20):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down_proj, self.act_fn = nn.Linear(hidden, width, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def plain(hidden=20):
    return nn.Sequential(nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 4)))


def test_neurons_that_are_active_in_most_tokens():
    # 20 neurons: the two largest of each token are active.
    hidden = torch.zeros(3, 20)
    hidden[0, [4, 7]], hidden[1, [4, 9]], hidden[2, [4, 7]] = -2.0, 3.0, 1.0
    assert active_neurons(hidden).nonzero().tolist() == [[0, 4], [0, 7], [1, 4], [1, 9], [2, 4], [2, 7]]
    assert most_active(hidden, 2).tolist() == [4, 7] and most_active(hidden, 3).tolist() == [4, 7, 9]
    # Ties between neurons that are never active go to the first.
    assert most_active(hidden, 5).tolist() == [0, 1, 4, 7, 9]


def test_the_representative_is_closest_to_the_mean_activity():
    hidden = torch.zeros(4, 2, 10)
    hidden[:, 0, :2] = torch.tensor([[1.0, 0.5], [1.0, 0.5], [1.0, 0.5], [1.0, 0.0]])
    hidden[2, 1, 3:5] = 9.0
    # Expert 0: rates by token (1, .., 1), (1, 1, 0, 0) and eight zeros; the mean is nearest to a neuron that never fires.
    longhand = []
    active = active_neurons(hidden.flatten(1)).view(4, 2, 10).double()
    for e in range(2):
        mean = active[:, e].mean(1)
        longhand.append(min(range(10), key=lambda h, e=e, mean=mean: float((active[:, e, h] - mean).square().sum())))
    assert representatives(hidden).tolist() == longhand


@pytest.mark.parametrize("make", [plain, Gated])
def test_scores_are_those_of_the_representatives(make):
    torch.manual_seed(0)
    model, x = nn.Sequential(make()) if make is Gated else make(), torch.randn(50, 4)
    dense = model(x)
    (layer,) = moefy(model, [x[:25], x[25:]], experts=5, router="analytical", shared=1, split="coactivation").values()
    torch.testing.assert_close(model(x), dense)  # all experts are on
    experts, router = layer.experts, layer.router
    index = representatives(experts.hidden(x)[:, 1:])
    up = torch.stack([x @ experts.up[1 + e, h] + (0 if experts.up_bias is None else experts.up_bias[1 + e, h]) for e, h in enumerate(index)], 1)
    if make is Gated:
        gate = torch.stack([x @ experts.gate[1 + e, h] for e, h in enumerate(index)], 1)
        want = (up * F.silu(gate)).abs()
    else:
        want = (1 + up.exp()).log()
    torch.testing.assert_close(router(x), want, rtol=1e-4, atol=1e-5)
    assert layer.macs().router == 4 * 4 * (2 if make is Gated else 1)
    # The shared expert is made of the most active neurons, and always runs.
    shared = set(most_active(experts.hidden(x).flatten(1)[:, experts.order_F.argsort()], 4).tolist())
    assert set(experts.order_F[:4].tolist()) == shared
    set_gate(model, TopK(k=2))
    with count_usage(model) as usage, torch.no_grad():
        y = model(x)
        (used,) = usage().values()
    assert used.ran_E[0] == 50 and sum(used.ran_E) == 150 and used.routed == 50
    keep = F.pad(TopK(k=2)(router(x)), (1, 0), value=True)
    want = torch.einsum("neh,eho,ne->no", experts.hidden(x), experts.down, keep.float())
    torch.testing.assert_close(y, want if experts.bias is None else want + experts.bias, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for one in range(3):
            torch.testing.assert_close(model(x[one : one + 1]), y[one : one + 1], rtol=1e-4, atol=1e-5)


def test_trained_routers_do_not_score_shared_experts():
    torch.manual_seed(0)
    model, x = plain(), torch.randn(64, 4)
    (layer,) = moefy(model, [x], experts=5, shared=2, epochs=200, learning_rate=0.02, router_width=32).values()
    target = layer.experts.norms(x)[:, 2:].detach()
    assert layer.router(x).shape == (64, 3)
    assert float(F.mse_loss(layer.router(x), target).detach()) < 0.2 * float(target.var())


def test_a_recipe_rebuilds_the_model():
    torch.manual_seed(0)
    model, again, x = plain(), plain(), torch.randn(30, 4)
    recipe = Recipe(experts=5, router="analytical", shared=1, gate="top_k", k=1)
    recipe.make_experts(model, split="kmeans", batches=[x])
    assert fit_experts(model, [x]) == []
    set_gate(model, TopK(k=1))
    Recipe.from_tree(recipe.as_tree()).shape(again)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    with pytest.raises(UnsupportedError, match="moe: found analytical routers, which are not trained"):
        fit_routers(model, [x])


def test_refusals():
    with pytest.raises(ConfigError, match=r"^moe.shared: found 5 of the 5 experts of 0; give fewer than experts$"):
        to_experts(plain(), experts=5, shared=5, batches=[torch.randn(3, 4)])
    with pytest.raises(ConfigError, match=r"^moe.shared: found 1 without batches"):
        to_experts(plain(), experts=5, shared=1)
    for key, value in (("epochs", 3), ("lr", 0.1), ("router_width", 8)):
        said = f"{key}: found {value} for analytical routers, which are not trained and have no hidden layer; leave it out$"
        with pytest.raises(ConfigError, match=rf"^moefy\.{said}"):
            Options(router="analytical", **{key: value})
        with pytest.raises(ConfigError, match=rf"^components\.moe\.{said}"):
            MoE(router="analytical", **{key: value})
    with pytest.raises(ConfigError, match=r"^moefy.shared: found -1; give 0 or more$"):
        Options(shared=-1)
    with pytest.raises(ConfigError, match=r"^moefy.shared: found 4 of the 4 experts of a; give fewer than experts$"):
        check_numbers({"a": 8}, experts=4, expert_size=None, shared=4)
    with pytest.raises(ConfigError, match=r"^moefy.k: found 5 of 4 experts; give 1 to 4$"):
        check_numbers({"a": 8}, experts=4, expert_size=None, k=5)
    with pytest.raises(ConfigError, match=r"^moefy.k: found 4 of 3 routed experts; give 1 to 3$"):
        check_numbers({"a": 8}, experts=4, expert_size=None, shared=1, k=4)
    with pytest.raises(ConfigError, match=r"^moefy.k: found 25 of 24 experts; give 1 to 24$"):
        check_numbers({"a": 96, "b": 8}, experts=None, expert_size=None, k=25)
    check_numbers({"a": 8}, experts=4, expert_size=None, shared=1, k=3)
    check_numbers({"a": 8, "b": 16}, experts=None, expert_size=4, k=4)
    assert Options(router="analytical").as_tree()["epochs"] is None and Options().as_tree()["epochs"] == 7
