"""``on_nonfinite: skip``: an update that is not finite changes nothing, and is counted."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning import Fabric, Trainer
from lightning.fabric.plugins.precision import MixedPrecision as FabricPrecision
from lightning.pytorch.plugins.precision import MixedPrecision as TrainerPrecision
from power_cuts import TINY, assert_same_run, cut_run, without_pictures
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import clframe
from clframe.config.load import load_config
from clframe.config.typed import from_mapping, same_config, to_yaml
from clframe.core import Component, Experience, compose, parse
from clframe.data import Benchmark, Source, TensorSamples, class_incremental
from clframe.data.avalanche import import_avalanche
from clframe.errors import ConfigError
from clframe.nn import Network
from clframe.nn.backbones import Backbone
from clframe.report.comparison import group_runs
from clframe.report.content import make_page
from clframe.report.loading import load_run
from clframe.report.terminal import summary_text
from clframe.results import Result

import_avalanche()

from clframe.training.divergence import DivergenceGuard, UpdateFilter
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy

BATCH, EPOCHS = 4, 2
ENGINES = ["fabric", "trainer"]
BAD = (3, 17)
"""Samples of the first experience whose input becomes NaN when it is loaded; there are 22: the last batch has 2."""
MARK = 1e4
"""A value of these samples: data in memory that is not finite is refused."""


def bench(*, bad: tuple[int, ...] = BAD) -> Benchmark:
    y = torch.arange(4).repeat_interleave(11)
    x = torch.randn(len(y), 1, 2, 3, generator=torch.Generator().manual_seed(1)) + y.reshape(-1, 1, 1, 1)
    x[list(bad), 0, 0, 0] = MARK
    fine = torch.randn(4, 1, 2, 3)
    source = Source("blobs", TensorSamples(x, y), TensorSamples(fine, torch.arange(4)), classes=4)
    return class_incremental(source, experiences=2, order="sorted")


def spoil(x: Any) -> Any:
    return torch.where(x == MARK, math.nan, x)


def backbone() -> Backbone:
    """With batch normalization, whose statistics an input that is not finite spoils."""
    first = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU())
    return Backbone([("first", first, (5,))], input_shape=(1, 2, 3))


@dataclass(frozen=True, kw_only=True)
class Spoiler(Component):
    """Counts updates in its state, and may add a term that is not finite in step ``at`` of each epoch."""

    name: ClassVar[str] = "spoiler"
    terms: ClassVar[tuple[str, ...]] = ("spoil",)
    term: str = ""
    at: int = 1

    def init_state(self, network: Any) -> dict[str, Any]:
        return {"updates": 0}

    def losses(self, step: Any, state: Any) -> dict[str, Any]:
        weight = step.network.final.weight
        if not self.term or step.number != self.at:
            return {"spoil": weight.new_zeros(())}
        if self.term == "loss":  # its gradients are finite
            return {"spoil": weight.new_full((), math.inf)}
        return {"spoil": (0 * weight.sum()).sqrt()}  # 0, and its derivative is 0 * inf

    def after_step(self, network: Any, step: Any, state: Any) -> dict[str, Any]:
        return {"updates": state["updates"] + 1}


class Run:
    """One experience, of which batches, initial weights and gradients at updates are recorded."""

    def __init__(
        self, *, benchmark: Benchmark | None = None, spoiler: Spoiler | None = None, clip: float | None = None,
        action: Any = "skip", strategy: str = "naive", **options: Any,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.module = ContinualModule(
            Network(backbone()), compose(parse(strategy), spoiler or Spoiler()), seed=3, clip=clip,
            optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9), on_nonfinite=action,
        )  # fmt: skip
        self.benchmark = benchmark or bench()
        self.strategy = LightningStrategy(
            model=self.module, benchmark=self.benchmark, train_mb_size=BATCH, train_epochs=EPOCHS, evaluator=None,
            **options,
        )  # fmt: skip
        self.batches: list[tuple[int, Any, Any]] = []
        original = self.strategy.train_on

        def train_on(batch: Any) -> None:
            batch[0] = spoil(batch[0])
            if not self.batches:
                self.start = copy.deepcopy(self.module.network)
            self.batches.append((int(self.strategy.clock.train_exp_epochs), batch[0].clone(), batch[1].clone()))
            original(batch)

        self.strategy.train_on = train_on

    def train(self) -> Run:
        self.strategy.train(self.benchmark.avalanche.train_stream[0])
        return self

    @property
    def filter(self) -> UpdateFilter:
        assert self.module.divergence.filter is not None
        return self.module.divergence.filter

    @property
    def counts(self) -> tuple[int, int]:
        """Skipped updates, and all."""
        return self.filter.skipped[0], self.filter.updates[0]


def longhand(run: Run, *, accumulate: int = 1, clip: float | None = None) -> tuple[dict[str, Any], int]:
    """The weights that training on the recorded batches leads to where updates that are not finite never happen."""
    network = run.start.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    skipped = 0
    for epoch in range(EPOCHS):
        batches = [(x, y) for e, x, y in run.batches if e == epoch]
        for start in range(0, len(batches), accumulate):
            group = batches[start : start + accumulate]
            if not all(x.isfinite().all() for x, _ in group):
                skipped += 1
                continue
            optimizer.zero_grad()
            for x, y in group:
                (nn.functional.cross_entropy(network(x).last, y) / accumulate).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(network.parameters(), clip)
            optimizer.step()
    return network.state_dict(), skipped


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert value.isfinite().all(), name


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (1, 0.5), (4, None)])
def test_weights_are_those_of_training_without_the_update(engine, accumulate, clip):
    run = Run(engine=engine, accumulate=accumulate, clip=clip).train()
    expected, skipped = longhand(run, accumulate=accumulate, clip=clip)
    assert_same(run.module.network.state_dict(), expected)  # statistics of batch normalization among them
    updates = EPOCHS * -(-6 // accumulate)
    assert 0 < skipped < updates and run.counts == (skipped, updates)
    assert run.module.learner.state["spoiler"] == {"updates": updates - skipped}  # after_step was not called
    momentum = [run.strategy.optimizer.state[p]["momentum_buffer"] for p in run.module.network.parameters()]
    assert all(buffer.isfinite().all() for buffer in momentum)
    assert run.module.divergence.found == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("term", ["loss", "gradient"])
@pytest.mark.parametrize("strategy", ["naive", "er(memory=8) + agem"])
def test_a_loss_or_a_gradient_alone_skips_the_update(engine, term, strategy):
    """Also where a component, which must not see such a gradient, changes it."""
    run = Run(benchmark=bench(bad=()), engine=engine, spoiler=Spoiler(term=term), strategy=strategy)
    run.train().strategy.train(run.benchmark.avalanche.train_stream[1])
    assert dict(run.filter.skipped) == {0: EPOCHS, 1: EPOCHS} and dict(run.filter.updates) == {0: 12, 1: 12}
    assert all(value.isfinite().all() for value in run.module.network.state_dict().values())
    # 12 steps, of which those with a loss that is not finite are not in the means of terms.
    assert run.module.learner.loss_sums.steps == 24 - (4 if term == "loss" else 0)
    assert all(value.isfinite().all() for value in run.module.learner.loss_sums.sums.values())


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # Lightning's own
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_plain_trainer_skips_as_well():
    torch.manual_seed(0)
    module = ContinualModule(
        Network(backbone()), Spoiler(), seed=3, on_nonfinite="skip", optimizer=partial(torch.optim.SGD, lr=0.1)
    )
    stream = bench()
    module.begin(Experience(0, 2, stream.classes[0], (), (), stream.train[0]), epochs=1)
    x, y = spoil(stream.train[0].x), stream.train[0].y
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH)
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, accelerator="cpu")  # fmt: skip
    trainer.fit(module, loader)
    module.end()
    assert module.divergence.filter is not None
    assert (module.divergence.filter.skipped[0], module.divergence.filter.updates[0]) == (2, 6)
    assert module.learner.state["spoiler"] == {"updates": 4}
    assert all(value.isfinite().all() for value in module.network.state_dict().values())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("term", ["", "loss"])
def test_skips_of_the_gradient_scaler_are_counted_once(engine, clip, term):
    """A scale that overflows is halved by every skip, but not by one for a loss whose gradients are finite."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    precision = FabricPrecision("16-mixed", "cpu", scaler=scaler)
    own = {"trainer": {"plugins": [TrainerPrecision("16-mixed", "cpu", scaler=scaler)]}} if engine == "trainer" else {}
    fabric = Fabric(accelerator="cpu", plugins=[precision])
    run = Run(
        benchmark=bench(bad=()), fabric=fabric, engine=engine, clip=clip, spoiler=Spoiler(term=term, at=3), **own
    ).train()
    skipped, updates = run.counts
    halved = math.log2(2.0**24 / scaler.get_scale())
    assert halved == int(halved) and 0 < halved < updates == 12
    assert skipped == halved + (1 if term else 0)  # in the first epoch the gradients of that step overflow as well
    assert run.module.learner.state["spoiler"] == {"updates": updates - skipped}
    assert all(value.isfinite().all() for value in run.module.network.state_dict().values())


