"""Avalanche's plugins beside our components: on a ContinualModule, on Avalanche's benchmarks and on ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
from avalanche.training import Naive
from avalanche.training import plugins as P
from sampled import sampled
from torch import nn
from torch.optim.lr_scheduler import StepLR

from clframe.avalanche_bridge.repairs import repair
from clframe.data import Benchmark, class_incremental, digits
from clframe.errors import UnsupportedError
from clframe.nn import BACKBONES, Network
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy

PLUGINS: dict[str, Callable[[Any, Any], Any]] = {
    "Replay": lambda m, o: P.ReplayPlugin(20),
    "LwF": lambda m, o: P.LwFPlugin(1.0, 2.0),
    "EWC separate": lambda m, o: P.EWCPlugin(1.0),
    "EWC online": lambda m, o: P.EWCPlugin(1.0, mode="online", decay_factor=0.9),
    "SynapticIntelligence": lambda m, o: P.SynapticIntelligencePlugin(1.0),
    "MAS": lambda m, o: P.MASPlugin(0.1, 0.5),
    "RWalk": lambda m, o: P.RWalkPlugin(delta_t=2),
    "GEM": lambda m, o: P.GEMPlugin(10, 0.5),
    "AGEM": lambda m, o: P.AGEMPlugin(10, 10),
    "GDumb": lambda m, o: P.GDumbPlugin(20),
    "MIR": lambda m, o: P.MIRPlugin(10, 60, 15),
    "RAR": lambda m, o: P.RARPlugin(10, 20, name_ext_layer="network.backbone.stages.0"),
    "CWRStar": lambda m, o: P.CWRStarPlugin(m),
    "BiC": lambda m, o: P.BiCPlugin(40, stage_2_epochs=3, val_percentage=0.3),
    "FromScratch": lambda m, o: P.FromScratchTrainingPlugin(),
    "LRScheduler": lambda m, o: P.LRSchedulerPlugin(StepLR(o, 1, 0.3)),
}
# They copy the model while it trains, and a copy of the module takes the Trainer's driver along.
COPIES_IN_TRAINING = {"MIR", "RAR"}


def learner(
    toy: SimpleNamespace,
    module: ContinualModule,
    make: Callable[[Any, Any], Any] | None = None,
    *,
    strategy: type[Any] = LightningStrategy,
    **options: Any,
) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.5)
    options = {"evaluator": toy.evaluator(), **toy.options, **options}
    plugins = [] if make is None else [make(module, optimizer)]
    repair(plugins)  # for Avalanche's own loop too: what is compared is the loop
    return strategy(model=module, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), plugins=plugins, **options)


@pytest.fixture(scope="module")
def in_avalanche(toy: SimpleNamespace) -> Callable[[str], tuple[Any, ...]]:
    """How a run with a plugin ends in Avalanche's own loop, found out once."""
    return functools.cache(lambda name: finish(toy, name, Naive))


def finish(toy: SimpleNamespace, name: str, strategy: type[Any], **options: Any) -> tuple[Any, ...]:
    toy.seed_all()
    trained = learner(toy, toy.module(grown=True), PLUGINS.get(name), strategy=strategy, **options)
    for experience in toy.benchmark("new").train_stream:
        trained.train(experience)
    return toy.weights(trained.model), toy.random_states()


# That a Trainer gives the weights of Fabric is tested with components, too, for plugins that do not copy the model.
IN_A_TRAINER = [
    pytest.param(name, "trainer", marks=[pytest.mark.slow] * (name not in ("none", *COPIES_IN_TRAINING)))
    for name in ("none", *PLUGINS)
]


@pytest.mark.parametrize(("name", "engine"), [*((name, "fabric") for name in ("none", *PLUGINS)), *IN_A_TRAINER])
def test_a_continual_module_ends_with_the_weights_that_avalanches_loop_gives_it(
    toy: SimpleNamespace,
    in_avalanche: Callable[[str], tuple[Any, ...]],
    name: str,
    engine: str,
) -> None:
    ours, theirs = finish(toy, name, LightningStrategy, engine=engine), in_avalanche(name)
    assert all(value.isfinite().all() for value in theirs[0].values())
    assert toy.same(ours[0], theirs[0])
    assert ours[1] == theirs[1]
    assert toy.same(theirs[0], in_avalanche("none")[0]) is (name == "none")


