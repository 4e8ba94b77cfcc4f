"""Precision, accumulation and clipping do to a run what torch does when they are written out by hand."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from avalanche.benchmarks import class_incremental_benchmark
from avalanche.models import MultiTaskModule
from avalanche.training import DER, Naive
from avalanche.training import plugins as P
from lightning import Fabric
from sampled import sampled
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clframe.avalanche_bridge.fabric import on_fabric
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy


def fabric(precision: Any) -> Fabric:
    made = Fabric(accelerator="cpu", devices=1, precision=precision)
    made.launch()
    return made


class Spy(nn.Module):
    """Passes its input on and remembers its type."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(x.dtype)
        return x


class Watched(nn.Module):
    """A foreign module with a look at what passes between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.spy, self.head = nn.Linear(8, 16), Spy(), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.spy(torch.relu(self.body(x))))


def foreign(strategy: type[Any], model: nn.Module, **options: Any) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    options = {"train_mb_size": 10, "train_epochs": 2, "eval_mb_size": 16, "evaluator": None, **options}
    return strategy(model=model, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), **options)


def ours(toy: SimpleNamespace, expression: str = "naive", *, clip: float | None = None, **options: Any) -> Any:
    options = {**toy.options, "evaluator": None, **options}
    return LightningStrategy(model=toy.module(expression, seed=1, clip=clip), **options)


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return all(v.isfinite().all() for v in after.values()) and any(
        before[name].shape != after[name].shape or not torch.equal(before[name], after[name]) for name in after
    )


PRECISIONS = {
    "32-true": (torch.float32, torch.float32),
    "bf16-mixed": (torch.bfloat16, torch.float32),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
    "64-true": (torch.float64, torch.float64),
}


@pytest.mark.parametrize("evaluate_first", [False, True])
@pytest.mark.parametrize(("precision", "strategy"), sampled(list(PRECISIONS), [LightningStrategy, on_fabric(Naive)]))
def test_a_foreign_module_runs_in_the_precision_asked_for(
    toy: SimpleNamespace, precision: str, strategy: type[Any], evaluate_first: bool
) -> None:
    inside, stored = PRECISIONS[precision]
    model, benchmark = Watched(), toy.benchmark("new")
    learner = foreign(strategy, model, fabric=fabric(precision))
    if evaluate_first:
        learner.eval(benchmark.test_stream)
        assert model.spy.seen == {inside}
    before = toy.weights(model)
    for experience in benchmark.train_stream:
        learner.train(experience)
    learner.eval(benchmark.test_stream)
    assert model.spy.seen == {inside}
    assert {p.dtype for p in model.parameters()} == {stored}
    assert moved(before, toy.weights(model))


@pytest.mark.parametrize(("precision", "engine"), sampled(["bf16-mixed", "bf16-true"], ["fabric", "trainer"]))
@pytest.mark.parametrize("expression", ["naive", "er(memory=20) + lwf"])
def test_a_continual_module_runs_in_the_precision_asked_for(
    toy: SimpleNamespace, precision: str, engine: str, expression: str
) -> None:
    inside, stored = PRECISIONS[precision]
    benchmark = toy.benchmark("new")
    learner = ours(toy, expression, fabric=fabric(precision), engine=engine)
    spy = Spy()
    learner.module.network.backbone.stages[-1].register_forward_hook(lambda m, x, y: spy(y))
    before = toy.weights(learner.model)
    for experience in benchmark.train_stream:
        learner.train(experience)
        learner.eval(benchmark.test_stream)
    assert spy.seen == {inside}
    assert {p.dtype for p in learner.model.parameters()} == {stored}
    assert moved(before, toy.weights(learner.model))


def test_mixed_precision_is_autocast_around_forward_and_nothing_else(toy: SimpleNamespace) -> None:
    (data, *_) = [experience.dataset for experience in toy.benchmark("new").train_stream]
    torch.manual_seed(0)
    learner = foreign(LightningStrategy, Watched(), fabric=fabric("bf16-mixed"))
    learner.train(toy.benchmark("new").train_stream[0], shuffle=False)

    torch.manual_seed(0)
    model = Watched()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        for x, y, _task in DataLoader(data, batch_size=10):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits_BC = model(x)
            nn.functional.cross_entropy(logits_BC.float(), y).backward()
            optimizer.step()
    assert toy.same(toy.weights(learner.model), toy.weights(model))


@pytest.mark.parametrize("expression", ["naive", "lwf", "er(memory=20) + lwf"])
def test_trainer_and_fabric_agree_in_mixed_precision(toy: SimpleNamespace, expression: str) -> None:
    ends = []
    for engine in ("fabric", "trainer"):
        torch.manual_seed(0)
        learner = ours(toy, expression, fabric=fabric("bf16-mixed"), engine=engine)
        for experience in toy.benchmark("new").train_stream:
            learner.train(experience)
        ends.append(toy.weights(learner.model))
    assert toy.same(*ends)


PLUGINS = {
    "Replay": lambda: P.ReplayPlugin(20),
    "LwF": lambda: P.LwFPlugin(1.0, 2.0),
    "EWC": lambda: P.EWCPlugin(1.0),
    "SynapticIntelligence": lambda: P.SynapticIntelligencePlugin(1.0),
    "GEM": lambda: P.GEMPlugin(10, 0.5),
    "AGEM": lambda: P.AGEMPlugin(10, 10),
    "MIR": lambda: P.MIRPlugin(10, 60, 15),  # takes gradients of its own between forward and backward
    "RWalk": lambda: P.RWalkPlugin(delta_t=2),
}


@pytest.mark.parametrize(("name", "model"), sampled(list(PLUGINS), ["foreign", "ours"]))
def test_plugins_run_in_mixed_precision(toy: SimpleNamespace, name: str, model: str) -> None:
    ends = []
    for plugins in ([], [PLUGINS[name]()]):
        torch.manual_seed(0)
        options = {"plugins": plugins, "fabric": fabric("bf16-mixed")}
        learner = foreign(LightningStrategy, Watched(), **options) if model == "foreign" else ours(toy, **options)
        for experience in toy.benchmark("new").train_stream:
            learner.train(experience)
        ends.append(toy.weights(learner.model))
    assert moved(*ends)


def test_strategies_with_their_own_loop_run_in_mixed_precision(toy: SimpleNamespace) -> None:
    model = Watched()
    before = toy.weights(model)
    learner = foreign(on_fabric(DER), model, fabric=fabric("bf16-mixed"), mem_size=20)
    for experience in toy.benchmark("tasks").train_stream:
        learner.train(experience)
    assert model.spy.seen == {torch.bfloat16, torch.float32}  # DER reads its memory's logits outside the loop
    assert moved(before, toy.weights(model))


class TaskAware(MultiTaskModule):
    """A module that must be told the task; Avalanche tells only those it knows to be such."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = Watched()
        self.tasks: set[int] = set()

    def forward(self, x: Tensor, task_labels: Tensor) -> Tensor:
        self.tasks |= set(task_labels.tolist())
        return self.inside(x)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_modules_that_take_task_labels_get_them_in_other_precision(toy: SimpleNamespace, precision: str) -> None:
    model = TaskAware()
    learner = foreign(LightningStrategy, model, fabric=fabric(precision))
    learner.train(toy.benchmark("tasks").train_stream)
    assert model.tasks == {0, 1, 2}
    assert model.inside.spy.seen == {torch.bfloat16}