@pytest.mark.parametrize("engine", ENGINES)
def test_without_a_filter_the_scaler_skips_alone_and_lasts_for_the_run(engine):
    """A Trainer brings another scaler for each experience; that of the run is used, so only the first one has skips."""
    scaler, other = (torch.amp.GradScaler("cpu", init_scale=2.0**24) for _ in range(2))
    own = {"trainer": {"plugins": [TrainerPrecision("16-mixed", "cpu", scaler=other)]}} if engine == "trainer" else {}
    fabric = Fabric(accelerator="cpu", plugins=[FabricPrecision("16-mixed", "cpu", scaler=scaler)])
    run = Run(benchmark=bench(bad=()), fabric=fabric, engine=engine, action="stop", **own)
    for experience in run.benchmark.avalanche.train_stream:
        run.strategy.train(experience)
    guard, halved = run.module.divergence, math.log2(2.0**24 / scaler.get_scale())
    assert 0 < halved < 12 and guard.count_skipped(0) == (halved, 12) and guard.count_skipped(1) is None
    assert run.module.learner.state["spoiler"] == {"updates": 24 - halved}
    assert other.get_scale() == 2.0**24
    restored = DivergenceGuard()
    restored.load_state_dict(guard.state_dict())
    assert restored.count_skipped(0) == (halved, 12)