@pytest.mark.parametrize("engine", ["fabric", "trainer"])
def test_what_a_plugin_cannot_do_to_a_continual_module_is_refused(toy: SimpleNamespace, engine: str) -> None:
    class OtherModel(SupervisedPlugin):
        def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
            strategy.model = nn.Linear(8, 6)

    class OtherCriterion(SupervisedPlugin):
        def before_training(self, strategy: Any, **kwargs: Any) -> None:
            strategy._criterion = nn.MSELoss()

    for plugin, message in (
        (OtherModel, "found a Linear where a plugin has replaced"),
        (OtherCriterion, "a plugin has set the criterion MSELoss"),
    ):
        trained = learner(toy, toy.module(), lambda m, o, p=plugin: p(), engine=engine)
        with pytest.raises(UnsupportedError, match=rf"^LightningStrategy: {message}.*; use the plugin"):
            trained.train(toy.benchmark("new").train_stream[0])


@pytest.fixture(scope="module")
def small_digits() -> Benchmark:
    return class_incremental(digits(), experiences=5)


@pytest.fixture(params=["avalanche's", "ours"])
def world(request: pytest.FixtureRequest, toy: SimpleNamespace, small_digits: Benchmark) -> SimpleNamespace:
    """A benchmark of Avalanche's or of ours, and networks that fit it."""
    if request.param == "ours":
        shape, options = small_digits.input_shape, {"benchmark": small_digits, "train_mb_size": 64}
        streams = small_digits.avalanche
    else:
        shape, options, streams = (toy.features,), {}, toy.benchmark("new")

    def module(expression: str) -> ContinualModule:
        toy.seed_all()
        network = Network(BACKBONES.get("mlp")(shape, width=16))
        return ContinualModule(network, expression, optimizer=lambda p: torch.optim.SGD(p, lr=0.01), seed=5)

    return SimpleNamespace(
        kind=request.param,
        module=module,
        options={"train_epochs": 2, **options},
        train=streams.train_stream[:3],
        test=streams.test_stream[:3],
    )


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, torch.Tensor]]:
    """Weights without any plugin, by benchmark."""
    return {}


@pytest.mark.parametrize(
    ("name", "world"),
    sampled([name for name in PLUGINS if name not in COPIES_IN_TRAINING], ["avalanche's", "ours"], every=4), indirect=["world"],
)  # fmt: skip
def test_plugins_and_components_act_together_the_same_in_both_engines(
    toy: SimpleNamespace,
    world: SimpleNamespace,
    alone: dict[str, dict[str, torch.Tensor]],
    name: str,
) -> None:
    def finish(make: Callable[[Any, Any], Any] | None, engine: Any) -> ContinualModule:
        module = world.module("er(memory=20) + lwf")
        trained = learner(toy, module, make, engine=engine, **world.options)
        for experience in world.train:
            trained.train(experience)
        return module

    if world.kind not in alone:
        alone[world.kind] = toy.weights(finish(None, "fabric"))
    on_fabric, in_trainer = (finish(PLUGINS[name], engine) for engine in ("fabric", "trainer"))
    ended = toy.weights(on_fabric)
    assert all(value.isfinite().all() for value in ended.values())
    assert toy.same(ended, toy.weights(in_trainer))
    assert not toy.same(ended, alone[world.kind])
    for module in (on_fabric, in_trainer):
        assert len(module.learner.state["er"]["y"]) == 20
        assert module.learner.past == tuple(range(6)) and module.network.classes == 6
        assert any(term.startswith("loss/lwf/") for term in module.learner.flush_terms())


