"""Metrics of epochs, and what follows them in both engines: early stopping, plateau schedules, callbacks, loggers."""

from __future__ import annotations

import csv
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch.optim.lr_scheduler import ReduceLROnPlateau

import clframe
from clframe.core import Experience
from clframe.data import Benchmark, EpochLoader, Source, TensorSamples, class_incremental
from clframe.errors import ConfigError, UnsupportedError
from clframe.nn import BACKBONES, Network
from clframe.training.epochs import EarlyStopping, MeanLoss, needs_metric, step_schedule
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy

SMALL = ["backbone=mlp", "backbone.width=16", "benchmark.experiences=2", "trainer.progress=false", "strategy=er"]
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(scope="module")
def blobs() -> Benchmark:
    y = torch.arange(6).repeat(20)
    x = torch.randn(len(y), 1, 4, 4, generator=torch.Generator().manual_seed(1)) + y.reshape(-1, 1, 1, 1)
    data = TensorSamples(x, y)
    return class_incremental(Source("blobs", data, data, classes=6), experiences=3, validation=0.2)


def module(**options: Any) -> ContinualModule:
    torch.manual_seed(0)
    network = Network(BACKBONES.get("mlp")((1, 4, 4), width=12))
    options = {"optimizer": partial(torch.optim.SGD, lr=0.05), "seed": 3, **options}
    return ContinualModule(network, "er(memory=12)", **options)


def train(blobs: Benchmark, model: ContinualModule, **options: Any) -> LightningStrategy:
    options = {"train_mb_size": 10, "train_epochs": 8, "evaluator": None, "benchmark": blobs, **options}
    strategy = LightningStrategy(model=model, **options)
    for experience in blobs.avalanche.train_stream:
        strategy.train(experience)
    return strategy


def test_the_metrics_are_those_of_the_epoch(blobs):
    seen: list[dict[str, float]] = []
    losses: list[list[float]] = [[]]

    class Recorder(LightningStrategy):
        def _after_training_epoch(self, **kwargs: Any) -> None:
            super()._after_training_epoch(**kwargs)
            seen.append(dict(self.epoch_metrics))
            losses.append([])

    model = module()
    strategy = Recorder(
        model=model, benchmark=blobs, train_mb_size=10, train_epochs=2, evaluator=None,
        early_stopping=EarlyStopping("train/loss", patience=99),
    )  # fmt: skip
    strategy.on_step = lambda s: losses[-1].append(float(s.loss.detach()))
    before = torch.get_rng_state()
    strategy.train(blobs.avalanche.train_stream[0])
    assert [set(metrics) for metrics in seen] == [{"train/loss", "validation/loss", "validation/accuracy"}] * 2
    for metrics, own in zip(seen, losses, strict=False):
        assert metrics["train/loss"] == pytest.approx(sum(own) / len(own), rel=1e-6)
    held_out = blobs.validation[0]
    x = held_out.prepare(held_out.raw(torch.arange(len(held_out))))
    model.eval()
    logits = model.network(x).last.detach()
    assert seen[-1]["validation/loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, held_out.y)), rel=1e-5
    )
    assert seen[-1]["validation/accuracy"] == pytest.approx(float((logits.argmax(1) == held_out.y).float().mean()))
    assert before.shape == torch.get_rng_state().shape


@pytest.mark.parametrize("monitor", ["train/loss", "validation/loss", "validation/accuracy"])
def test_both_engines_stop_at_the_same_epochs_with_the_same_weights(blobs, monitor):
    options = {"monitor": monitor, "patience": 2, "min_delta": 0.05, "mode": "max" if "accuracy" in monitor else "min"}
    ours = train(blobs, module(), early_stopping=EarlyStopping(**options))
    theirs = train(blobs, module(), engine="trainer", trainer={"callbacks": [LightningEarlyStopping(**options)]})
    assert ours.clock.train_iterations == theirs.clock.train_iterations < 3 * 8 * 4
    left, right = (strategy.model.state_dict() for strategy in (ours, theirs))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_watching_metrics_leaves_the_weights_alone(blobs):
    plain = train(blobs, module(), train_epochs=2)
    watched = train(blobs, module(), train_epochs=2, early_stopping=EarlyStopping("validation/loss", patience=99))
    left, right = (strategy.model.state_dict() for strategy in (plain, watched))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_stop_in_the_last_epoch_does_not_reach_the_next_experience(blobs):
    epochs: list[int] = []

    class Recorder(LightningStrategy):
        def _after_training_exp(self, **kwargs: Any) -> None:
            epochs.append(int(self.clock.train_exp_epochs))
            super()._after_training_exp(**kwargs)

    stopping = EarlyStopping("train/loss", patience=1, min_delta=1e9)  # stops after the second epoch
    strategy = Recorder(
        model=module(), benchmark=blobs, train_mb_size=10, train_epochs=2, evaluator=None, early_stopping=stopping
    )
    strategy.train(blobs.avalanche.train_stream)
    assert epochs == [2, 2, 2]


