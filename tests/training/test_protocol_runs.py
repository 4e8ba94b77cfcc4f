"""Runs under every protocol: what is trained, told and measured when."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import clframe
from clframe.data.avalanche import import_avalanche
from clframe.data.benchmark import class_incremental
from clframe.data.samples import TensorSamples, concatenate
from clframe.data.source import Source
from clframe.data.streams import blurry_stream, online_stream, permuted_stream
from clframe.errors import ConfigError
from clframe.nn import Network
from clframe.nn.backbones import mlp

import_avalanche()

from clframe.training.module import ContinualModule
from clframe.training.monitor import Monitor
from clframe.training.scores import Scores
from clframe.training.strategy import LightningStrategy

SMALL = ["backbone=mlp", "backbone.width=16", "trainer.epochs=1", "trainer.progress=false", "trainer.loggers=[csv]"]


@functools.cache
def source() -> Source:
    y = torch.arange(6).repeat_interleave(9)
    x = torch.randint(256, (len(y), 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scale = {"mean": (99.0,), "std": (50.0,)}
    return Source("toy", TensorSamples(x, y, **scale), TensorSamples(x[::3], y[::3], **scale), classes=6)


def strategy_on(benchmark, expression="naive", **options):
    torch.manual_seed(0)
    sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    module = ContinualModule(Network(mlp((1, 2, 2), width=5)), expression, optimizer=sgd, seed=0)
    options = {"train_mb_size": 4, "evaluator": None, **options}
    return LightningStrategy(model=module, benchmark=benchmark, **options)


def train(strategy, benchmark, experience):
    stream = benchmark.avalanche.streams["train"]
    strategy.train([stream[i] for i in benchmark.sub_experiences(experience)], eval_streams=[])


def record(monkeypatch, strategy):
    """What the learner is told, and what each step trains on."""
    learner, told, steps = strategy.learner, [], []
    begin, before_epoch, end = learner.begin, learner.before_epoch, learner.end

    def on_begin(experience, *, classes, epochs):
        told.append(("begin", experience.index, experience.count, experience.classes, epochs, experience.samples))
        begin(experience, classes=classes, epochs=epochs)

    monkeypatch.setattr(learner, "begin", on_begin)
    monkeypatch.setattr(
        learner, "before_epoch", lambda epoch, **options: (told.append(("epoch", epoch)), before_epoch(epoch, **options))
    )
    monkeypatch.setattr(learner, "end", lambda: (told.append(("end",)), end()))
    strategy.on_step = lambda s: steps.append((s.mb_x.clone(), s.mb_y.clone()))
    return told, steps


def test_an_online_learner_that_is_told_the_boundaries_sees_whole_experiences(monkeypatch):
    benchmark = online_stream(class_incremental(source(), experiences=2, order="sorted"), size=8)
    strategy = strategy_on(benchmark, train_epochs=2)
    told, steps = record(monkeypatch, strategy)
    for i in range(2):
        train(strategy, benchmark, i)
        own = tuple(range(3 * i, 3 * i + 3))  # 27 samples in 4 parts, each trained on twice
        assert told == [
            ("begin", i, 2, own, 8, strategy.benchmark.original[i]),
            *(("epoch", k) for k in range(8)),
            ("end",),
        ]
        told.clear()
    assert [len(y) for _, y in steps] == [*[4] * 12, 3, 3] * 2
    whole = torch.cat([benchmark.original[0].prepare(benchmark.original[0].raw(torch.arange(8)))] * 2)
    assert sorted(torch.cat([x for x, _ in steps[:4]]).flatten(1).tolist()) == sorted(whole.flatten(1).tolist())


def test_one_that_is_not_told_learns_of_each_small_experience(monkeypatch):
    benchmark = online_stream(class_incremental(source(), experiences=2, order="sorted"), size=8, boundaries=False)
    strategy = strategy_on(benchmark)
    told, _ = record(monkeypatch, strategy)
    train(strategy, benchmark, 0)
    train(strategy, benchmark, 1)
    for i, part in enumerate(strategy.benchmark.train):
        classes = tuple(sorted(set(part.y.tolist())))
        assert told[3 * i : 3 * i + 3] == [("begin", i, 8, classes, 1, part), ("epoch", 0), ("end",)]
    assert len(told) == 3 * 8


@pytest.mark.parametrize("make", [online_stream, functools.partial(online_stream, boundaries=False), blurry_stream])
def test_one_optimizer_goes_through_an_original_experience(make):
    benchmark = make(class_incremental(source(), experiences=2), size=8)
    strategy = strategy_on(benchmark, train_mb_size=100)
    stream, weight = benchmark.avalanche.streams["train"], strategy.module.network.backbone.stages[0]
    (weight, *_) = weight.parameters()
    momenta = []
    for i in range(len(stream)):
        strategy.train(stream[i], eval_streams=[])
        momenta.append((strategy.optimizer.state[weight]["momentum_buffer"].clone(), weight.grad.clone()))
    for e in range(2):
        first, *later = benchmark.sub_experiences(e)
        assert torch.equal(*momenta[first])
        for k in later:
            expected = 0.9 * momenta[k - 1][0] + momenta[k][1]
            assert torch.allclose(momenta[k][0], expected, atol=1e-6)
            assert not torch.allclose(*momenta[k])


def test_told_online_is_one_epoch_in_stream_order():
    """With no momentum to carry and nothing random, small experiences are the batches of one epoch."""
    whole = class_incremental(source(), experiences=2, order="sorted")
    cut = online_stream(whole, size=4, seed=3)
    strategies = []
    for benchmark in (cut, replace(cut, train=cut.original, original=(), online=None)):
        strategy = strategy_on(benchmark, "lwf(alpha=1.0)")
        for i in range(2):
            stream = benchmark.avalanche.streams["train"]
            parts = [stream[k] for k in benchmark.sub_experiences(i)]
            strategy.train(parts, eval_streams=[], shuffle=False)
        strategies.append(strategy.module.network.state_dict())
    assert all(torch.equal(strategies[0][name], value) for name, value in strategies[1].items())


def test_replayed_samples_differ_between_small_experiences(monkeypatch):
    benchmark = online_stream(class_incremental(source(), experiences=2, order="sorted"), size=4)
    strategy = strategy_on(benchmark, "er(memory=27)")
    _, steps = record(monkeypatch, strategy)
    train(strategy, benchmark, 0)
    steps.clear()
    train(strategy, benchmark, 1)
    replayed = [tuple(map(tuple, x[4:].flatten(1).tolist())) for x, _ in steps[:-1]]
    assert len(replayed) == 6 and len(set(replayed)) == 6


def test_all_classes_in_every_domain():
    benchmark = permuted_stream(source(), experiences=3, seed=1)
    scores = Scores(benchmark)
    strategy = strategy_on(benchmark, "er(memory=36) + lwf", plugins=[scores])
    for i in range(3):
        train(strategy, benchmark, i)
        strategy.eval(benchmark.evaluation_stream)
        assert scores.tally.total_EC == ((3,) * 6,) * 3
        assert scores.tally.correct_EC == scores.tally.correct_aware_EC  # all classes compete in both views
    assert strategy.learner.state["lwf"]["groups"] == (tuple(range(6)),)  # one head of old classes, not three
    memory = strategy.learner.state["er"]
    assert torch.bincount(memory["y"]).tolist() == [6] * 6
    raw = {tuple(x.flatten().tolist()): i for i, part in enumerate(benchmark.train)
           for x in part.raw(torch.arange(len(part)))}  # fmt: skip
    origin = [raw[tuple(x.flatten().tolist())] for x in memory["x"]]
    assert [origin.count(i) for i in range(3)] == [12, 12, 12]


def test_joint_training_on_all_domains():
    benchmark = permuted_stream(source(), experiences=3)
    strategy = strategy_on(benchmark, "joint", train_mb_size=1000)
    seen = []
    strategy.on_step = lambda s: seen.append(s.mb_x.clone())
    train(strategy, benchmark, 0)
    expected = concatenate(benchmark.train)
    expected = expected.prepare(expected.raw(torch.arange(3 * 54)))
    assert sorted(seen[0].flatten(1).tolist()) == sorted(expected.flatten(1).tolist())


def test_foreign_models_are_told_the_task_on_the_fast_path():
    from avalanche.models import MultiTaskModule

    class Heads(MultiTaskModule):
        def __init__(self):
            super().__init__()
            self.linear, self.asked = torch.nn.Linear(4, 6), []

        def forward(self, x, task_labels):
            self.asked.append(task_labels.tolist())
            return self.linear(x.flatten(1))

    benchmark = class_incremental(source(), experiences=3, task_labels=True)
    model = Heads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategy = LightningStrategy(
        model=model, optimizer=optimizer, benchmark=benchmark, train_mb_size=18, eval_mb_size=6, evaluator=None
    )
    for i in range(3):
        train(strategy, benchmark, i)
    strategy.eval(benchmark.evaluation_stream)
    assert model.asked == [[0] * 18, [1] * 18, [2] * 18, [0] * 6, [1] * 6, [2] * 6]


def test_joint_training_keeps_every_samples_own_task():
    benchmark = class_incremental(source(), experiences=3, task_labels=True)
    strategy = strategy_on(benchmark, "joint", train_mb_size=54)
    seen = []
    strategy.on_step = lambda s: seen.append((s.mb_task_id.tolist(), (s.mb_y // 2).tolist()))
    train(strategy, benchmark, 0)
    assert seen[0][0] == seen[0][1]


def test_hyper_parameters_can_be_chosen_without_test_data(tmp_path, monkeypatch):
    reads = set()
    for name in ("raw", "batches"):

        def reading(self, *args, original=getattr(TensorSamples, name), **options):
            reads.add(len(self))
            return original(self, *args, **options)

        monkeypatch.setattr(TensorSamples, name, reading)
    options = [*SMALL, "benchmark.counts=[6,4]", "benchmark.validation=0.2", "trainer.eval_every=1"]
    tested = clframe.run("quickstart", options, output=tmp_path)
    assert tested.test_samples == (269, 181) and {269, 181} <= reads and not {161, 108} & reads
    reads.clear()
    chosen = clframe.run("quickstart", [*options, "benchmark.evaluate=validation"], output=tmp_path)
    assert chosen.test_samples == (161, 108) and {161, 108} <= reads and not {269, 181} & reads
    assert chosen.loss_terms == tested.loss_terms and chosen.accuracy_matrix != tested.accuracy_matrix


class Killed(BaseException):
    """Stands for a power cut."""


# tests/training/test_resume_inside.py resumes an online stream with known boundaries as well.
# Both others are stopped at several places in test_resume_inside.py, too.
@pytest.mark.parametrize("options", [
    pytest.param(["benchmark.online=16"], marks=pytest.mark.slow),
    pytest.param(["benchmark.online=16", "benchmark.boundaries=false"], marks=pytest.mark.slow),
    ["benchmark.online=16", "benchmark.blurry=0.5"],
])  # fmt: skip
def test_an_online_run_goes_on_where_it_stopped(options, tmp_path, monkeypatch):
    options = [*SMALL, *options, "strategy=er", "components.er.selection=reservoir", "optimizer.lr=0.01"]
    whole = clframe.run("quickstart", options, output=tmp_path / "whole")
    original, count = Monitor.on_step, iter(range(1, 10_000))

    def on_step(self, strategy):
        original(self, strategy)
        if next(count) == 50:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "on_step", on_step)
        with pytest.raises(Killed):
            clframe.run("quickstart", options, output=tmp_path / "broken")
    (folder,) = (tmp_path / "broken").glob("quickstart/*")
    assert list((folder / "checkpoints").iterdir())
    resumed = clframe.run(resume=folder)
    for name in ("accuracy_matrix", "accuracy_by_class", "loss_terms", "steps", "forward_transfer"):
        assert json.dumps(getattr(resumed, name)) == json.dumps(getattr(whole, name)), name
    saved = [torch.load(Path(r.run_folder) / "checkpoints" / "experience_005.ckpt") for r in (whole, resumed)]
    assert all(torch.equal(value, saved[1]["network"][name]) for name, value in saved[0]["network"].items())


@pytest.mark.parametrize(
    "overrides, lines",
    [
        ([], ["experience   0     270 train      90 test   classes 4 7", "measured on test data"]),
        (["benchmark.first=6"], ["experience   0     811 train     270 test   classes 4 7 9 0 6 1"]),
        (["benchmark.counts=[9,1]"], ["experience   1     136 train      46 test   classes 5"]),
        (["benchmark.validation=0.1", "benchmark.evaluate=validation"],
         ["experience   0     243 train      27 validation      90 test   classes 4 7", "measured on validation data"]),
        (["benchmark.protocol=task_incremental"], ["every experience has its number as task label"]),
        (["benchmark.protocol=rotated", "benchmark.angles=[0,30]"],
         ["experience   0   1,347 train     450 test   as stored", "rotated by 30 degrees", "brings all 10 classes"]),
        (["benchmark.protocol=permuted", "benchmark.experiences=2"],
         ["experience   1   1,347 train     450 test   permuted pixels"]),
        (["benchmark.online=100"],
         ["experience   0     270 train", "online: 3 + 3 + 3 + 3 + 3 small experiences of 100 samples, boundaries known",
          "measured on test data"]),
        (["benchmark.online=100", "benchmark.blurry=0.5"],
         ["experience   0     300 train", "small experiences of 100 samples, boundaries unknown"]),
    ],
)  # fmt: skip
def test_explain_says_who_learns_what_when(overrides, lines):
    text = clframe.explain("quickstart", [*SMALL, "seed=1", *overrides])
    for line in lines:
        assert line in text


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["benchmark.protocol=domain"], "benchmark.protocol: found 'domain'"),
        (["benchmark.protocol=permuted", "benchmark.first=3"], "benchmark.first: found 3; leave it out, every permuted"),
        (["benchmark.protocol=rotated", "benchmark.counts=[5,5]"], r"benchmark.counts: found \[5, 5\].*rotated exp"),
        (["benchmark.protocol=rotated", "benchmark.class_order=sorted"], "benchmark.class_order: found 'sorted'"),
        (["benchmark.angles=[0,90]"], r"benchmark.angles: found \[0.0, 90.0\].*set benchmark.protocol=rotated"),
        (["benchmark.class_order=icarl"], "benchmark.class_order: found 'icarl', which orders 100 classes, for 10 classes"),
        (["benchmark.counts=[5,4]"], "benchmark.counts: found 2 counts with sum 9 for 10 classes"),
        (["benchmark.first=9"], "benchmark.first: found 9 for 10 classes in 5 experiences; give 1 to 6"),
        (["benchmark.validation=1"], "benchmark.validation: found 1.0; give a fraction from 0, below 1"),
        (["benchmark.evaluate=validation"], "benchmark.evaluate: found 'validation'.*hold data out for it"),
        (["benchmark.online=0"], "benchmark.online: found 0; give at least 1"),
        (["benchmark.blurry=0.5"], "benchmark.blurry: found 0.5; set benchmark.online"),
        (["benchmark.boundaries=false"], "benchmark.boundaries: found false; set benchmark.online"),
        (["benchmark.online=9", "benchmark.blurry=2"], "benchmark.blurry: found 2.0; give a fraction from 0 to 1"),
        (["benchmark.online=9", "trainer.engine=trainer"], "trainer.engine: found trainer for an online stream"),
        (["benchmark.online=9", "trainer.eval_every=1"], "trainer.eval_every: found 1 for an online stream"),
        (["benchmark.online=9", "optimizer.schedule=cosine"], "optimizer.schedule: found cosine for an online stream"),
        (["benchmark.online=9", "benchmark.blurry=0.5", "benchmark.protocol=task_incremental"],
         "found task labels on an online stream without boundaries"),
    ],
)  # fmt: skip
def test_what_no_protocol_can_do(overrides, message):
    with pytest.raises(ConfigError, match=message):
        clframe.explain("quickstart", [*SMALL, *overrides])
