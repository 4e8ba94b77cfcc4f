"""Runs of two processes that train one model on CPUs, and of one process for comparison.

The test is the first process; this file, run as a script, is the second one.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from capture_runs import stream

from clframe.accounting import Ledger
from clframe.core import COMPONENTS, parse
from clframe.data import Source, class_incremental
from clframe.data.lazy import DatasetSamples
from clframe.exits import make_head
from clframe.nn import BACKBONES, Network
from clframe.training.cost_recorder import CostRecorder
from clframe.training.launch import _fabric, _joined_fabric
from clframe.training.module import ContinualModule
from clframe.training.rendezvous import join_group, open_store
from clframe.training.scores import Scores
from clframe.training.strategy import LightningStrategy

BATCH = 8
SGD = partial(torch.optim.SGD, lr=0.02, momentum=0.5)


def expression_of(name):
    """A strategy with the component; those that need a replay buffer get one."""
    component = COMPONENTS.get(name)
    return f"{name} + er" if component.needs_memory else name


def train_case(expression, *, group=None, backbone="mlp", accumulate=1, precision="64-true", per_class=13, epochs=2, experiences=3,
               clip=None, lazy=False, compile=False):  # fmt: skip
    """Everything that a run has computed, and the samples that its network has trained on in each epoch."""
    # By default 26 samples in each experience: last batches of 2, which every process computes.
    shape = (1, 8, 8) if backbone != "mlp" else (1, 4, 4)
    data = lazy_stream(per_class) if lazy else stream(per_class=per_class, shape=shape)
    composition = parse(expression)
    torch.manual_seed(3)
    names = {component.name for component in composition}
    net = BACKBONES.get(backbone)(data.input_shape, **OPTIONS.get(backbone, {}))
    tap = net.names[0] if backbone != "vit_tiny" else "encoder.0"
    heads = [] if "exits" in names or backbone != "mlp" else [(tap, make_head("auto", net.tap_shapes[tap]))]
    module = ContinualModule(Network(net, exits=heads), composition, optimizer=SGD, seed=3, clip=clip)
    costs, scores = CostRecorder(module.learner, Ledger()), Scores(data)
    fabric = _fabric("cpu", 1, precision) if group is None else _joined_fabric(group, precision)
    loop = LightningStrategy(
        model=module, benchmark=data, fabric=fabric, group=group, train_mb_size=BATCH, train_epochs=epochs,
        eval_mb_size=7, evaluator=None, plugins=[costs, scores], accumulate=accumulate, compile=compile,
    )  # fmt: skip
    seen, terms, tallies = [], [], []

    def note(network, inputs):
        if network.training and torch.is_grad_enabled():
            epoch = int(loop.clock.train_exp_counter), int(loop.clock.train_exp_epochs)
            seen.extend((epoch, value) for value in inputs[0].flatten(1)[:, 0].tolist())

    module.network.register_forward_pre_hook(note)

    def log(strategy):
        terms.append((strategy.learner.flush_terms(), strategy.gradient_norm()))

    loop.on_step = log
    for index, experience in enumerate(data.avalanche.train_stream[:experiences]):
        costs.begin(index)
        loop.train(experience)
        loop.eval(data.evaluation_stream[: index + 1])
        tallies.append(scores.tally.as_tree())
        costs.finish()
    ledger = costs.ledger
    return {
        "weights": [value.detach().clone() for value in module.network.state_dict().values()],
        "states": plain(module.learner.state),
        "terms": terms,
        "tallies": tallies,
        "costs": [ledger.by_component(), ledger.by_phase(), ledger.steps(), ledger.samples()],
        "seen": seen,
    }


def lazy_stream(per_class):
    """Images that are read sample by sample, in three experiences."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(6).repeat(per_class)
    images = torch.randint(200, (len(y), 1, 4, 4), generator=generator, dtype=torch.uint8)
    samples = DatasetSamples.of(images, y, mean=(100.0,), std=(50.0,), num_workers=0)
    return class_incremental(Source("files", samples, samples, classes=6), experiences=3, order="sorted")


OPTIONS = {"mlp": {"width": 8}, "vit_tiny": {"patch": 4, "width": 8, "depth": 1, "heads": 2}}


def plain(state):
    """A state with networks replaced by their weights, which can be written to a file."""
    if isinstance(state, torch.nn.Module):
        return dict(state.state_dict())
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [plain(value) for value in state]
    return state


def differences(a, b, *, tolerance=0.0, path=""):
    """Places where two nested values differ by more than a tolerance."""
    if isinstance(a, torch.Tensor):
        if a.shape != b.shape:
            return [f"{path}: {tuple(a.shape)} and {tuple(b.shape)}"]
        close = torch.isclose(a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
        return [] if bool(close.all()) else [f"{path}: {float((a.double() - b.double()).abs().max())}"]
    if isinstance(a, dict):
        keys = [] if a.keys() == b.keys() else [f"{path}: {sorted(map(str, a))} and {sorted(map(str, b))}"]
        return keys or [d for k in a for d in differences(a[k], b[k], tolerance=tolerance, path=f"{path}/{k}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} entries"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True))
                for d in differences(x, y, tolerance=tolerance, path=f"{path}/{i}")]  # fmt: skip
    if isinstance(a, float) and isinstance(b, float):
        fine = a == b or (a != a and b != b) or abs(a - b) <= tolerance * max(1.0, abs(a))
        return [] if fine else [f"{path}: {a} and {b}"]
    return [] if a == b else [f"{path}: {a} and {b}"]


def run_pair(cases, folder: Path):
    """Run cases in two processes; returns the results of both, by case."""
    torch.save(cases, folder / "cases.pt")
    store = open_store(0, size=2, first=True)
    with open(folder / "errors.txt", "w+") as errors:
        other = subprocess.Popen(
            [sys.executable, __file__, str(store.port), str(folder)], stderr=errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        try:
            group = join_group(store, rank=0, devices=[torch.device("cpu")] * 2)
            try:
                mine = {name: train_case(group=group, **options) for name, options in cases.items()}
            finally:
                group.close()
            code = other.wait(timeout=60)
        finally:
            other.kill()
            other.wait()
        errors.seek(0)
        assert code == 0, errors.read()
    return mine, torch.load(folder / "other.pt", weights_only=False)


def main():
    port, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    cases = torch.load(folder / "cases.pt", weights_only=False)
    group = join_group(open_store(port, size=2, first=False), rank=1, devices=[torch.device("cpu")] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {name: train_case(group=group, **options) for name, options in cases.items()}
    torch.save(found, folder / "other.pt")
    with contextlib.suppress(RuntimeError):  # the first process may have left already
        group.close()


if __name__ == "__main__":
    main()