@pytest.mark.parametrize(
    ("mode", "values", "stops"),
    [
        ("min", [3.0, 2.0, 2.0, 1.9], [False, False, False, False]),
        ("min", [3.0, 3.0, 3.0], [False, False, True]),
        ("max", [0.1, 0.05, 0.04], [False, False, True]),
        ("min", [1.0, float("nan")], [False, True]),
    ],
)
def test_when_to_stop(mode, values, stops):
    stopping = EarlyStopping("train/loss", patience=2, mode=mode)
    assert [stopping.should_stop({"train/loss": value}) for value in values] == stops
    with pytest.raises(UnsupportedError, match="found 'train/loss'; metrics of an epoch are a"):
        stopping.should_stop({"a": 1.0})


class Counts(lightning.Callback):
    """Counts the epochs it is called at, in ``entries``, which its copies share."""

    def __init__(self, entries: list[Any]) -> None:
        self.entries, self.epochs = entries, 0

    def __deepcopy__(self, memo: Any) -> Counts:
        copied = Counts(self.entries)
        copied.epochs = self.epochs
        return copied

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.epochs += 1
        self.entries.append((self.epochs, trainer.global_step, sorted(trainer.callback_metrics)))


def test_callbacks_are_fresh_and_see_metrics_and_a_rising_step(blobs):
    log: list[Any] = []
    given = Counts(log)
    strategy = train(blobs, module(), train_epochs=2, engine="trainer", trainer={"callbacks": [given]})
    assert given.epochs == 0
    assert [entry[0] for entry in log] == [1, 2] * 3
    steps = [entry[1] for entry in log]
    assert steps == sorted(set(steps)) and steps[-1] == strategy.clock.train_iterations
    assert log[-1][2] == ["train/loss", "validation/accuracy", "validation/loss"]


def test_a_callback_that_cannot_be_copied_is_refused_in_one_line(blobs):
    callback = lightning.Callback()
    callback.frame = sys._getframe()
    with pytest.raises(UnsupportedError, match=r"^trainer\.callbacks: a callback cannot be copied \(.*\), but each"):
        train(blobs, module(), engine="trainer", trainer={"callbacks": [callback]})


def test_callbacks_that_spoil_a_run_are_refused_by_name(blobs):
    with pytest.raises(UnsupportedError, match=r"^trainer\.callbacks: StochasticWeightAveraging cannot work with"):
        train(blobs, module(), engine="trainer", trainer={"callbacks": StochasticWeightAveraging(0.01)})


@pytest.mark.parametrize("engine", ["fabric", "trainer"])
def test_a_plateau_schedule_follows_the_loss(blobs, engine):
    rates: list[float] = []

    class Recorder(LightningStrategy):
        def _after_training_epoch(self, **kwargs: Any) -> None:
            super()._after_training_epoch(**kwargs)
            rates.append(self.optimizer.param_groups[0]["lr"])

    plateau = partial(ReduceLROnPlateau, factor=0.5, patience=0, threshold=1e9, threshold_mode="abs")  # never better
    strategy = Recorder(
        model=module(scheduler=plateau), benchmark=blobs, train_mb_size=10, train_epochs=3, evaluator=None, engine=engine
    )
    strategy.train(blobs.avalanche.train_stream[0])
    assert rates == [0.05, 0.025, 0.0125]  # the first loss is better than none


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # Lightning's own
def test_a_plateau_schedule_under_a_plain_trainer(blobs):
    model = module(scheduler=partial(ReduceLROnPlateau, factor=0.5, patience=0, threshold=1e9, threshold_mode="abs"))
    model.begin(Experience(0, 3, blobs.classes[0], (), (), blobs.train[0]), epochs=2)
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", **QUIET)
    trainer.fit(model, EpochLoader(blobs.train[0], 10, shuffle=True, seed=3, experience=0))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.025


def test_a_plateau_of_a_rising_metric_is_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(UnsupportedError, match="found mode 'max', but it is given the loss of each epoch"):
        needs_metric(ReduceLROnPlateau(optimizer, mode="max"))
    plateau = ReduceLROnPlateau(optimizer, patience=0)
    for loss in (1.0, 2.0):
        step_schedule(plateau, {"train/loss": 0.0, "validation/loss": loss})  # the validation loss decides
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_the_mean_of_no_loss_is_not_a_number():
    mean = MeanLoss()
    assert mean.compute() != mean.compute()
    mean.add(torch.tensor([1.0]))
    mean.add(torch.tensor(3.0))
    assert mean.compute() == 2.0


