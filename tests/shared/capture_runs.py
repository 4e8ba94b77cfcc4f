"""Runs with and without recorded steps, on a CPU with a stand-in for CUDA graphs or on a GPU."""

from __future__ import annotations

import itertools
from functools import partial

import torch
from conformance_runs import NEEDS_TOKENS
from recorded_graphs import RecordedGraphs

from clframe.accounting import Ledger
from clframe.core import COMPONENTS, parse
from clframe.data import Source, TensorSamples, class_incremental
from clframe.exits import make_head
from clframe.nn import BACKBONES, Network
from clframe.nn.graphs import CudaGraphs
from clframe.training.capture import StepCapture
from clframe.training.cost_recorder import CostRecorder
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy

CAPTURABLE = [name for name in COMPONENTS.names() if COMPONENTS.get(name).capturable]
COMPOSED = [
    "naive",
    "er + exits(weights=ramp, every=1) + lwf",
    "derpp(update=step)",
    "er + exits(regime=disjoint, every=1) + ssil",
    "er + sparsity(ramp=step, schedule=linear)",
    "er(update=step, selection=reservoir) + ewc",
]
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.5, fused=True)


def stream(per_class=13, shape=(1, 4, 4)):
    """Six classes in three experiences; the last batch of an epoch is smaller."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(6).repeat(per_class)
    x = torch.randn(len(y), *shape, generator=generator) + y.reshape(-1, 1, 1, 1)
    data = TensorSamples(x, y)
    return class_incremental(Source("blobs", data, data, classes=6), experiences=3, order="sorted")


def prepare(expression, *, data, device="cpu", epochs=3, optimizer=SGD, clip=None, backbone="mlp", gamma=0.8, plugins=()):
    """A strategy for ``data``, and what counts its costs."""
    composition = parse(expression)
    if any(c.needs_memory for c in composition) and not any(c.keeps_memory for c in composition):
        composition = composition + COMPONENTS.get("er")()
    torch.manual_seed(3)
    names = {component.name for component in composition}
    tokens = bool(names & NEEDS_TOKENS)
    if tokens:
        net = BACKBONES.get("vit_tiny")(data.input_shape, patch=2, width=12, depth=2, heads=2)
    else:
        net = BACKBONES.get(backbone)(data.input_shape, width=16)
    tap = "encoder.0" if tokens else net.names[0]
    heads = [] if "exits" in names else [(tap, make_head("token" if tokens else "auto", net.tap_shapes[tap]))]
    module = ContinualModule(
        Network(net, exits=heads), composition, optimizer=optimizer, seed=3, clip=clip,
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=gamma),
    )  # fmt: skip
    costs = CostRecorder(module.learner, Ledger())
    loop = LightningStrategy(
        model=module, benchmark=data, train_mb_size=6, train_epochs=epochs, eval_mb_size=64, evaluator=None,
        device=device, plugins=[costs, *plugins],
    )  # fmt: skip
    return loop, costs


def train(loop, costs, data, *, recorded, experiences=None):
    """Weights, states, loss terms, costs and gradient norms of a run, and the graphs recorded in each experience."""
    counts, terms = [], []
    if recorded:
        graphs = CudaGraphs(loop.device) if loop.device.type == "cuda" else RecordedGraphs()
        loop.step_capture = StepCapture(loop, graphs=graphs, required=True)

    def log(strategy):
        if strategy.clock.train_iterations % 3 == 0:
            terms.append((strategy.learner.flush_terms(), strategy.gradient_norm()))

    loop.on_step = log
    for index, experience in enumerate(itertools.islice(data.avalanche.train_stream, experiences)):
        costs.begin(index)
        loop.train(experience)
        costs.finish()
        terms.append(loop.learner.flush_terms())
        counts.append(loop.step_capture.recorded if recorded else 0)
    ledger = costs.ledger
    return {
        "weights": [value.detach().clone() for value in loop.model.state_dict().values()],
        "states": loop.learner.state,
        "terms": terms,
        "costs": [ledger.by_component(), ledger.by_phase(), ledger.steps(), ledger.samples()],
    }, counts


def equal(a, b):
    """Whether two nested values are equal bit for bit; networks, such as teachers, by their weights."""
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan() if a.is_floating_point() else a == b)).all())
    if isinstance(a, torch.nn.Module):
        return equal(dict(a.state_dict()), dict(b.state_dict()))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)