def even(samples: int) -> Any:
    """A benchmark of one experience and ``samples`` samples."""
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(samples, 8, generator=generator), torch.arange(samples) % 2)
    data.targets = data.tensors[1].tolist()
    return class_incremental_benchmark({"train": data, "test": data}, num_experiences=1, class_order=[0, 1])


def by_hand(
    module: ContinualModule, data: Any, *, batch: int, accumulate: int, clip: float | None, epochs: int = 2
) -> int:
    """The loop as anybody would write it; the number of updates."""
    network = module.network
    network.grow([0, 1])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    updates = 0
    for _ in range(epochs):
        loader = DataLoader(data, batch_size=batch)
        for i, (x, y, _task) in enumerate(loader):
            if i % accumulate == 0:
                optimizer.zero_grad()
            (nn.functional.cross_entropy(network(x).last, y) / accumulate).backward()
            if (i + 1) % accumulate == 0 or i + 1 == len(loader):
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
                optimizer.step()
                updates += 1
    return updates


@pytest.mark.parametrize(
    ("engine", "accumulate", "updates"), sampled(["fabric", "trainer"], [(1, 34), (2, 18), (3, 12), (100, 2)])
)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_accumulation_and_clipping_are_those_of_a_loop_written_by_hand(
    toy: SimpleNamespace, engine: str, accumulate: int, updates: int, clip: float | None
) -> None:
    """65 samples in batches of 4: seventeen batches, the last of one sample."""
    torch.manual_seed(0)
    learner = ours(toy, clip=clip, engine=engine, accumulate=accumulate, train_mb_size=4)
    steps = []
    learner.on_step = lambda strategy: steps.append(strategy._step_in_update == 0)
    learner.train(even(65).train_stream[0], shuffle=False)
    assert sum(steps) == updates and len(steps) == 34

    torch.manual_seed(0)
    reference = ours(toy, clip=clip)
    reference.learner.seed_everything("experience", 0)
    data = even(65).train_stream[0].dataset
    assert by_hand(reference.module, data, batch=4, accumulate=accumulate, clip=clip) == updates
    assert toy.same(toy.weights(learner.model), toy.weights(reference.module))