@pytest.mark.parametrize("action", ["stop", "warn"])
def test_other_values_check_nothing_in_a_step(action, monkeypatch):
    run = Run(benchmark=bench(bad=()), action=action)
    assert run.module.divergence.filter is None and run.strategy._filter is None
    kept = Run(benchmark=bench(bad=())).train()
    assert_same(run.train().module.network.state_dict(), kept.module.network.state_dict())
    assert kept.counts == (0, 12)


def test_an_experience_without_any_update_has_diverged(caplog):
    run = Run(benchmark=bench(bad=()), spoiler=Spoiler(term="loss", at=0), limit_batches=1).train()
    (line,) = run.module.divergence.found
    assert line == "experience 1: losses or gradients were not finite in every update, so all 2 were skipped"
    assert "training has diverged" in caplog.text
    assert run.module.learner.state["spoiler"] == {"updates": 0}


def test_counts_survive_a_checkpoint():
    run = Run().train()
    state = run.module.divergence.state_dict()
    other = Run()
    other.module.divergence.load_state_dict(state)
    assert other.counts == run.counts == (run.filter.skipped[0], 12)
    other.module.divergence.load_state_dict({"found": [], "experience": None})  # of an early version
    assert other.counts == run.counts


# --- a run ------------------------------------------------------------------------------------------------------------

HUGE = ["strategy=er(memory=20)", "optimizer={name: sgd, lr: 1e6}", "trainer.on_nonfinite=skip"]


@pytest.fixture
def quick():
    patch = without_pictures()
    yield
    patch.undo()


@pytest.mark.usefixtures("quick")
def test_a_run_reports_its_skipped_updates_and_resumes_with_them(tmp_path):
    folder, copies = cut_run([*TINY, *HUGE, "trainer.accumulate=2"], tmp_path, cuts=2)
    result = Result.from_json(folder / "results.json")
    one, two = result.skipped_updates
    assert 0 < one < 10 == two  # of 10 updates each
    assert (result.steps, result.batches) == (10 - one, 36)
    assert len(result.diverged) == 1 and "so all 10 were skipped" in result.diverged[0]
    log = (folder / "log.txt").read_text()
    assert f"; {one} of 10 updates skipped as not finite; " in log and "; 10 of 10 updates skipped" in log
    text = f"{one + two}, as losses or gradients were not finite ({one} in experience 1, 10 in experience 2)"
    assert text in " ".join(summary_text(result).split())
    groups, notices = group_runs([load_run(folder)])
    assert f"{folder}: skipped updates, {text}." in make_page(groups, [], notices)[0].notices
    assert all(value.isfinite().all() for value in clframe.load(folder).network.state_dict().values())
    for _, copied in copies:
        clframe.run(resume=copied)
        assert_same_run(folder, copied)


@pytest.mark.usefixtures("quick")
def test_a_healthy_run_is_the_same_and_counts_nothing(tmp_path):
    options = [*TINY, "trainer.epochs=1"]
    plain = clframe.run("quickstart", options, output=tmp_path / "a")
    kept = clframe.run("quickstart", [*options, "trainer.on_nonfinite=skip"], output=tmp_path / "b")
    assert plain.skipped_updates == () and kept.skipped_updates == (0, 0)
    assert kept.metrics == plain.metrics and kept.loss_terms == plain.loss_terms
    assert "skipped" not in (Path(kept.run_folder) / "log.txt").read_text() + summary_text(kept)
    one, two = ((Path(r.run_folder) / "metrics.csv").read_bytes() for r in (plain, kept))
    assert one == two and b"gradient/norm" in one


# --- the key ----------------------------------------------------------------------------------------------------------


def test_the_former_name_of_the_key_still_works(tmp_path):
    config = load_config("quickstart", ["trainer.on_divergence=warn"])
    assert config.trainer.on_nonfinite == "warn"
    old = to_yaml(config).replace("on_nonfinite", "on_divergence")
    assert "on_divergence: warn" in old and same_config(old, to_yaml(config))
    file = tmp_path / "mine.yaml"
    file.write_text("defaults: [quickstart]\ntrainer: {on_divergence: warn}\n")
    assert load_config(str(file)).trainer.on_nonfinite == "warn"
    assert load_config(str(file), ["trainer.on_nonfinite=skip"]).trainer.on_nonfinite == "skip"
    with pytest.raises(ConfigError, match=r"^trainer.on_divergence: is the former name of 'on_nonfinite'"):
        from_mapping({"trainer": {"on_divergence": "stop", "on_nonfinite": "skip"}})
    with pytest.raises(ConfigError, match=r"^trainer.on_nonfinite: found 'skipp'"):
        load_config("quickstart", ["trainer.on_nonfinite=skipp"])
