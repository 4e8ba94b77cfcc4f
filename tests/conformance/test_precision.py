"""Every component in every precision: half precision changes rounding, not what a strategy does or stores."""

from __future__ import annotations

import math
import re
from functools import partial

import pytest
import torch
from conformance_runs import NAMES, benchmark, fed, same, untrained
from lightning import Fabric

from clframe.core import COMPONENTS, compose
from clframe.nn import Network
from clframe.nn.features import class_sums
from clframe.regularization.importance import gradient_sums
from clframe.training.checkpoint import decode, encode
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
COMPOSED = ["er + exits(every=1) + lwf", "derpp + ewc", "si + sparsity", "icarl"]


def train(strategy, *, precision, engine="fabric", device="cpu", accumulate=1, batch=5, experiences=2):
    """A strategy trained on two experiences, and the means of its loss terms."""
    stream = benchmark()
    network = untrained(strategy, stream)
    module = ContinualModule(network, fed(strategy), optimizer=partial(torch.optim.SGD, lr=0.05), seed=3)
    fabric = Fabric(accelerator=device, devices=1, precision=precision)
    fabric.launch()
    loop = LightningStrategy(
        model=module, benchmark=stream, train_mb_size=batch, train_epochs=2, eval_mb_size=16, evaluator=None, fabric=fabric,
        engine=engine, accumulate=accumulate,
    )  # fmt: skip
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    for experience in stream.avalanche.train_stream[:experiences]:
        loop.train(experience)
    loop.eval(stream.avalanche.test_stream[:experiences])
    return loop, loop.learner.flush_terms(), before