@pytest.mark.parametrize("engine", ["fabric", "trainer"])
def test_two_batches_of_four_are_one_of_eight(toy: SimpleNamespace, engine: str) -> None:
    ends = []
    for batch, accumulate in ((4, 2), (8, 1)):
        torch.manual_seed(0)
        learner = ours(toy, engine=engine, accumulate=accumulate, train_mb_size=batch)
        learner.train(even(64).train_stream[0], shuffle=False)
        ends.append(toy.weights(learner.model))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-4, atol=1e-6)


def test_a_foreign_module_accumulates_too(toy: SimpleNamespace) -> None:
    ends = []
    for batch, accumulate in ((4, 2), (8, 1), (4, 1)):
        torch.manual_seed(0)
        learner = foreign(LightningStrategy, Watched(), accumulate=accumulate, train_mb_size=batch)
        learner.train(even(64).train_stream[0], shuffle=False)
        ends.append(toy.weights(learner.model))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ends[0]["head.weight"], ends[2]["head.weight"], rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # Lightning's own
@pytest.mark.filterwarnings("ignore:The .train_dataloader. does not have many workers")
def test_clipping_in_a_trainer_acts_on_unscaled_gradients(toy: SimpleNamespace) -> None:
    """16-mixed scales the loss by 65536; its scaler also runs on the CPU, where Lightning offers no 16-mixed."""
    from lightning import Trainer
    from lightning.pytorch.plugins.precision import MixedPrecision

    from clframe.core import Experience
    from clframe.data import EpochLoader, TensorSamples

    y = torch.arange(4).repeat(16)
    data = TensorSamples(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) + y[:, None], y)

    class Unscaled(MixedPrecision):
        """The scaler without autocast, so that only scaling differs from 32 bit."""

        def forward_context(self) -> Any:
            return contextlib.nullcontext()

    def moved(clip: float | None, *, scaled: bool) -> float:
        toy.seed_all()
        module = toy.module(seed=1, clip=clip)
        plugins = [Unscaled("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))] if scaled else []
        module.begin(Experience(0, 1, (0, 1, 2, 3), (), (), data), epochs=2)
        before = [p.detach().clone() for p in module.network.parameters()]
        trainer = Trainer(
            max_epochs=2, accelerator="cpu", plugins=plugins, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, EpochLoader(data, 16, shuffle=True, seed=1))
        after = [p.detach() for p in module.network.parameters()]
        return float(sum((p - q).square().sum() for p, q in zip(after, before, strict=True))) ** 0.5

    plain, clipped = moved(None, scaled=False), moved(0.1, scaled=False)
    assert clipped < 0.8 * plain
    assert moved(0.1, scaled=True) == pytest.approx(clipped, rel=1e-4)
    assert moved(None, scaled=True) == pytest.approx(plain, rel=1e-4)
