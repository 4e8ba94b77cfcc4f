"""Plugins, metrics and loggers see on our engine exactly what they see in Avalanche's own loop."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import (
    accuracy_metrics,
    class_accuracy_metrics,
    confusion_matrix_metrics,
    forgetting_metrics,
    loss_metrics,
)
from avalanche.logging import CSVLogger, InteractiveLogger, TensorboardLogger, TextLogger
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, LwFPlugin, ReplayPlugin
from sampled import sampled
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from clframe.avalanche_bridge.fabric import on_fabric
from clframe.training.strategy import LightningStrategy

# The strategy class that runs, the model it trains and what else it is told.
Side = tuple[type[Any], str, dict[str, Any]]
ENGINES: dict[str, Side] = {
    "a module on LightningStrategy": (LightningStrategy, "mlp", {}),
    "a module on on_fabric(Naive)": (on_fabric(Naive), "mlp", {}),
    "ContinualModule on Fabric": (LightningStrategy, "module", {}),
    "ContinualModule in a Trainer": (LightningStrategy, "module", {"engine": "trainer"}),
}


def avalanche(engine: str) -> Side:
    """The same model in Avalanche's own loop."""
    return Naive, ENGINES[engine][1], {}


@pytest.fixture(scope="module")
def theirs() -> Callable[[str, str, Callable[[Side], Any]], Any]:
    """What happens in Avalanche's own loop, found out once for engines that train the same model."""
    known: dict[tuple[str, str], Any] = {}

    def tell(engine: str, test: str, run: Callable[[Side], Any]) -> Any:
        key = (ENGINES[engine][1], test)
        if key not in known:
            known[key] = run(avalanche(engine))
        return known[key]

    return tell


CALLBACKS = sorted(
    {name for name in dir(SupervisedPlugin) if name.startswith(("before_", "after_"))}
    - {"before_inner_updates", "after_inner_updates", "before_outer_update", "after_outer_update"}
)


IN_A_STEP = {"after_backward", "before_update", "after_update", "after_training_iteration"}


class Recorder(SupervisedPlugin):
    """Writes down every callback and all that a plugin could read there."""

    def __init__(self, at: dict[tuple[str, int], Callable[[Any], None]] | None = None) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []
        self.count: dict[str, int] = {}
        self.at = at or {}

    def record(self, event: str, strategy: Any, kwargs: dict[str, Any]) -> None:
        count = self.count[event] = self.count.get(event, 0) + 1
        batch, output, clock = strategy.mbatch, strategy.mb_output, strategy.clock
        self.seen.append(
            (
                event,
                strategy.experience and strategy.experience.current_experience,
                (strategy.is_training, strategy.model.training),
                (clock.total_iterations, clock.train_exp_counter, clock.train_exp_epochs),
                batch and [(part.shape, float(part.sum())) for part in batch],
                None if output is None else (output.shape, float(output.detach().sum())),
                strategy.loss.tolist(),
                float(sum(p.detach().double().sum() for p in strategy.model.parameters())),
                self.gradient(event, strategy),
                type(strategy.dataloader).__name__,
                sorted(kwargs),
            )
        )
        self.at.get((event, count), lambda strategy: None)(strategy)

    @staticmethod
    def gradient(event: str, strategy: Any) -> float | None:
        """None outside a step: a Trainer starts an experience without the last one's gradients."""
        if event not in IN_A_STEP or not strategy.is_training:
            return None
        return sum(float(p.grad.sum()) for p in strategy.model.parameters() if p.grad is not None)