# --- from a config ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["fabric", "trainer"])
def test_early_stopping_from_a_config(tmp_path, engine):
    overrides = [
        *SMALL, f"trainer.engine={engine}", "trainer.epochs=6", "benchmark.validation=0.1",
        "trainer.callbacks={EarlyStopping: {monitor: validation/loss, patience: 1, min_delta: 10.0}}",
    ]  # fmt: skip
    result = clframe.run("quickstart", overrides, output=tmp_path)
    full = clframe.run("quickstart", [*SMALL, "trainer.epochs=2", "benchmark.validation=0.1"], output=tmp_path)
    assert result.steps == full.steps  # the second epoch is no improvement by 10


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.callbacks={EarlyStopping: {monitor: validation/loss}}"], "set benchmark.validation=0.1"),
        (["trainer.callbacks={EarlyStopping: {monitor: val_loss}}"], "metrics are train/loss"),
        (["trainer.callbacks={EarlyStopping: {}}"], "trainer.callbacks.EarlyStopping: "),
        (["trainer.callbacks={EarlyStopping: {monitor: train/loss, mode: up}}"], "mode 'up'"),
        (["trainer.callbacks={EarlyStopping: {monitor: train/loss, verbose: true}}"], "EarlyStopping.verbose: unknown"),
        (["optimizer.factor=0.5"], "set optimizer.schedule=plateau"),
        (["optimizer.schedule=plateau", "optimizer.factor=2.0"], "give a number between 0 and 1"),
    ],
)
def test_what_no_epoch_can_follow_is_refused_before_training(overrides, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        clframe.explain("quickstart", [*SMALL, *overrides])


def test_a_plateau_schedule_from_a_config(tmp_path):
    overrides = [*SMALL, "trainer.epochs=3", "trainer.log_every=1", "optimizer={name: sgd, lr: 1e-9}",
                 "optimizer.schedule=plateau", "optimizer.patience=0", "optimizer.factor=0.5"]  # fmt: skip
    result = clframe.run("quickstart", overrides, output=tmp_path)
    with open(Path(result.run_folder) / "metrics.csv", newline="") as file:
        rates = {float(row["value"]) for row in csv.DictReader(file) if row["name"] == "train/learning_rate"}
    assert 1e-9 in rates and rates <= {1e-9, 5e-10, 2.5e-10}


def test_lightnings_loggers_receive_losses_and_accuracies_with_a_rising_step(tmp_path):
    overrides = [*SMALL, "trainer.epochs=2", "trainer.log_every=10", "trainer.engine=trainer",
                 "trainer.loggers=[csv, {CSVLogger: {name: mine}}]", "trainer.callbacks={LearningRateMonitor: {}}"]  # fmt: skip
    result = clframe.run("quickstart", overrides, output=tmp_path)
    (path,) = Path(result.run_folder, "CSVLogger", "mine").glob("*/metrics.csv")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"loss/task/ce", "train/learning_rate", "train/loss", "accuracy/average", "accuracy/experience_2"} <= set(rows[0])
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(steps) and steps[-1] == result.steps
    final = [float(row["accuracy/average"]) for row in rows if row["accuracy/average"]]
    assert final[-1] == pytest.approx(result.final_average_accuracy)


@pytest.mark.parametrize("login", [lambda prompt=True, verify=True: False, lambda key=None: pytest.fail("asks for a key")])
def test_wandb_without_a_key_is_refused_before_training(login, monkeypatch):
    wandb = SimpleNamespace(login=login, api=SimpleNamespace(api_key=None))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    from clframe.training.trainer_options import _check_wandb_key

    with pytest.raises(ConfigError, match=r"^trainer\.loggers\.WandbLogger: found no API key .*offline: true"):
        _check_wandb_key({})
    _check_wandb_key({"offline": True})
    monkeypatch.setenv("WANDB_MODE", "offline")
    _check_wandb_key({})


@pytest.mark.parametrize(
    ("loggers", "message"),
    [
        ("[WandBLogger]", r"WandBLogger cannot work: Avalanche's logger calls wandb\.util\.generate_id.*use WandbLogger"),
        ("[{csv: {name: a}}]", r"trainer\.loggers\[0\]\.csv: found .*; it takes no options"),
        ("[{CSVLogger: {nome: a}}]", r"trainer\.loggers\.CSVLogger\.nome: unknown option"),
        ("[{CSVLogger: 3}]", r"trainer\.loggers\[0\]\.CSVLogger: found 3; give a mapping"),
        ("[CsvLogger]", r"unknown Lightning class 'CsvLogger'.*CSVLogger"),
    ],
)
def test_loggers_that_cannot_work_are_refused(loggers, message):
    with pytest.raises(clframe.ClframeError, match=message):
        clframe.explain("quickstart", [*SMALL, "trainer.engine=trainer", f"trainer.loggers={loggers}"])


class Interrupts(lightning.Callback):
    """Stands for Ctrl-C inside a step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        raise KeyboardInterrupt


def test_an_interruption_leaves_a_trainer_as_an_interruption(blobs):
    """Lightning turns it into sys.exit(1) and leaves SIGINT ignored."""
    before, model = signal.getsignal(signal.SIGINT), module()
    driver = model.driver
    with pytest.raises(KeyboardInterrupt):
        train(blobs, model, engine="trainer", trainer={"callbacks": [Interrupts()]})
    assert signal.getsignal(signal.SIGINT) is before
    assert model.driver is driver
