"""Fitting an ensemble: it helps, it is deterministic, and nothing else moves."""

from __future__ import annotations

import copy
from math import exp, inf, log

import pytest
import torch
from torch.nn.functional import cross_entropy

from clframe.errors import DataError
from clframe.exits.ensembles import Geometric, Mean, ProductOfExperts, fit_ensemble, fit_on_samples
from clframe.exits.head_kinds import make_head
from clframe.nn import Network
from clframe.nn.backbones import resnet20
from clframe.nn.exit_ensemble import Single


def cached(exits: int, samples: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that know the class, the later the better, some of them much too sure."""
    generator = torch.Generator().manual_seed(0)
    y_N = torch.randint(classes, (samples,), generator=generator)
    logits_KNC = torch.randn(exits, samples, classes, generator=generator)
    hint_NC = torch.nn.functional.one_hot(y_N, classes)
    sure_K = torch.linspace(0.5, 3.0, exits).view(-1, 1, 1)
    return sure_K * (logits_KNC + 1.2 * hint_NC), y_N


def geometric(exits: int, classes: int, *, deviation: float = 0.01, final: str = "separate", seed: int = 1) -> Geometric:
    torch.manual_seed(seed)
    ensemble = Geometric(exits, deviation=deviation, final=final)
    ensemble.grow(range(classes))
    return ensemble


def at(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nll(ensemble, logits_KNC, y_N) -> torch.Tensor:
    scores = ensemble(list(logits_KNC))
    return torch.stack([cross_entropy(scores_NC, y_N) for scores_NC in scores])


@pytest.mark.parametrize("final", ["separate", "member"])
def test_a_fitted_ensemble_is_better_on_its_data_than_the_product_of_experts(final):
    logits_KNC, y_N = cached(4, 500, 6)
    ensemble = geometric(4, 6, final=final)
    start_K = nll(ProductOfExperts(4, final=final), logits_KNC, y_N)
    found_K = fit_ensemble(ensemble, logits_KNC, y_N, epochs=8, lr=5e-3, generator=at(0))
    torch.testing.assert_close(found_K, nll(ensemble, logits_KNC, y_N))
    better = start_K - found_K
    assert (better[:3] > 1e-3).all()
    assert better[3] > 1e-3 if final == "member" else better[3].abs() < 1e-6


def test_with_the_published_rate_it_is_not_worse():
    logits_KNC, y_N = cached(3, 400, 5)
    found_K = fit_ensemble(geometric(3, 5), logits_KNC, y_N, epochs=5, generator=at(0))
    assert (found_K <= nll(ProductOfExperts(3), logits_KNC, y_N) + 1e-6).all()


def test_without_epochs_it_takes_thousands_of_steps_in_whole_passes(monkeypatch):
    logits_KNC, y_N = cached(3, 300, 5)
    taken = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: taken.append(1))
    fit_ensemble(geometric(3, 5), logits_KNC, y_N, generator=at(0))
    assert len(taken) == 4002  # 1,334 passes of 3 steps
    monkeypatch.undo()
    monkeypatch.setattr("clframe.exits.ensembles.FIT_STEPS", 400)
    found_K = fit_ensemble(geometric(3, 5), logits_KNC, y_N, generator=at(0))
    assert torch.equal(found_K, fit_ensemble(geometric(3, 5), logits_KNC, y_N, epochs=134, generator=at(0)))


def test_biases_learn_how_frequent_classes_are():
    y_N = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    ensemble = geometric(2, 3, final="member")
    found_K = fit_ensemble(ensemble, torch.zeros(2, 100, 3), y_N, epochs=400, lr=0.02, batch_size=100, generator=at(0))
    entropy = -sum(p * log(p) for p in (0.6, 0.3, 0.1))
    torch.testing.assert_close(found_K, torch.tensor([entropy, entropy]), rtol=0, atol=1e-4)
    torch.testing.assert_close(ensemble.bias.softmax(1), torch.tensor([[0.6, 0.3, 0.1]] * 2), rtol=0, atol=5e-3)


def test_the_first_step_is_adams_on_the_longhand_gradient():
    logits_KNC, y_N = cached(3, 7, 4)
    logits_KNC = logits_KNC.double()
    ensemble = geometric(3, 4, deviation=0.3).double()
    w, b = [v.tolist() for v in ensemble.weights], ensemble.bias.detach().clone()
    log_p = logits_KNC.log_softmax(2)
    expected_w, expected_b = [], []
    for m in (1, 2):
        scores = sum(exp(w[m - 1][j]) * log_p[j] for j in range(m)) / m + b[m - 1]
        error_NC = scores.softmax(1) - torch.nn.functional.one_hot(y_N, 4)  # the gradient of cross-entropy, times N
        for j in range(m):
            expected_w.append((error_NC * log_p[j] * exp(w[m - 1][j]) / m).sum() / 7)
        expected_b.append(error_NC.mean(0))
    fit_ensemble(ensemble, logits_KNC, y_N, epochs=1, lr=1e-2, batch_size=9, generator=at(0))

    def step(gradient):  # Adam's first: both moments are corrected to the gradient and its square
        return -1e-2 * gradient / (gradient.abs() + 1e-8)

    moved_w = torch.cat([after - torch.tensor(before) for after, before in zip(ensemble.weights, w, strict=True)])
    torch.testing.assert_close(moved_w, step(torch.stack(expected_w)), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ensemble.bias - b, step(torch.stack(expected_b)), rtol=1e-6, atol=1e-9)


def test_same_generator_same_weights_whatever_the_global_one():
    logits_KNC, y_N = cached(3, 50, 4)

    def fitted(seed: int) -> dict[str, torch.Tensor]:
        ensemble = geometric(3, 4)
        torch.manual_seed(torch.seed() % 1000)
        fit_ensemble(ensemble, list(logits_KNC), y_N, epochs=3, batch_size=8, generator=at(seed))
        return ensemble.state_dict()

    first, again, other = fitted(5), fitted(5), fitted(6)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["bias"], other["bias"])


@pytest.mark.parametrize("needed", [(False, False), (True, False), (True, True)])
def test_nothing_but_values_changes(needed):
    logits_KNC, y_N = cached(3, 20, 4)
    logits_KNC.requires_grad_(True)
    kept = logits_KNC.detach().clone()
    ensemble = geometric(3, 4)
    ensemble.weights.requires_grad_(needed[0])
    ensemble.bias.requires_grad_(needed[1])
    parameters = list(ensemble.parameters())
    before = copy.deepcopy(ensemble.state_dict())
    with torch.no_grad():
        fit_ensemble(ensemble, logits_KNC, y_N, epochs=1, generator=at(0))
    assert all(a is b for a, b in zip(ensemble.parameters(), parameters, strict=True))
    assert [w.requires_grad for w in ensemble.weights] == [needed[0]] * 2
    assert ensemble.bias.requires_grad is needed[1]
    assert all(p.grad is None for p in parameters)
    assert all(not torch.equal(before[key], value) for key, value in ensemble.state_dict().items())
    assert torch.equal(logits_KNC, kept)
    assert logits_KNC.grad is None


def test_flags_come_back_when_fitting_fails():
    logits_KNC, y_N = cached(3, 20, 4)
    ensemble = geometric(3, 6)
    with pytest.raises(DataError, match="found logits of 4 classes; grow it from 6"):
        fit_ensemble(ensemble, logits_KNC, y_N, epochs=1, generator=at(0))
    assert not any(p.requires_grad for p in ensemble.parameters())


@pytest.mark.parametrize("ensemble", [Single(), ProductOfExperts(3), Mean(3)])
def test_an_ensemble_without_parameters_is_measured_only(ensemble):
    logits_KNC, y_N = cached(3, 21, 4)
    found_K = fit_ensemble(ensemble, logits_KNC, y_N, epochs=3, generator=at(0))
    torch.testing.assert_close(found_K, nll(ensemble, logits_KNC, y_N))


def test_classes_not_met_do_no_harm():
    logits_KNC, y_N = cached(3, 40, 4)
    wide_KNC = torch.cat([logits_KNC[..., :2], torch.full((3, 40, 1), -inf), logits_KNC[..., 2:]], dim=2)
    narrow, wide = geometric(3, 4), geometric(3, 5)
    expected_K = fit_ensemble(narrow, logits_KNC, y_N, epochs=2, batch_size=16, generator=at(0))
    found_K = fit_ensemble(wide, wide_KNC, y_N + (y_N >= 2), epochs=2, batch_size=16, generator=at(0))
    torch.testing.assert_close(found_K, expected_K, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(wide.bias[:, [0, 1, 3, 4]], narrow.bias, rtol=0, atol=1e-6)
    assert (wide.bias[:, 2] == 0).all()


def test_one_class_and_one_sample():
    found_K = fit_ensemble(
        geometric(2, 1), torch.zeros(2, 1, 1), torch.zeros(1, dtype=torch.long), epochs=2, generator=at(0)
    )
    assert found_K.tolist() == [0.0, 0.0]


def test_no_samples_are_an_error():
    with pytest.raises(DataError, match=r"^ensemble: found no samples to fit it on; hold some out, or"):
        fit_ensemble(geometric(2, 3), torch.zeros(2, 0, 3), torch.zeros(0).long(), epochs=1, generator=at(0))


class Stored:
    """Samples as bytes, divided by 255 when prepared."""

    def __init__(self, size: int, *, seed: int) -> None:
        self.x = torch.randint(256, (size, 3, 8, 8), generator=at(seed), dtype=torch.uint8)
        self.y = torch.randint(3, (size,), generator=at(seed))

    def __len__(self) -> int:
        return len(self.x)

    def raw(self, index):
        return self.x[index]

    def prepare(self, raw, *, generator=None):
        assert generator is None  # no augmentation
        return raw.float() / 255


def network() -> Network:
    torch.manual_seed(0)
    backbone = resnet20((3, 8, 8), width=2)
    taps = ["layer1.1", "layer2.0"]
    found = Network(backbone, exits=[(tap, make_head("pool", backbone.tap_shapes[tap])) for tap in taps])
    found.ensemble = Geometric(3)
    found.grow([0, 1, 2])
    return found


def test_samples_are_run_once_in_evaluation_mode_and_nothing_else_changes():
    net, parts = network(), (Stored(11, seed=0), Stored(6, seed=1))
    net.backbone.stages[2].eval()
    flags = [module.training for module in net.modules()]
    before = copy.deepcopy(net.state_dict())
    found_K = fit_on_samples(net, iter(parts), epochs=2, batch_size=4, generator=at(3))
    assert [module.training for module in net.modules()] == flags
    moved = {key for key, value in net.state_dict().items() if not torch.equal(before[key], value)}
    assert moved == {"ensemble.weights.0", "ensemble.weights.1", "ensemble.bias"}
    twin = network()
    with torch.no_grad():
        twin.eval()
        logits_KNC = torch.stack(twin(torch.cat([part.x for part in parts]).float() / 255).logits)
    y_N = torch.cat([part.y for part in parts])
    expected_K = fit_ensemble(twin.ensemble, logits_KNC, y_N, epochs=2, batch_size=4, generator=at(3))
    torch.testing.assert_close(found_K, expected_K, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.ensemble.bias, twin.ensemble.bias, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("parts", [(), (Stored(0, seed=0),)])
def test_no_held_out_samples_are_an_error_and_change_nothing(parts):
    net = network()
    with pytest.raises(DataError, match=r"^ensemble: found no samples to fit it on"):
        fit_on_samples(net, parts, epochs=1, generator=at(0))
    assert all(module.training for module in net.modules())