def _recording(event: str) -> Callable[..., None]:
    def callback(self: Recorder, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.record(event, strategy, kwargs)

    return callback


for _event in CALLBACKS:
    setattr(Recorder, _event, _recording(_event))


def learner(toy: SimpleNamespace, side: Side, plugins: list[Any], **options: Any) -> Any:
    strategy, kind, engine = side
    toy.seed_all()
    model = toy.mlp() if kind == "mlp" else toy.module(grown=True)
    options = {"evaluator": toy.evaluator(), **toy.options, **engine, **options}
    return strategy(model=model, optimizer=toy.sgd(model), criterion=nn.CrossEntropyLoss(), plugins=plugins, **options)


def record(
    toy: SimpleNamespace,
    side: Side,
    *,
    at: dict[tuple[str, int], Callable[[Any], None]] | None = None,
    others: Callable[[], list[Any]] = list,
    at_once: bool = False,
    **options: Any,
) -> list[tuple[Any, ...]]:
    recorder = Recorder(at)
    trained = learner(toy, side, [recorder, *others()], **options)
    benchmark = toy.benchmark("new")
    for part in [benchmark.train_stream] if at_once else benchmark.train_stream:
        trained.train(part, eval_streams=[benchmark.test_stream[:1]], num_workers=0)
        trained.eval(benchmark.test_stream[:2])
    return recorder.seen


@pytest.fixture
def story(
    toy: SimpleNamespace, theirs: Callable[..., Any], request: pytest.FixtureRequest
) -> Callable[..., list[tuple[Any, ...]]]:
    """Record a run on an engine and in Avalanche's own loop, and hold them against each other."""

    def told(engine: str, what: Any = "", **options: Any) -> list[tuple[Any, ...]]:
        ours = record(toy, ENGINES[engine], **options)
        test = f"{request.function.__name__} {what}"
        expected = theirs(engine, test, lambda side: record(toy, side, **options))
        assert [seen[0] for seen in ours] == [seen[0] for seen in expected]
        for left, right in zip(ours, expected, strict=True):
            if "Trainer" in engine and "iteration" not in left[0]:
                # The batch at which a Trainer learns that it is to stop never reaches the strategy.
                left, right = (*left[:4], *left[5:]), (*right[:4], *right[5:])
            assert left == right
        return ours

    return told


@pytest.mark.parametrize(
    ("engine", "eval_every", "peval_mode"),
    sampled(list(ENGINES), [(-1, "epoch"), (0, "epoch"), (1, "epoch"), (2, "epoch"), (3, "iteration")]),
)
def test_callbacks_come_in_avalanches_order_and_see_the_same(
    story: Callable[..., Any], engine: str, eval_every: int, peval_mode: str
) -> None:
    options = {"eval_every": eval_every, "peval_mode": peval_mode, "train_epochs": 3}
    ours = story(engine, (eval_every, peval_mode), **options)
    evaluations = sum(seen[0] == "before_eval" for seen in ours)
    # Own evaluation after each of 3 experiences; before, while and after training as asked for:
    # every epoch is 1 + 3, every second (the first and the last) 1 + 2, every third of 9 steps 1 + 3 + 1.
    inside = {(-1, "epoch"): 0, (0, "epoch"): 2, (1, "epoch"): 4, (2, "epoch"): 3, (3, "iteration"): 5}
    assert evaluations == 3 * (1 + inside[eval_every, peval_mode])


@pytest.mark.parametrize("engine", ENGINES)
def test_callbacks_see_the_same_beside_plugins_that_act(story: Callable[..., Any], engine: str) -> None:
    def others() -> list[Any]:
        return [ReplayPlugin(20), LwFPlugin(1.0, 2.0)]

    assert {seen[-2] for seen in story(engine, others=others)} >= {"ReplayDataLoader"}


def stop(strategy: Any) -> None:
    strategy.stop_training()


STOPS = {
    "in mid-epoch": ("after_training_iteration", 2),
    "in mid-epoch before the step": ("before_training_iteration", 2),
    "in the last epoch": ("before_forward", 5),
    "at the last batch of an epoch": ("after_training_iteration", 3),
    "between epochs": ("after_training_epoch", 1),
    "as an epoch begins": ("before_training_epoch", 2),
    "as the first epoch begins": ("before_training_epoch", 1),
    "as the experience begins": ("before_training_exp", 2),
}


@pytest.mark.parametrize(
    ("engine", "when"), sampled([name for name in ENGINES if "Naive" not in name], list(STOPS))
)
def test_stop_training_stops_where_avalanche_does(story: Callable[..., Any], engine: str, when: str) -> None:
    # In one call for all experiences a stop late in one reaches into the next, in Avalanche too.
    options = {"at": {STOPS[when]: stop}, "at_once": "last" in when, "eval_every": 1}
    ours = story(engine, when, **options)
    assert sum(seen[0] == "after_training_iteration" for seen in ours) < 3 * 2 * 3  # it did stop


class Attached:
    """A plugin that is not derived from Avalanche's, and answers to one callback by an attribute."""

    def __init__(self) -> None:
        self.calls = 0
        self.after_backward = self.count

    def count(self, strategy: Any, **kwargs: Any) -> None:
        self.calls += 1


class LoudEvaluation(EvaluationPlugin):
    """A subclass that a plugin author may write."""

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        self.updates = getattr(self, "updates", 0) + 1


@pytest.mark.filterwarnings("ignore:No loggers specified")  # what LoudEvaluation is built with
def test_plugins_are_known_by_what_they_answer_to_not_by_their_class(toy: SimpleNamespace) -> None:
    attached, loud = Attached(), LoudEvaluation(accuracy_metrics(minibatch=True))
    trained = learner(toy, (LightningStrategy, "mlp", {}), [attached], evaluator=loud)
    metrics = trained.train(toy.benchmark("new").train_stream[0])
    assert attached.calls == loud.updates == 2 * 3
    assert set(metrics) == {"Top1_Acc_MB/train_phase/train_stream"}


def metrics() -> list[Any]:
    return [
        accuracy_metrics(minibatch=True, epoch=True, epoch_running=True, experience=True, stream=True),
        loss_metrics(minibatch=True, epoch=True, experience=True, stream=True),
        forgetting_metrics(experience=True, stream=True),
        class_accuracy_metrics(epoch=True, stream=True),
        confusion_matrix_metrics(num_classes=6, save_image=False, stream=True),
    ]


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


def without_bars(text: str) -> list[str]:
    """What the interactive logger says between its progress bars, whose speed is never the same."""
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    return [line for line in lines if not any(bar in line for bar in ("%|", "it/s", "s/it"))]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def log(
    toy: SimpleNamespace, side: Side, folder: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> dict[str, Any]:
    text = io.StringIO()
    loggers = [
        TextLogger(text),
        InteractiveLogger(),
        CSVLogger(folder / "csv"),
        TensorboardLogger(folder / "tb"),
    ]
    evaluator = toy.evaluator(*metrics(), loggers=loggers)
    trained = learner(toy, side, [], evaluator=evaluator, eval_every=1)
    benchmark = toy.benchmark(kind)
    capsys.readouterr()
    last = []
    for experience in benchmark.train_stream:
        last.append(trained.train(experience, eval_streams=[benchmark.test_stream]))
        last.append(trained.eval(benchmark.test_stream))
    loggers[2].close()
    loggers[3].writer.flush()
    return {
        "last": [{name: plain(value) for name, value in given.items()} for given in last],
        "all": {name: (x, [plain(value) for value in y]) for name, (x, y) in evaluator.get_all_metrics().items()},
        "text": text.getvalue(),
        "shown": without_bars(capsys.readouterr().out),
        "csv": {path.name: path.read_text() for path in (folder / "csv").iterdir()},
        "tensorboard": scalars(folder / "tb"),
    }


@pytest.mark.parametrize(("engine", "kind"), sampled(list(ENGINES), ["new", "tasks"]))
def test_metrics_and_loggers_say_what_they_say_in_avalanche(
    toy: SimpleNamespace,
    theirs: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    engine: str,
    kind: str,
) -> None:
    ours = log(toy, ENGINES[engine], tmp_path / "ours", capsys, kind)
    expected = theirs(engine, f"log {kind}", lambda side: log(toy, side, tmp_path / "theirs", capsys, kind))
    for what, said in ours.items():
        assert said, what
        assert said == expected[what], what
    named = {re.sub(r"/(Task|Exp)\d+", "", name) for name in ours["last"][-1]}
    assert {
        "StreamForgetting/eval_phase/test_stream",
        "Loss_Stream/eval_phase/test_stream",
        "Top1_Acc_Stream/eval_phase/test_stream",
        "ConfusionMatrix_Stream/eval_phase/test_stream",
        "Top1_Acc_Epoch/train_phase/train_stream",
    } <= named