@pytest.mark.parametrize("engine", ["fabric", "trainer"])
def test_early_stopping_stops_a_continual_module(toy: SimpleNamespace, world: SimpleNamespace, engine: str) -> None:
    """With evaluation before any class is known, and better meaning lower: nothing ever improves."""
    options = {**world.options, "train_epochs": 5, "eval_every": 1, "engine": engine}
    trained = learner(
        toy,
        world.module("er(memory=20) + lwf"),
        lambda m, o: P.EarlyStoppingPlugin(1, "train", mode="min"),
        evaluator=toy.evaluator(accuracy_metrics(stream=True), loss_metrics(stream=True)),
        **options,
    )
    epochs = []
    with pytest.warns(UserWarning, match="EarlyStopping will not be triggered"):
        for experience in world.train:
            metrics = trained.train(experience)
            epochs.append(trained.clock.train_exp_epochs)
    assert set(epochs) <= {1, 2, 3} and len(epochs) == len(world.train)
    assert 0 <= metrics["Top1_Acc_Stream/eval_phase/train_stream"] <= 1


def test_evaluation_before_any_class_is_known_gives_every_sample_no_class(
    toy: SimpleNamespace, world: SimpleNamespace
) -> None:
    seen: list[torch.Tensor] = []

    class Look(SupervisedPlugin):
        def after_eval_forward(self, strategy: Any, **kwargs: Any) -> None:
            seen.append(strategy.mb_output)

    metrics = [accuracy_metrics(stream=True), loss_metrics(stream=True)]
    trained = learner(
        toy, world.module("naive"), lambda m, o: Look(), evaluator=toy.evaluator(*metrics), **world.options
    )
    result = trained.eval(world.test)
    assert trained.module.network.classes == 0
    assert all(scores.shape[1] == 1 and bool((scores == -torch.inf).all()) for scores in seen)
    assert result["Loss_Stream/eval_phase/test_stream"] != result["Loss_Stream/eval_phase/test_stream"]  # NaN


@pytest.mark.parametrize("engine", ["fabric", "trainer"])
def test_a_scheduler_steps_the_optimizer_it_was_made_for(
    toy: SimpleNamespace, world: SimpleNamespace, engine: str
) -> None:
    rates: list[float] = []

    class Rates(P.LRSchedulerPlugin):
        def before_update(self, strategy: Any, **kwargs: Any) -> None:
            rates.append(strategy.optimizer.param_groups[0]["lr"])

    trained = learner(
        toy,
        world.module("er(memory=20)"),
        lambda m, o: Rates(StepLR(o, 1, 0.1)),
        **{**world.options, "train_epochs": 2, "engine": engine},
    )
    for experience in world.train:
        trained.train(experience)
    per_epoch = len(rates) // (2 * len(world.train))
    assert rates == pytest.approx(([0.01] * per_epoch + [0.001] * per_epoch) * len(world.train), rel=1e-6)


def test_a_scheduler_for_an_optimizer_that_is_never_used_is_refused(toy: SimpleNamespace) -> None:
    module = toy.module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scheduler = P.LRSchedulerPlugin(StepLR(optimizer, 1))
    with pytest.raises(UnsupportedError, match=r"^LRSchedulerPlugin: .* fresh one; pass optimizer= "):
        LightningStrategy(model=module, plugins=[scheduler], evaluator=None)


