"""A recipe rebuilds the shapes of a converted model, so that its weights can be loaded."""

import pytest
import torch

from clframe.errors import ClframeError, ConfigError, RunFolderError
from clframe.moe import CumulativeShare, DynamicK, TopK, routed_layers, set_gate, to_experts
from clframe.moe.distill import replace_projections
from clframe.moe.pipeline import Recipe, make_gate
from clframe.moe.projections import ProjectionSite
from clframe.nn import Network
from clframe.nn.backbones import vit_tiny
from clframe.sparsity import swap_for_relu


def vit(seed=0):
    torch.manual_seed(seed)
    net = Network(vit_tiny((1, 8, 8), width=12, depth=2, heads=2))
    net.grow(range(3))
    return net.eval()


@pytest.mark.parametrize("split", ["kmeans", "random", "coactivation"])
@pytest.mark.parametrize("projections", [False, True])
def test_weights_find_their_places(split, projections):
    model, x = vit(), torch.arange(4 * 64.0).sin().view(4, 1, 8, 8)
    body = model.backbone
    call = lambda _, batch: model(batch)  # noqa: E731
    sites = replace_projections(body, [x], epochs=1, call=call).sites if projections else ()
    swap_for_relu(body)
    to_experts(body, most=5, split=split, router="activation", router_width=None, batches=[x], call=call, seed=3)
    recipe = Recipe(body="backbone", relu=True, projections=sites, most=5, router="activation", gate="top_k", k=2)
    set_gate(model, TopK(k=2))
    other = vit(seed=9)
    layers = Recipe.from_tree(recipe.as_tree()).shape(other)
    assert set(layers) == {name.removeprefix("backbone.") for name in routed_layers(other)}
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x).last, model(x).last)
    assert {layer.experts.experts for layer in layers.values()} == ({4, 3} if projections else {4})  # of 48 and of 6


def test_gates_by_name():
    assert make_gate("dynamic_k", tau=0.25) == DynamicK(tau=0.25)
    assert make_gate("cumulative", tau=0.25) == CumulativeShare(tau=0.25)
    assert make_gate("top_k", k=2) == TopK(k=2)
    for kind, options, found in (("best", {}, "'best'"), ("top_k", {}, "none"), ("dynamic_k", {"tau": 2.0}, "2.0")):
        with pytest.raises(ConfigError, match=found):
            make_gate(kind, **options)


def test_trees_that_are_no_recipe():
    for tree in ({}, {"projections": [{"name": "q"}]}, {"projections": [], "extra": 1}):
        with pytest.raises(RunFolderError, match="recipe"):
            Recipe.from_tree(tree)


def test_another_model_is_refused():
    with pytest.raises(ClframeError, match="no projection"):
        Recipe(body="backbone", experts=2, projections=(ProjectionSite(name="q", inputs=3, outputs=(3,)),)).shape(vit())
    with pytest.raises(ClframeError, match="with experts"):
        model = vit()
        to_experts(model, experts=2)
        Recipe(body="backbone", experts=2).shape(model)