def floats(value, where=""):
    """The floating-point tensors of a nested value, by place; networks are left out."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield where, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from floats(item, f"{where}/{key}")
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from floats(item, f"{where}/{place}")


def check_terms(terms, full, *, share=0.2):
    """Compare means of loss terms, up to a share of them and 0.05.

    Half precision keeps 8 (bfloat16) or 11 bits, terms may be small differences, and weights that are stored in it
    round every update: kernels of other CPUs and versions of torch then differ by a fifth.
    """
    assert terms.keys() == full.keys()
    for name, mean in terms.items():
        close = abs(mean - full[name]) <= share * abs(full[name]) + 0.05
        assert math.isfinite(mean) and close, (name, mean, full[name])


def check_mixed(strategy, precision, *, engine, device="cpu"):
    loop, terms, before = train(strategy, precision=precision, engine=engine, device=device)
    _, full, _ = train(strategy, precision="32-true", engine="fabric", device=device)
    learner, network = loop.learner, loop.learner.network
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert all(bool(torch.isfinite(p).all()) for p in network.parameters())
    for place, value in floats(learner.state):
        assert value.dtype in (torch.float32, torch.float64), f"{place} is stored in {value.dtype}"
    composition = compose(COMPONENTS.get(strategy)()) if strategy in NAMES else learner.composition
    if any(component.training_experiences(0, 3) for component in composition):
        now = dict(network.named_parameters())
        assert any(not torch.equal(now[name].detach().cpu(), value) for name, value in before.items()
                   if name.startswith("backbone.") and name in now)  # fmt: skip
    check_terms(terms, full)
    if not any(isinstance(part, Network) for part in learner.state.values()):
        assert same(learner.state, decode(encode(learner.state), network))
    return loop


@pytest.mark.parametrize("engine", ["fabric", "trainer"])
@pytest.mark.parametrize("strategy", COMPOSED)
def test_strategies_train_in_mixed_precision(strategy, engine):
    check_mixed(strategy, "bf16-mixed", engine=engine)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fabric", "trainer"])
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_in_mixed_precision(name, engine):
    check_mixed(name, "bf16-mixed", engine=engine)


OF_THE_NETWORK = re.compile(r"/(logits|rows/\d+/(weight|bias)|share)$")
"""State in the type of the network: logits and rows as it has computed them, and the weights of classes in a loss."""


def check_half(strategy):
    loop, terms, _ = train(strategy, precision="bf16-true")
    _, full, _ = train(strategy, precision="32-true")
    learner = loop.learner
    assert {p.dtype for p in learner.network.parameters()} == {torch.bfloat16}
    assert all(bool(torch.isfinite(p).all()) for p in learner.network.parameters())
    for place, value in floats(learner.state):
        wide = value.dtype in (torch.float32, torch.float64)
        assert wide or OF_THE_NETWORK.search(place), f"{place} is summed or solved in {value.dtype}"
    check_terms(terms, full, share=0.5)


@pytest.mark.parametrize("strategy", COMPOSED)
def test_strategies_train_with_weights_in_half_precision(strategy):
    check_half(strategy)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_with_weights_in_half_precision(name):
    check_half(name)


def test_importances_and_class_sums_grow_beyond_what_half_precision_adds():
    """2 added to 512 is 512 in bfloat16, so sums over many samples would stop there."""
    ones = torch.ones(600, 1, dtype=torch.bfloat16)
    weight = {"w": torch.ones(1, dtype=torch.bfloat16)}
    for power in (1, 2):
        sums = gradient_sums(lambda w, x, label: (w["w"] * x).sum(), weight, ones, ones, power=power, chunk=2)
        assert sums["w"].item() == 600 and sums["w"].dtype == torch.float32
    stream = benchmark(classes=1, per_class=600, experiences=1)
    network = untrained("naive", stream).to(torch.bfloat16)
    network.grow([0])
    (sum_CF,), _ = class_sums(network, stream.train[0], batch_size=2)
    (wide_CF,), _ = class_sums(network.float(), stream.train[0])
    assert sum_CF.dtype == torch.float32
    torch.testing.assert_close(sum_CF, wide_CF, rtol=0.01, atol=1.0)


BATCHWISE = {
    "agem": "projects the gradient of every batch",
    "bic": "holds out samples, so that the last batch of an epoch is smaller",
    "derpp": "draws replayed samples for every batch",
    "gss": "chooses samples by the gradient of every batch",
    "mir": "draws replayed samples for every batch, by the losses after a virtual step",
    "prd": "compares the samples of a batch with one another",
}
"""Components for which several accumulated batches are not one larger batch, and why."""


def check_accumulated(strategy):
    """Return whether two batches of four lead to the weights that one of eight does, in an epoch without a rest."""
    ends = []
    for batch, accumulate in ((8, 1), (4, 2)):
        loop, _, _ = train(strategy, precision="32-true", batch=batch, accumulate=accumulate)
        ends.append([p.detach() for p in loop.learner.network.parameters() if p.numel()])
    return all(float((p - q).abs().max() / p.abs().max().clamp_min(1e-6)) < 1e-4 for p, q in zip(*ends, strict=True))


@pytest.mark.parametrize("strategy", ["er + exits(every=1) + lwf", "ewc + si + sparsity"])
def test_accumulated_batches_are_one_larger_batch(strategy):
    assert check_accumulated(strategy)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_accumulated_batches_are_one_larger_batch_unless_it_acts_batch_by_batch(name):
    assert check_accumulated(name) == (name not in BATCHWISE)


SCALE = 256.0


@pytest.fixture
def small_scale(monkeypatch):
    """Begin with a scale by which no gradient here overflows: skipped updates would change more than rounding does."""
    scaler = torch.amp.GradScaler.__init__
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", lambda self, *a, **k: scaler(self, *a, **{**k, "init_scale": SCALE}))


@pytest.mark.parametrize("name", [pytest.param(name, marks=GPU) for name in NAMES])
def test_it_trains_with_scaled_gradients_on_a_gpu(name, small_scale):
    loop = check_mixed(name, "16-mixed", engine="fabric", device="cuda")
    assert loop.fabric._precision.state_dict()["scale"] == SCALE and not any(loop.module.divergence.skipped.values())


@pytest.mark.parametrize("strategy", [pytest.param(strategy, marks=GPU) for strategy in COMPOSED])
def test_strategies_train_with_scaled_gradients_in_a_trainer_on_a_gpu(strategy, small_scale):
    check_mixed(strategy, "16-mixed", engine="trainer", device="cuda")
