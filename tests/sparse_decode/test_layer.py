"""Sparse copies of decoders: the masked model of the analysis, token by token, with the dense model unchanged."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from clframe.errors import ConfigError, UnknownNameError, UnsupportedError
from clframe.nn.backbones import BACKBONES
from clframe.nn.generation import generate
from clframe.nn.network import Network
from clframe.sparse_decode import Rule, SparseFFN, calibrate, sparse_decoder, sparse_layers
from clframe.sparse_decode.cost import count_bytes
from clframe.sparse_decode.projection import compute_active, compute_masked
from clframe.sparsity.masking import Masker, find_hook_points, replacing


def make_network(ffn):
    torch.manual_seed(4)
    backbone = BACKBONES.get("decoder")((33,), vocabulary=90, width=32, depth=3, heads=2, ffn=ffn)
    made = Network(backbone).eval()
    for weight in made.parameters():  # activations and logits of trained size
        weight.data.mul_(6)
    return made


@pytest.fixture(scope="module")
def network():
    return make_network("swiglu")


@pytest.fixture
def ids():
    return torch.randint(0, 90, (4, 33), generator=torch.Generator().manual_seed(5))


def masked_logits(network, rules, ids):
    """Logits of the model that the analysis measures."""
    points = [point for point in find_hook_points(network.backbone) if point.role in rules]
    maskers = []
    for place, own in rules.items():
        values = list(own.values())
        there = [point for point in points if point.role == place]
        maskers += [Masker(point, kind=rule.kind, value=rule.value) for point, rule in zip(there, values, strict=True)]
    for one in maskers:
        one.masks = {"all": None}
    with torch.no_grad(), replacing([(one.point, one) for one in maskers]):
        return network(ids).last, maskers


@pytest.mark.parametrize(
    ("ffn", "places"),
    [("swiglu", ("intermediate",)), ("swiglu", ("gate",)), ("relu", ("input", "intermediate"))],
)
def test_a_model_is_that_of_the_analysis_for_texts_and_token_by_token(ffn, ids, places):
    network = make_network(ffn)
    (rules,) = calibrate(network, [(ids, None, None)], sparsities=[0.75], places=places)
    expected, maskers = masked_logits(network, rules, ids)
    assert all(0.6 < one.sparsity() < 0.9 for one in maskers)
    # Later layers, and later places of a layer, see what earlier masks changed.
    assert maskers[0].sparsity() == pytest.approx(0.75, abs=0.001)
    before = copy.deepcopy(network.state_dict())
    sparse = sparse_decoder(network, rules)
    torch.testing.assert_close(sparse(ids).last, expected)
    assert (expected - network(ids).last).abs().max() > 0.01  # masks change something
    # One token at a time takes the sparse path, and its choices are those of the masked model.
    prompt = ids[0, :6].tolist()
    found = generate(sparse, prompt, 6)
    text = list(prompt)
    for _ in range(6):
        window = torch.tensor([[*text, 0]])
        text.append(int(masked_logits(network, rules, window)[0][len(text) - 1].argmax()))
    assert list(found.ids) == text[6:] and len(set(found.ids)) > 1
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and not sparse_layers(network)
    assert len(sparse_layers(sparse)) == 3


def test_one_token_takes_the_sparse_path_and_others_do_not(network, ids):
    sparse = sparse_decoder(network, {"intermediate": Rule("max_p", 0.3)})
    layer = next(iter(sparse_layers(sparse).values()))
    parts, x = layer.parts(), torch.randn(2, 32)
    assert layer.choose(parts, x[:1]) is compute_active and layer.choose(parts, x) is compute_masked
    assert layer.choose(parts, x[:0]) is compute_masked
    x.requires_grad_()
    assert layer.choose(parts, x[:1]) is compute_masked
    (gradient,) = torch.autograd.grad(layer(x[:1]).sum(), x)
    assert float(gradient[0].abs().sum()) > 0
    with torch.no_grad():
        assert layer.choose(parts, x[:1]) is compute_active
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.choose(parts, x[:1]) is compute_masked


def test_casting_a_copy_does_not_change_the_model(network, ids):
    before = network(ids).last
    sparse = sparse_decoder(network, {"intermediate": Rule("threshold", 0.0)})
    shared = {weight.data_ptr() for weight in network.parameters()}
    assert sum(weight.data_ptr() in shared for weight in sparse.parameters()) == len(list(sparse.parameters()))
    torch.testing.assert_close(sparse(ids).last, before)
    sparse.double()
    assert {
        part.weight.dtype for part in next(iter(sparse_layers(sparse).values())).children() if hasattr(part, "weight")
    } == {torch.float64}
    assert torch.equal(network(ids).last, before)
    assert not any(weight.requires_grad for weight in sparse.parameters())


def test_what_is_refused(network, ids):
    missing = "^calibrate.places: found gate, which not all networks of the model have; use input, intermediate$"
    with pytest.raises(ConfigError, match=missing):
        calibrate(make_network("relu"), [(ids, None, None)], sparsities=[0.75], places=["gate"])
    with pytest.raises(UnknownNameError, match=r"^calibrate.places: unknown place 'gates'; did you mean 'gate'"):
        calibrate(network, [(ids, None, None)], sparsities=[0.75], places=["gates"])
    with pytest.raises(ConfigError, match="^calibrate.places: found no place; give some of input, gate, up, intermediate, all$"):
        calibrate(network, [(ids, None, None)], sparsities=[0.75], places=[])
    both = calibrate(network, [(ids, None, None)], sparsities=[0.75], places=["input", "intermediate"])
    assert calibrate(network, [(ids, None, None)], sparsities=[0.75], places=["all"]) == both
    (rules,) = calibrate(network, [(ids, None, None)], sparsities=[0.5])
    names = list(rules["intermediate"])
    assert names == [f"backbone.stages.{n}{'.0' if n == 3 else ''}.mlp" for n in (1, 2, 3)]
    sparse = sparse_decoder(network, rules)
    with pytest.raises(UnsupportedError, match="found a model in training mode; call eval"):
        sparse.train()(ids)
    with pytest.raises(UnsupportedError, match="weights are not saved; save the dense model"):
        sparse.state_dict()
    with pytest.raises(ConfigError, match="found other layers for intermediate than those of the model .backbone"):
        sparse_decoder(network, {"intermediate": dict(list(rules["intermediate"].items())[:2])})
    with pytest.raises(ConfigError, match=r"calibrate.sparsities: found 1\.0"):
        calibrate(network, [(ids, None, None)], sparsities=[0.5, 1.0])
    with pytest.raises(ConfigError, match="found no tokens"):
        calibrate(network, [(ids, None, torch.zeros(4, 32, dtype=torch.bool))], sparsities=[0.5])
    with pytest.raises(UnsupportedError, match="no feed-forward network"):
        sparse_decoder(nn.Linear(3, 3), {"input": Rule("threshold", 0.1)})


def test_thresholds_are_quantiles_of_recorded_tokens():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)))
    model[0][0].weight.data = torch.tensor([[1.0, 0], [0, 1], [2, 0], [0, 2]])
    x = torch.tensor([[1.0, 2], [3, 4], [99, 99]])
    mask = torch.tensor([True, True, False])
    found = calibrate(model, [(x, None, mask)], sparsities=[0.0, 0.25, 0.5, 0.99])
    # 1, 2, 2, 4 and 3, 4, 6, 8: of eight, none is below 1, two below the second 2, four below 4, and no share reaches 8.
    assert [one["intermediate"]["0"].value for one in found] == [1.0, 2.0, 4.0, 8.0]
    rules = found[2]["intermediate"]
    assert rules == {"0": Rule("threshold", 4.0)}
    layer = next(
        part for part in sparse_decoder(model, {"intermediate": rules}).modules() if isinstance(part, SparseFFN)
    )
    assert "intermediate: threshold 4" in repr(layer)


def test_bytes_of_a_decoder():
    backbone = BACKBONES.get("decoder")((33,), vocabulary=90, width=32, depth=3, heads=2, hidden=48)
    bytes_read = count_bytes(Network(backbone).bfloat16())
    ffn = 3 * 3 * 32 * 48
    norms, attention, table = 7 * 32, 3 * 4 * 32 * 32, 90 * 32
    assert (bytes_read.ffn, bytes_read.model) == (2 * ffn, 2 * (ffn + norms + attention + table))
    assert bytes_read.share({"gate": 0.5}) == pytest.approx(1 - ffn / 3 / (ffn + norms + attention + table))
    assert bytes_read.ceiling({"gate": 0.5}) == pytest.approx(1 / bytes_read.share({"gate": 0.5}))
