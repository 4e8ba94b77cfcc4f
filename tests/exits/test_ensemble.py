"""Ensembles against longhand formulas; -inf stays -inf; results exit by exit equal those of all exits together."""

from __future__ import annotations

import copy
from math import exp, inf, log

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clframe.errors import ConfigError, DataError
from clframe.exits.ensembles import Geometric, Mean, ProductOfExperts, RunningEnsemble, make_ensemble
from clframe.nn import GrowingLinear, Network, freeze, restore
from clframe.nn.backbones import mlp
from clframe.nn.exit_ensemble import Single

KINDS = ["geometric", "product", "mean"]
SIZES = [(1, 1, 1), (1, 4, 3), (3, 5, 7), (4, 1, 2), (6, 3, 10)]


def drawn(exits: int, batch: int, classes: int, *, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(exits, batch, classes, generator=generator, dtype=torch.float64) * 3)


def made(kind: str, exits: int, classes: int, *, final: str = "member", spread: float = 0.7):
    """An ensemble in float64, a geometric one with weights and biases far from their start."""
    ensemble = make_ensemble(kind, exits=exits, final=final)
    ensemble.grow(range(classes))
    ensemble.double()
    generator = torch.Generator().manual_seed(9)
    for parameter in ensemble.parameters():
        parameter.data.normal_(0, spread, generator=generator)
    return ensemble


def stepwise(ensemble, logits):
    scores, carried = [], ()
    for exit, logits_BC in enumerate(logits):
        scores_BC, carried = ensemble.step(exit, logits_BC, carried)
        scores.append(scores_BC)
    return scores


def longhand(kind, ensemble, p, m, b, c):
    """Score of class c for sample b at the m-th exit (from 1), from probabilities p[j][b][c]."""
    if kind == "product":
        return sum(log(p[j][b][c]) for j in range(m)) / m
    if kind == "mean":
        return log(sum(p[j][b][c] for j in range(m)) / m)
    w, bias = ensemble.weights[m - 1].tolist(), ensemble.bias.tolist()
    return sum(exp(w[j]) * log(p[j][b][c]) for j in range(m)) / m + bias[m - 1][c]


