"""A diverged training stops, or is marked, in every engine."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from sampled import sampled

import clframe
from clframe.cli import main
from clframe.core import Experience
from clframe.data import Benchmark, Source, TensorSamples, class_incremental
from clframe.errors import ConfigError, DivergenceError
from clframe.nn import BACKBONES, Network
from clframe.results import Result
from clframe.training.divergence import DivergenceGuard
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy

SMALL = ["backbone=mlp", "backbone.width=16", "trainer.epochs=1", "benchmark.experiences=2", "trainer.progress=false"]
HUGE = ["optimizer={name: sgd, lr: 1e6}"]


@pytest.mark.parametrize("strategy, engine", sampled(["er", "der", "bic", "er + exits"], ["fabric", "trainer"]))
def test_a_run_stops_at_the_first_logged_loss_that_is_not_finite(tmp_path, strategy, engine):
    overrides = [*SMALL, *HUGE, f"strategy={strategy}", f"trainer.engine={engine}", "trainer.log_every=5"]
    with pytest.raises(DivergenceError) as caught:
        clframe.run("quickstart", overrides, output=tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("experience 1: the loss") and "task/ce" in message and "optimizer.lr" in message
    step = int(message.split("at step ")[1].split()[0])
    assert step % 5 == 0 and step <= 20
    (folder,) = tmp_path.glob("quickstart/*")
    assert not (folder / "results.json").exists()
    assert "nan" in (folder / "metrics.csv").read_text()  # the curves up to there are written


def test_the_command_line_prints_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "quickstart", *SMALL, *HUGE, "strategy=er"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("clframe: error: experience 1: the loss")


def test_a_run_that_only_warns_is_marked_in_its_results(tmp_path, caplog):
    overrides = [*SMALL, *HUGE, "strategy=er", "trainer.on_nonfinite=warn"]
    with caplog.at_level(logging.WARNING, logger="clframe"):
        result = clframe.run("quickstart", overrides, output=tmp_path)
    assert [line.partition(":")[0] for line in result.diverged] == ["experience 1", "experience 2"]
    warned = [record for record in caplog.records if "diverged" in record.message]
    assert len(warned) == 2  # one for each experience
    read = Result.from_json(Path(result.run_folder) / "results.json")
    assert read.diverged == result.diverged


def test_nan_scores_are_wrong_at_every_exit_and_have_no_failure_metrics(tmp_path):
    """Their arg-max is class 0, which must not count as right: the accuracy matrix counts them as wrong too."""
    overrides = [*SMALL, *HUGE, "optimizer.lr=1e20", "strategy=er + exits", "trainer.on_nonfinite=warn"]
    record = clframe.run("quickstart", overrides, output=tmp_path).exits[-1]
    assert set(record.metrics["accuracy"]) == {0.0} == {v for row in record.accuracy_KE for v in row}
    assert {record.static[name] for name in ("last", "confident", "mean", "vote", "oracle")} == {0.0}
    for name in ("ece", "aurc", "auroc", "nll", "eefp"):
        assert all(math.isnan(value) for value in record.metrics[name]), name


def test_a_healthy_run_is_not_marked(tmp_path):
    assert clframe.run("quickstart", [*SMALL, "strategy=er"], output=tmp_path).diverged == ()


def test_the_marks_survive_a_resumption(tmp_path):
    overrides = [*SMALL, *HUGE, "strategy=er", "trainer.on_nonfinite=warn"]
    first = clframe.run("quickstart", overrides, output=tmp_path)
    assert clframe.run(resume=first.run_folder).diverged == first.diverged


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_a_rate_that_overflows_is_refused(key):
    with pytest.raises(ConfigError, match=rf"optimizer\.{key}: found 1e\+300; .*overflows float32"):
        clframe.explain("quickstart", [f"optimizer.{key}=1e300"])


@pytest.fixture(scope="module")
def blobs() -> Benchmark:
    y = torch.arange(4).repeat(10)
    x = torch.randn(len(y), 1, 4, 4, generator=torch.Generator().manual_seed(1)) + y.reshape(-1, 1, 1, 1)
    data = TensorSamples(x, y)
    return class_incremental(Source("blobs", data, data, classes=4), experiences=2)


def module(**options) -> ContinualModule:
    torch.manual_seed(0)
    network = Network(BACKBONES.get("mlp")((1, 4, 4), width=8))
    return ContinualModule(network, "er(memory=8)", optimizer=partial(torch.optim.SGD, lr=1e30), seed=3, **options)


@pytest.mark.parametrize("engine", ["fabric", "trainer"])
def test_weights_are_checked_at_the_end_of_an_experience(blobs, engine):
    strategy = LightningStrategy(
        model=module(), benchmark=blobs, train_mb_size=5, train_epochs=2, evaluator=None, engine=engine
    )
    with pytest.raises(DivergenceError, match=r"^experience 1: the loss(es)? (is|are) not finite at step 8 \(task/ce"):
        strategy.train(blobs.avalanche.train_stream[0])


def test_weights_are_checked_under_a_plain_trainer(blobs):
    model = module()
    model.begin(Experience(0, 2, blobs.classes[0], (), (), blobs.train[0]), epochs=1)
    model.network.final.weight.data[0, 0] = math.nan
    with pytest.raises(DivergenceError, match=r"experience 1: weights are not finite \(heads\.0\.weight\)"):
        model.end()


def test_a_warning_trains_on(blobs):
    model = module(on_nonfinite="warn")
    strategy = LightningStrategy(model=model, benchmark=blobs, train_mb_size=5, train_epochs=1, evaluator=None)
    for experience in blobs.avalanche.train_stream:
        strategy.train(experience)
    assert len(model.divergence.found) == 2


def test_only_terms_that_are_not_finite_are_named():
    guard = DivergenceGuard()
    guard.check_losses({"loss/task/ce": 1.0, "loss/lwf/distill": 0.0}, experience=0, step=3)
    with pytest.raises(DivergenceError, match=r"^experience 3: the loss is not finite at step 7 \(lwf/distill\)"):
        guard.check_losses({"loss/task/ce": 1.0, "loss/lwf/distill": math.inf}, experience=2, step=7)