class Batches(SupervisedPlugin):
    """Remembers what was trained and evaluated on."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[list[int]] = []
        self.evaluated: list[list[int]] = []

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        self.trained.append(strategy.mb_y.tolist())

    def after_eval_forward(self, strategy: Any, **kwargs: Any) -> None:
        self.evaluated.append(strategy.mb_y.tolist())


class ReplacesLoader(Batches):
    """Two batches of its own making, in a plain list."""

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        x, y = strategy.experience.dataset[0][:2]
        strategy.dataloader = [
            [x[None], torch.tensor([int(y)])],
            [x[None].repeat(3, *[1] * x.ndim), torch.tensor([int(y)] * 3)],
        ]


class ReplacesLoaderEachEpoch(ReplacesLoader):
    """The same, an epoch at a time."""

    before_training_exp = SupervisedPlugin.before_training_exp

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        ReplacesLoader.before_training_exp(self, strategy)


class ChangesData(Batches):
    """Seven samples instead of all."""

    def after_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        strategy.adapted_dataset = strategy.adapted_dataset.subset(range(7))

    def after_eval_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> None:
        strategy.adapted_dataset = strategy.adapted_dataset.subset(range(3))


@pytest.mark.parametrize("engine", ["fabric", "trainer"])
@pytest.mark.parametrize(
    ("plugin", "sizes"),
    [(ReplacesLoader, [1, 3]), (ReplacesLoaderEachEpoch, [1, 3]), (ChangesData, [7])],
)
def test_a_plugin_that_changes_loader_or_data_gets_its_way(
    toy: SimpleNamespace,
    world: SimpleNamespace,
    request: pytest.FixtureRequest,
    engine: str,
    plugin: type[Batches],
    sizes: list[int],
) -> None:
    if plugin is ReplacesLoaderEachEpoch and engine == "trainer" and world.kind != "ours":
        request.applymarker(pytest.mark.xfail(reason="a Trainer fixes the length of epochs", raises=UnsupportedError, strict=True))
    watch = plugin()
    options = {**world.options, "train_epochs": 2, "train_mb_size": 64, "engine": engine}
    trained = learner(toy, world.module("naive"), lambda m, o: watch, **options)
    trained.train(world.train[0])
    assert [len(batch) for batch in watch.trained] == sizes * 2
    trained.eval(world.test[:2])
    all_samples = [len(experience.dataset) for experience in world.test[:2]]
    expected = [3, 3] if plugin is ChangesData else all_samples
    assert sum(map(len, watch.evaluated)) == sum(expected)


def test_data_held_out_by_bic_is_not_trained_on(toy: SimpleNamespace, world: SimpleNamespace) -> None:
    seen: list[int] = []

    class Bic(P.BiCPlugin):
        def before_forward(self, strategy: Any, **kwargs: Any) -> None:
            seen.extend(strategy.mb_y.tolist())

    trained = learner(
        toy,
        world.module("naive"),
        lambda m, o: Bic(100, stage_2_epochs=1, val_percentage=0.1),
        **{**world.options, "train_epochs": 1},
    )
    trained.train(world.train[0])
    assert len(seen) == len(world.train[0].dataset) - 10


def test_drop_last_drops_the_last_partial_batch(toy: SimpleNamespace, world: SimpleNamespace) -> None:
    watch = Batches()
    trained = learner(
        toy, world.module("naive"), lambda m, o: watch, **{**world.options, "train_epochs": 1, "train_mb_size": 11}
    )
    trained.train(world.train[0], drop_last=True)
    samples = len(world.train[0].dataset)
    assert samples % 11
    assert [len(batch) for batch in watch.trained] == [11] * (samples // 11)


def test_every_sample_of_a_batch_has_a_task_label(toy: SimpleNamespace, world: SimpleNamespace) -> None:
    labels: list[tuple[int, int]] = []

    class Tasks(SupervisedPlugin):
        def before_backward(self, strategy: Any, **kwargs: Any) -> None:
            labels.append((len(strategy.mb_task_id), len(strategy.mb_y)))
            assert not strategy.mb_task_id.any()

    trained = learner(toy, world.module("er(memory=20)"), lambda m, o: Tasks(), **world.options)
    for experience in world.train[:2]:
        trained.train(experience)
    assert labels and all(tasks == samples for tasks, samples in labels)
    assert len({samples for _, samples in labels}) > 1  # batches grow once there is a memory


def test_a_plugin_may_train_on_what_it_saw_in_evaluation(toy: SimpleNamespace) -> None:
    """Inference mode would refuse the backward pass: its tensors cannot be saved for gradients."""
    kept = []

    class Keeping(SupervisedPlugin, supports_distributed=True):
        def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
            kept.append((strategy.mb_x, strategy.mb_output, strategy.adjusted.last))

    trained = learner(toy, toy.module(grown=True), lambda m, o: Keeping())
    trained.eval(toy.benchmark("new").test_stream[:1])
    x, output_BC, last_BC = kept[0]
    weight_C = torch.ones(output_BC.shape[1], requires_grad=True)
    trained.model.zero_grad()
    ((output_BC + last_BC) * weight_C + trained.model(x)).sum().backward()
    assert torch.allclose(weight_C.grad, (output_BC + last_BC).sum(0))
    assert all(p.grad is not None for p in trained.model.parameters() if p.requires_grad)