@pytest.mark.parametrize(("exits", "batch", "classes"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_formula_written_longhand(kind, exits, batch, classes):
    logits = drawn(exits, batch, classes)
    ensemble = made(kind, exits, classes)
    p = [F.softmax(logits_BC, 1).tolist() for logits_BC in logits]
    for found in (ensemble(logits), stepwise(ensemble, logits)):
        for m in range(1, exits + 1):
            expected = [[longhand(kind, ensemble, p, m, b, c) for c in range(classes)] for b in range(batch)]
            torch.testing.assert_close(
                found[m - 1], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
            )


def test_hand_computed_numbers():
    logits = [torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.2, 0.8]]).log(), torch.tensor([[0.5, 0.5]]).log()]
    product = ProductOfExperts(3, final="member")(logits)
    torch.testing.assert_close(product[1].softmax(1), torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(Mean(3, final="member")(logits)[1].exp(), torch.tensor([[0.5, 0.5]]))
    # 0.8, 0.2 | 0.4, 0.6: the mean is 0.6, 0.4 and the product sqrt(0.32), sqrt(0.12).
    logits[1] = torch.tensor([[0.4, 0.6]]).log()
    torch.testing.assert_close(Mean(3)(logits)[1].exp(), torch.tensor([[0.6, 0.4]]))
    torch.testing.assert_close(ProductOfExperts(3)(logits)[1].exp(), torch.tensor([[0.32**0.5, 0.12**0.5]]))


@pytest.mark.parametrize("final", ["separate", "member"])
@pytest.mark.parametrize(("exits", "batch", "classes"), SIZES)
def test_without_weights_and_biases_geometric_is_the_product_of_experts(exits, batch, classes, final):
    logits = drawn(exits, batch, classes, seed=1)
    ensemble = made("geometric", exits, classes, final=final, spread=0.0)
    product = ProductOfExperts(exits, final=final)(logits)
    for found in (ensemble(logits), stepwise(ensemble, logits)):
        for scores_BC, expected_BC in zip(found, product, strict=True):
            torch.testing.assert_close(scores_BC, expected_BC, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_separate_last_exit_outputs_its_own_logits(kind):
    logits = drawn(4, 3, 5)
    separate, member = made(kind, 4, 5, final="separate"), made(kind, 4, 5)
    for found in (separate(logits), stepwise(separate, logits)):
        assert found[-1] is logits[-1]
        assert not torch.equal(found[1], logits[1])
    assert separate.members == 3
    assert member.members == 4
    assert not torch.allclose(member(logits)[-1].softmax(1), logits[-1].softmax(1))
    if kind != "geometric":  # whose weights are drawn for each size
        assert all(torch.equal(a, b) for a, b in zip(separate(logits)[:3], member(logits)[:3], strict=True))
    assert stepwise(separate, logits[:1])[0].shape == (3, 5)


@pytest.mark.parametrize("final", ["separate", "member"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_exit_is_a_plain_network(kind, final):
    logits = drawn(1, 2, 3)
    ensemble = made(kind, 1, 3, final=final, spread=0.0)
    (scores_BC,) = ensemble(logits)
    torch.testing.assert_close(scores_BC.softmax(1), logits[0].softmax(1), rtol=1e-12, atol=0)
    assert (scores_BC is logits[0]) == (final == "separate")


@pytest.mark.parametrize("kind", KINDS)
def test_samples_do_not_see_each_other_and_carried_tensors_are_batch_first(kind):
    logits, keep = drawn(5, 6, 4), torch.tensor([4, 0, 3])
    ensemble = made(kind, 5, 4)
    whole = stepwise(ensemble, logits)
    carried = ()
    for exit, logits_BC in enumerate(logits):
        if exit < 2:
            _, carried = ensemble.step(exit, logits_BC, carried)
            assert all(len(tensor) == 6 for tensor in carried)
        else:
            if exit == 2:
                carried = tuple(tensor[keep] for tensor in carried)
            scores_BC, carried = ensemble.step(exit, logits_BC[keep], carried)
            torch.testing.assert_close(scores_BC, whole[exit][keep], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_not_met_stay_out_and_gradients_stay_finite(kind):
    masked = torch.tensor([False, True, False, False, True])
    own = [logits_BC.requires_grad_() for logits_BC in drawn(4, 3, 5)]
    ensemble = made(kind, 4, 5).requires_grad_(True)
    small = made(kind, 4, 3)
    for large, other in zip(ensemble.parameters(), small.parameters(), strict=True):
        other.data.copy_(large.data[:, ~masked] if large.ndim == 2 else large.data)
    for run in (ensemble, lambda logits: stepwise(ensemble, logits)):
        ensemble.zero_grad()
        logits = [logits_BC.masked_fill(masked, -inf) for logits_BC in own]
        scores = run(logits)
        reduced = small([logits_BC[:, ~masked] for logits_BC in own])
        for scores_BC, reduced_BC in zip(scores, reduced, strict=True):
            assert (scores_BC[:, masked] == -inf).all()
            torch.testing.assert_close(scores_BC[:, ~masked], reduced_BC, rtol=1e-12, atol=1e-12)
        sum(F.cross_entropy(scores_BC, torch.tensor([0, 2, 3])) for scores_BC in scores).backward()
        for tensor in (*own, *ensemble.parameters()):
            assert tensor.grad.isfinite().all()
            assert tensor.grad.abs().sum() > 0
        assert all((logits_BC.grad[:, masked] == 0).all() for logits_BC in own)
        if kind == "geometric":
            assert (ensemble.bias.grad[:, masked] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_very_sure_exits_give_finite_scores(kind):
    logits = [torch.tensor([[0.0, 500.0, -500.0]]), torch.tensor([[900.0, 0.0, 0.0]])]
    ensemble = make_ensemble(kind, exits=2, final="member")
    ensemble.grow(range(3))
    assert all(scores_BC.isfinite().all() for scores_BC in ensemble(logits))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_agree_with_finite_differences(kind):
    logits = [logits_BC.requires_grad_() for logits_BC in drawn(3, 2, 4)]
    ensemble = made(kind, 3, 4).requires_grad_(True)
    tensors = [*logits, *ensemble.parameters()]
    assert torch.autograd.gradcheck(lambda *_: tuple(ensemble(logits)), tensors)
    assert torch.autograd.gradcheck(lambda *_: tuple(stepwise(ensemble, logits)), tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_logits_are_combined_in_single_precision(kind):
    half = [logits_BC.bfloat16() for logits_BC in drawn(4, 3, 6)]
    ensemble = made(kind, 4, 6).float()
    plain = ensemble([logits_BC.float() for logits_BC in half])
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            for found in (ensemble(half), stepwise(ensemble, half)):
                for a, b in zip(found, plain, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_geometric_starts_near_the_product_and_is_drawn_by_the_global_seed():
    torch.manual_seed(3)
    first, again = Geometric(60, final="member"), Geometric(60, final="member")
    torch.manual_seed(3)
    same = Geometric(60, final="member")
    assert [w.numel() for w in first.weights] == list(range(1, 61))
    drawn_w = torch.cat(list(first.weights))
    assert 0.009 < drawn_w.std() < 0.011  # 1830 draws: five standard errors are 0.0008
    assert drawn_w.mean().abs() < 0.001
    assert all(torch.equal(a, b) for a, b in zip(first.weights, same.weights, strict=True))
    assert not torch.equal(first.weights[-1], again.weights[-1])
    assert not any(p.requires_grad for p in first.parameters())
    assert all((w == 0).all() for w in Geometric(4, deviation=0.0).weights)


def test_biases_grow_with_the_classes():
    ensemble = Geometric(4)
    assert ensemble.classes == 0
    assert ensemble.grow([0, 2])
    assert tuple(ensemble.bias.shape) == (3, 3)
    ensemble.bias.data.copy_(torch.arange(9.0).view(3, 3))
    ensemble.bias.requires_grad_(True)
    assert not ensemble.grow([1, 0])
    assert not ensemble.grow([])
    before = ensemble.bias
    assert ensemble.grow(iter([4]))
    assert ensemble.bias is not before
    assert ensemble.bias.requires_grad
    assert ensemble.bias.tolist() == [[0, 1, 2, 0, 0], [3, 4, 5, 0, 0], [6, 7, 8, 0, 0]]
    weights = list(ensemble.weights)
    ensemble.grow([9])
    assert all(a is b for a, b in zip(weights, ensemble.weights, strict=True))


@pytest.mark.parametrize("classes", [0, 2, 9])
def test_a_state_of_any_size_loads(classes):
    saved = Geometric(3)
    saved.grow(range(5))
    saved.bias.data.normal_()
    state = copy.deepcopy(saved.state_dict())
    other = Geometric(3)
    other.grow(range(classes))
    other.load_state_dict(state)
    assert other.classes == 5
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
    assert not other.bias.requires_grad
    with pytest.raises(RuntimeError, match="size mismatch"):
        Geometric(5).load_state_dict(state)


def test_the_network_grows_and_restores_its_ensemble():
    torch.manual_seed(0)
    network = Network(mlp((1, 4, 4), width=8), exits=[("layer1", GrowingLinear(8))])
    network.ensemble = Geometric(2)
    network.grow([0, 1, 2])
    x = torch.randn(3, 1, 4, 4)
    assert network.ensemble.classes == 3
    network.ensemble.bias.data.normal_()
    teacher = freeze(network)
    state = copy.deepcopy(teacher.state_dict())
    network.grow([3, 4])
    assert [tuple(s.shape) for s in network.ensemble(network(x).logits)] == [(3, 5), (3, 5)]
    back = restore(network, state)
    for a, b in zip(back.ensemble(back(x).logits), teacher.ensemble(teacher(x).logits), strict=True):
        assert torch.equal(a, b)


def test_wrong_numbers_are_one_line():
    logits = drawn(3, 2, 4)
    with pytest.raises(ConfigError, match=r"^ensemble: found 3 exits, expected 5; make it for 3 exits$"):
        ProductOfExperts(5)(logits)
    with pytest.raises(ConfigError, match=r"^ensemble: found 3 exits, expected 5; make it for 3 exits$"):
        Geometric(5)(logits)
    with pytest.raises(ConfigError, match=r"^ensemble: found exit 2, counted from 0; make it for more than 2 exits$"):
        Mean(2).step(2, logits[0], ())
    with pytest.raises(ConfigError, match=r"^ensemble: found 0 exits; give at least 1$"):
        Mean(0)
    for run in (Geometric(3), lambda logits: stepwise(Geometric(3), logits)):
        with pytest.raises(DataError, match=r"^ensemble: found logits of 4 classes; grow it from 0 to 4$"):
            run(logits)
    with pytest.raises(ConfigError, match=r"^ensemble: found 'sum'; give 'single', 'boosted', 'geometric', 'mean'"):
        make_ensemble("sum", exits=3)


def test_names_make_the_classes():
    assert isinstance(make_ensemble("single", exits=3), Single)
    assert isinstance(make_ensemble("boosted", exits=3), Single)
    found = [type(make_ensemble(kind, exits=3)) for kind in KINDS]
    assert found == [Geometric, ProductOfExperts, Mean]
    assert all(issubclass(kind, RunningEnsemble) for kind in found)
    assert isinstance(make_ensemble("mean", exits=3), nn.Module)
