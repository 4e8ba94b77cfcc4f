"""Avalanche's plugins and strategies on our engine end with Avalanche's own weights, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from avalanche import models
from avalanche import training as supervised
from avalanche.benchmarks import split_online_stream
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models.packnet import packnet_simple_mlp
from avalanche.training import plugins as P
from avalanche.training.losses import MaskedCrossEntropy
from avalanche.training.supervised.feature_replay import FeatureReplay
from avalanche.training.supervised.lamaml_v2 import LaMAML
from sampled import sampled
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from clframe.avalanche_bridge.fabric import on_fabric
from clframe.avalanche_bridge.repairs import repair
from clframe.errors import UnsupportedError
from clframe.training.strategy import LightningStrategy

CLASSES, FEATURES = 6, 8
LOSS = nn.CrossEntropyLoss

# Each takes the model and its optimizer.
PLUGINS: dict[str, Callable[[Any, Any], list[Any]]] = {
    "none": lambda m, o: [],
    "Replay": lambda m, o: [P.ReplayPlugin(20)],
    "LwF": lambda m, o: [P.LwFPlugin(1.0, 2.0)],
    "LwF and Replay": lambda m, o: [P.LwFPlugin(1.0, 2.0), P.ReplayPlugin(20)],
    "EWC separate": lambda m, o: [P.EWCPlugin(50.0)],
    "EWC online": lambda m, o: [P.EWCPlugin(50.0, mode="online", decay_factor=0.9)],
    "SynapticIntelligence": lambda m, o: [P.SynapticIntelligencePlugin(0.01)],
    "MAS": lambda m, o: [P.MASPlugin(0.1, 0.5)],
    "RWalk": lambda m, o: [P.RWalkPlugin(delta_t=2)],
    "GEM": lambda m, o: [P.GEMPlugin(10, 0.5)],
    "AGEM": lambda m, o: [P.AGEMPlugin(10, 10)],
    "LFL": lambda m, o: [P.LFLPlugin(1.0)],
    "GDumb": lambda m, o: [P.GDumbPlugin(20)],
    "MIR": lambda m, o: [P.MIRPlugin(10, 20, 15)],
    "RAR": lambda m, o: [P.RARPlugin(10, 20, name_ext_layer="features.0")],
    "CoPE": lambda m, o: [P.CoPEPlugin(20, CLASSES, CLASSES, max_it_cnt=9)],
    "CWRStar": lambda m, o: [P.CWRStarPlugin(m)],
    "GSS": lambda m, o: [P.GSS_greedyPlugin(60, 2, [FEATURES])],
    "BiC": lambda m, o: [P.BiCPlugin(40, stage_2_epochs=3, val_percentage=0.3)],
    "FromScratch": lambda m, o: [P.FromScratchTrainingPlugin()],
    "LRScheduler by epoch": lambda m, o: [P.LRSchedulerPlugin(StepLR(o, 1, 0.3))],
    "LRScheduler by iteration": lambda m, o: [P.LRSchedulerPlugin(StepLR(o, 3, 0.5), step_granularity="iteration")],
    "LRScheduler on a plateau": lambda m, o: [
        P.LRSchedulerPlugin(
            ReduceLROnPlateau(o, mode="max", patience=0), metric="train_loss", step_granularity="iteration"
        )
    ],
}


class Body(nn.Module):
    """Features for strategies that take the network in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Dropout(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Growing(nn.Module):
    """A head that grows with the classes, under a body."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.features, self.classifier = Body(), head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


def growing() -> Any:
    return Growing(models.IncrementalClassifier(16, 2, masking=False))


def multi_head() -> Any:
    return models.MTSimpleMLP(FEATURES, 16)


Maker = Callable[[SimpleNamespace], dict[str, Any]]


def trains(make: Callable[[], Any] | None = None, criterion: Any = LOSS, **options: Any) -> Maker:
    """Arguments of a strategy: a network, its optimizer, its criterion and what is particular to it."""

    def arguments(toy: SimpleNamespace) -> dict[str, Any]:
        model = toy.mlp() if make is None else make()
        loss = {} if criterion is None else {"criterion": criterion()}
        return {"model": model, "optimizer": toy.sgd(model), **loss, **options}

    return arguments


def icarl(toy: SimpleNamespace) -> dict[str, Any]:
    parts = nn.ModuleDict({"feature_extractor": Body(), "classifier": nn.Linear(16, CLASSES)})
    memory = {"memory_size": 20, "buffer_transform": None, "fixed_memory": True}
    return {**parts, "optimizer": toy.sgd(parts), **memory}


def er_aml(toy: SimpleNamespace) -> dict[str, Any]:
    arguments = trains(mem_size=60, batch_size_mem=5)(toy)
    return {**arguments, "feature_extractor": arguments["model"].features}


def slda(toy: SimpleNamespace) -> dict[str, Any]:
    return {"slda_model": Body(), "criterion": LOSS(), "input_size": 16, "num_classes": CLASSES}


STRATEGIES: dict[str, tuple[type[Any], Maker]] = {
    "Naive": (supervised.Naive, trains()),
    "Naive, growing head": (supervised.Naive, trains(growing)),
    "Naive, multi-head": (supervised.Naive, trains(multi_head)),
    "Replay": (supervised.Replay, trains(mem_size=20)),
    "Replay, growing head": (supervised.Replay, trains(growing, mem_size=20)),
    "LwF": (supervised.LwF, trains(alpha=1.0, temperature=2.0)),
    "EWC separate": (supervised.EWC, trains(ewc_lambda=50.0)),
    "EWC online": (supervised.EWC, trains(ewc_lambda=50.0, mode="online", decay_factor=0.9)),
    "SynapticIntelligence": (supervised.SynapticIntelligence, trains(si_lambda=0.01)),
    "MAS": (supervised.MAS, trains(lambda_reg=0.1)),
    "GEM": (supervised.GEM, trains(patterns_per_exp=10)),
    "AGEM": (supervised.AGEM, trains(patterns_per_exp=10, sample_size=10)),
    "LFL": (supervised.LFL, trains(lambda_e=1.0)),
    "GDumb": (supervised.GDumb, trains(mem_size=20)),
    "MIR": (supervised.MIR, trains(mem_size=20, batch_size_mem=10, subsample=15)),
    "CoPE": (supervised.CoPE, trains(mem_size=20, n_classes=CLASSES, p_size=CLASSES)),
    "GSS": (supervised.GSS_greedy, trains(mem_size=60, mem_strength=2, input_size=[FEATURES])),
    "BiC": (supervised.BiC, trains(mem_size=40, stage_2_epochs=3, val_percentage=0.3)),
    "CWRStar": (supervised.CWRStar, trains(cwr_layer_name=None)),
    "FromScratch": (supervised.FromScratchTraining, trains()),
    "Cumulative": (supervised.Cumulative, trains()),
    "Cumulative, growing head": (supervised.Cumulative, trains(growing)),
    "JointTraining": (supervised.JointTraining, trains()),
    "iCaRL": (supervised.ICaRL, icarl),
    "DER": (supervised.DER, trains(mem_size=20, batch_size_mem=5)),
    "ER_ACE": (supervised.ER_ACE, trains(mem_size=20, batch_size_mem=5)),
    "ER_AML": (supervised.ER_AML, er_aml),
    "MER": (supervised.MER, trains(mem_size=20, batch_size_mem=2, n_inner_steps=1)),
    "LaMAML": (LaMAML, trains(multi_head, n_inner_updates=2, max_buffer_size=20, buffer_mb_size=5)),
    "PNN": (supervised.PNNStrategy, trains(lambda: models.PNN(1, FEATURES, 16))),
    "PackNet": (
        supervised.PackNet,
        trains(
            lambda: packnet_simple_mlp(CLASSES, FEATURES, 16, 1, 0.3),
            post_prune_epochs=1,
            prune_proportion=0.5,
        ),
    ),
    "SCR": (
        supervised.SCR,
        trains(lambda: models.SCRModel(Body(), nn.Linear(16, 8)), criterion=None, mem_size=20, batch_size_mem=5),
    ),
    "FeatureReplay": (
        FeatureReplay,
        trains(lambda: Growing(nn.Linear(16, CLASSES)), MaskedCrossEntropy, mem_size=20, batch_size_mem=5),
    ),
    "StreamingLDA": (supervised.StreamingLDA, slda),
}
# The benchmarks that Avalanche's own class can train on, where that is not both of the usual two.
KINDS = {
    "Naive, multi-head": ["tasks"],
    "iCaRL": ["classic"],
    "MER": ["tasks"],
    "LaMAML": ["tasks"],
    "PNN": ["tasks", "classic"],
    "PackNet": ["tasks"],
}


class Ended(NamedTuple):
    """How a run ended."""

    weights: dict[str, torch.Tensor]
    trainable: list[bool]
    randomness: tuple[Any, ...]
    iterations: int


def finish(toy: SimpleNamespace, build: Callable[[], Any], kind: str, *, at_once: bool = False) -> Ended:
    """Train on the three experiences, from the same seed for everybody."""
    toy.seed_all()
    strategy = build()
    repair(strategy.plugins)  # on Avalanche's side too: what is compared is the loop
    stream = toy.benchmark(kind).train_stream
    for part in [stream] if at_once else stream:
        strategy.train(part)
    return Ended(
        toy.weights(strategy.model),
        [p.requires_grad for p in strategy.model.parameters()],
        toy.random_states(),
        strategy.clock.train_iterations,
    )


def assert_equal(toy: SimpleNamespace, ours: Ended, theirs: Ended) -> None:
    # Runs that diverge end the same only where the kernels round the same; this also excludes NaN.
    assert all((value.double().abs() < 1e3).all() for value in theirs.weights.values())
    assert toy.same(ours.weights, theirs.weights)
    assert ours[1:] == theirs[1:]


def with_plugins(toy: SimpleNamespace, strategy: type[Any], make: Callable[..., list[Any]], **options: Any) -> Any:
    model = toy.mlp()
    optimizer = toy.sgd(model)
    options = {"evaluator": toy.evaluator(), **toy.options, **options}
    return strategy(model=model, optimizer=optimizer, criterion=LOSS(), plugins=make(model, optimizer), **options)


@pytest.fixture(scope="module")
def naive(toy: SimpleNamespace) -> dict[str, Ended]:
    """What no plugin at all arrives at."""
    return {
        kind: finish(toy, lambda: with_plugins(toy, supervised.Naive, PLUGINS["none"]), kind)
        for kind in ("new", "classic", "tasks")
    }


@pytest.mark.parametrize(("name", "kind"), sampled(list(PLUGINS), ["new", "tasks"]))
def test_a_plugin_ends_with_avalanches_weights(
    toy: SimpleNamespace, naive: dict[str, Ended], name: str, kind: str
) -> None:
    ours, theirs = (
        finish(toy, lambda c=strategy: with_plugins(toy, c, PLUGINS[name]), kind)
        for strategy in (LightningStrategy, supervised.Naive)
    )
    assert_equal(toy, ours, theirs)
    assert toy.same(ours.weights, naive[kind].weights) is (name == "none")


# Those that only add a plugin, which is tested above; Replay and LwF stand for them.
ADD_A_PLUGIN = {name for name in STRATEGIES if name in PLUGINS} - {"Replay", "LwF"}


@pytest.mark.filterwarnings("ignore:Avalanche is transitioning")  # LaMAML passes its arguments by position
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # and indexes tensors with lists
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name, kinds in KINDS.items() for kind in kinds),
        *sampled([name for name in STRATEGIES if name not in {*KINDS, *ADD_A_PLUGIN}], ["new", "tasks"]),
        *(pytest.param(name, kind, marks=pytest.mark.slow) for name in sorted(ADD_A_PLUGIN) for kind in ("new", "tasks")),
    ],
)
def test_a_strategy_class_ends_with_avalanches_weights(
    toy: SimpleNamespace, naive: dict[str, Ended], name: str, kind: str
) -> None:
    strategy_class, arguments = STRATEGIES[name]
    ours, theirs = (
        finish(
            toy,
            lambda c=strategy: c(**arguments(toy), **toy.options, evaluator=toy.evaluator()),
            kind,
            at_once=name == "JointTraining",
        )
        for strategy in (on_fabric(strategy_class), strategy_class)
    )
    assert_equal(toy, ours, theirs)
    assert toy.same(ours.weights, naive[kind].weights) is (name == "Naive")


@pytest.mark.parametrize("mode", ["epoch", "iteration"])
def test_early_stopping_stops_where_avalanche_does(toy: SimpleNamespace, mode: str) -> None:
    def build(strategy: type[Any]) -> Any:
        def stop_early(model: Any, optimizer: Any) -> list[Any]:
            # Better is lower, so that no epoch of learning is an improvement.
            return [P.EarlyStoppingPlugin(2, "train", mode="min", peval_mode=mode)]

        accuracy = toy.evaluator(accuracy_metrics(stream=True))
        options = {"train_epochs": 6, "eval_every": 1, "peval_mode": mode, "evaluator": accuracy}
        return with_plugins(toy, strategy, stop_early, **options)

    with pytest.warns(UserWarning, match="EarlyStopping will not be triggered"):
        ours, theirs = (
            finish(toy, lambda c=strategy: build(c), "new") for strategy in (LightningStrategy, supervised.Naive)
        )
    assert_equal(toy, ours, theirs)
    assert 0 < ours.iterations < 3 * 6 * 5  # five batches an epoch


@pytest.mark.parametrize("plugin", ["none", "Replay", "AGEM"])
def test_an_online_stream_ends_with_avalanches_weights(toy: SimpleNamespace, plugin: str) -> None:
    def build(strategy: type[Any]) -> Ended:
        toy.seed_all()
        learner = with_plugins(toy, strategy, PLUGINS[plugin])
        for experience in split_online_stream(toy.benchmark("new").train_stream, experience_size=25):
            learner.train(experience)
        return Ended(toy.weights(learner.model), [], toy.random_states(), learner.clock.train_iterations)

    assert_equal(toy, build(LightningStrategy), build(supervised.Naive))


class OtherOptimizer(P.SupervisedPlugin):
    """Puts another optimizer in place, ``when`` the callback of that name comes."""

    def __init__(self, when: str) -> None:
        super().__init__()
        setattr(self, when, self.replace)

    def replace(self, strategy: Any, **kwargs: Any) -> None:
        strategy.optimizer = torch.optim.Adam(strategy.model.parameters(), lr=0.01)


@pytest.mark.parametrize("when", ["before_training_exp", "before_training_epoch", "before_training_iteration"])
def test_another_optimizer_put_in_place_by_a_plugin_is_the_one_that_steps(
    toy: SimpleNamespace, naive: dict[str, Ended], when: str
) -> None:
    ours, theirs, mixed = (
        finish(toy, lambda c=strategy: with_plugins(toy, c, lambda m, o: [OtherOptimizer(when)]), "new")
        for strategy in (LightningStrategy, supervised.Naive, on_fabric(supervised.Naive))
    )
    assert_equal(toy, ours, theirs)
    assert_equal(toy, mixed, theirs)
    assert not toy.same(ours.weights, naive["new"].weights)


def test_synaptic_intelligence_acts_in_proportion_to_its_weight(toy: SimpleNamespace) -> None:
    """Avalanche's own is a no-op on the CPU: it compares the live weights with themselves."""
    ended = {
        weight: finish(
            toy,
            lambda w=weight: with_plugins(toy, LightningStrategy, lambda m, o: [P.SynapticIntelligencePlugin(w)]),
            "new",
        )
        for weight in (0.0, 1.0, 10.0)
    }

    def moved(weight: float) -> float:
        """How far this weight of the penalty has led from no penalty."""
        pairs = zip(ended[weight].weights.values(), ended[0.0].weights.values(), strict=True)
        return sum(float((a - b).square().sum()) for a, b in pairs)

    assert 0 < moved(1.0) < moved(10.0)


@pytest.mark.parametrize("kind", ["new", "classic"])
def test_bic_corrects_the_bias_and_leaves_the_benchmark_alone(toy: SimpleNamespace, kind: str) -> None:
    """Avalanche's own ends in a TypeError on current torch, on newer benchmarks in an AttributeError."""
    plugin = P.BiCPlugin(40, stage_2_epochs=3, val_percentage=0.3)
    before = [len(experience.dataset) for experience in toy.benchmark(kind).train_stream]
    finish(toy, lambda: with_plugins(toy, LightningStrategy, lambda m, o: [plugin]), kind)
    assert [len(experience.dataset) for experience in toy.benchmark(kind).train_stream] == before
    assert sum(len(buffer.buffer) for buffer in plugin.val_buffer.values()) == 12  # 0.3 * 40
    assert plugin.bias_layer.alpha.item() != 1.0
    assert plugin.bias_layer.beta.item() != 0.0


@pytest.mark.parametrize("strategy", [LightningStrategy, on_fabric(supervised.Naive)])
def test_gem_without_its_solver_says_so_before_it_starts(
    toy: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, strategy: type[Any]
) -> None:
    monkeypatch.setattr("qpsolvers.available_solvers", ["cvxopt"])
    with pytest.raises(UnsupportedError, match=r"^GEMPlugin: needs .* quadprog, which is not installed; run .*$"):
        with_plugins(toy, strategy, PLUGINS["GEM"])


@pytest.mark.parametrize("wrong", [nn.Linear, supervised.OnlineNaive, "Naive"])
def test_only_strategies_with_a_training_loop_go_on_fabric(wrong: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"^on_fabric: found '\w+', not an Avalanche strategy class .*; give "):
        on_fabric(wrong)


def test_no_evaluator_means_no_metrics_and_no_advice_on_loggers(toy: SimpleNamespace) -> None:
    for strategy in (LightningStrategy, on_fabric(supervised.DER)):
        model = toy.mlp()
        learner = strategy(model=model, optimizer=toy.sgd(model), evaluator=None, **toy.options)
        assert learner.train(toy.benchmark("tasks").train_stream[0]) == {}
        assert learner.eval(toy.benchmark("tasks").test_stream) == {}
