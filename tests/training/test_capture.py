"""Steps recorded as graphs are the steps that run otherwise, bit for bit; on a CPU with a stand-in for CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import capture_runs as runs
import pytest
import torch

import clframe
from clframe.core import Component, compose
from clframe.errors import UnsupportedError
from clframe.training import capture
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WHERE = ["cpu", pytest.param("cuda", marks=GPU)]


@pytest.fixture(autouse=True)
def early(monkeypatch):
    """Record in short experiences too; products of matrices must give equal bits on a GPU."""
    monkeypatch.setattr(capture, "WARM", 2)
    monkeypatch.setattr(capture, "FEWEST", 2)


@pytest.fixture(autouse=True)
def exact():
    with clframe.seeding.torch_settings(deterministic=True, cuda=torch.cuda.is_available()):
        yield


def both(expression, *, device="cpu", **options):
    shape = (1, 4, 4) if device == "cpu" or expression == "l2p" else (3, 16, 16)
    more = {} if device == "cpu" or expression == "l2p" else {"backbone": "small_cnn"}
    data = runs.stream(shape=shape)
    found = []
    for recorded in (False, True):
        loop, costs = runs.prepare(expression, data=data, device=device, **more, **options)
        found.append(runs.train(loop, costs, data, recorded=recorded, experiences=2))
    return found


def check(expression, **options):
    (eager, _), (recorded, graphs) = both(expression, **options)
    for part in eager:
        assert runs.equal(eager[part], recorded[part]), part
    return graphs


@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("expression", runs.COMPOSED)
def test_recorded_steps_give_the_same_weights_states_terms_and_costs(expression, device):
    graphs = check(expression, device=device)
    assert all(count >= 1 for count in graphs)


@pytest.mark.slow
@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("expression", runs.CAPTURABLE)
def test_every_component_that_says_so_can_be_recorded(expression, device):
    check(expression, device=device)


@pytest.mark.slow
@pytest.mark.parametrize("device", WHERE)
@pytest.mark.parametrize("kind", ["Adam", "AdamW", "RMSprop"])
def test_other_optimizers_can_be_recorded_too(kind, device):
    if kind == "RMSprop" and device == "cpu":
        pytest.skip("RMSprop keeps its steps in tensors on CUDA only")
    fused = {} if kind == "RMSprop" else {"fused": True}
    # Recorded steps read the learning rate from a float32 tensor, which holds these exactly.
    optimizer = partial(getattr(torch.optim, kind), lr=2**-7, **fused)
    assert sum(check("er", device=device, clip=0.5, optimizer=optimizer, gamma=0.5))


def test_a_clipped_step_is_recorded_with_its_norm():
    assert sum(check("naive", clip=0.1)) > 0


def test_the_smaller_last_batch_is_recorded_only_where_enough_epochs_are_left(monkeypatch):
    assert check("naive", epochs=6) == [2, 2]
    monkeypatch.setattr(capture, "FEWEST", 10)
    assert check("naive", epochs=6) == [1, 1]


def test_a_change_of_what_learns_records_again():
    # Of three epochs, two train the backbone only and one the exits only: a graph each, for full batches.
    assert check("exits(regime=disjoint, every=1)", epochs=3) == [2, 2]


def test_memory_is_freed_between_experiences():
    data = runs.stream()
    loop, costs = runs.prepare("naive", data=data)
    runs.train(loop, costs, data, recorded=True)
    assert loop.step_capture._graphs.released == 3 and not loop.step_capture._recordings


@dataclass(frozen=True, kw_only=True)
class Constant(Component):
    """A term that Python computes from the number of the step, declared capturable or not."""

    name = "constant"
    terms = ("term",)

    def losses(self, step, state):
        return {"term": step.output.last.mean() * 0.1 * step.number}


def prepared(component, data):
    loop, _ = runs.prepare("naive", data=data)
    module = ContinualModule(loop.learner.network, compose(component), optimizer=runs.SGD, seed=3)
    return LightningStrategy(
        model=module, benchmark=data, train_mb_size=6, train_epochs=3, eval_mb_size=64, evaluator=None
    )


def capturing(component, *, required=False):
    """A strategy whose steps are recorded, and its experiences."""
    data = runs.stream()
    loop = prepared(component, data)
    loop.step_capture = capture.StepCapture(loop, graphs=runs.RecordedGraphs(), required=required)
    return loop, data.avalanche.train_stream


def test_a_component_that_does_not_declare_it_runs_eagerly_and_is_named_once(caplog):
    loop, experiences = capturing(Constant())
    with caplog.at_level("INFO", logger="clframe"):
        for experience in experiences:
            loop.train(experience)
    assert [r.getMessage() for r in caplog.records if "kernel" in r.getMessage()] == [
        "steps run one kernel at a time: constant cannot be recorded (trainer.capture=false silences this)"
    ]
    loop, experiences = capturing(Constant(), required=True)
    with pytest.raises(UnsupportedError, match=r"^trainer\.capture: found true, but constant cannot be recorded; set"):
        loop.train(experiences[0])


def test_a_step_that_waits_for_the_device_runs_eagerly_with_the_same_numbers(caplog):
    @dataclass(frozen=True, kw_only=True)
    class Waiting(Component):
        """Reads a value of the device in every step."""

        name = "waiting"
        terms = ("term",)
        capturable = True

        def losses(self, step, state):
            return {"term": step.output.last.mean() * 0.01 * float(step.output.last.detach().abs().max() > 0)}

    weights = []
    for recorded in (False, True):
        loop, experiences = capturing(Waiting())
        if not recorded:
            loop.step_capture = None
        with caplog.at_level("INFO", logger="clframe"):
            loop.train(experiences[0])
        weights.append([p.detach().clone() for p in loop.model.parameters()])
    assert runs.equal(*weights)
    assert "the step cannot be recorded (aten::_local_scalar_dense waits for the device)" in caplog.text


def test_draws_in_a_loss_are_refused():
    @dataclass(frozen=True, kw_only=True)
    class Drawing(Component):
        """Draws a number in Python in every step."""

        name = "drawing"
        terms = ("term",)
        capturable = True

        def losses(self, step, state):
            return {"term": step.output.last.mean() * torch.rand((), generator=step.context.generator)}

    loop, experiences = capturing(Drawing(), required=True)
    with pytest.raises(UnsupportedError, match="a loss draws random numbers in Python"):
        loop.train(experiences[0])


def test_processes_use_a_recording_only_if_all_of_them_have_it(caplog, monkeypatch):
    record = capture.StepCapture._record
    for failed in (0, 1):
        loop, experiences = capturing(compose())
        told = []

        def total(number, loop=loop, failed=failed, told=told):
            loop.group = None
            told.append(number)
            return number + failed

        def record_in_a_group(self, loop=loop, total=total):
            found = record(self)
            loop.group = SimpleNamespace(total=total)  # from here until the decision
            return found

        monkeypatch.setattr(capture.StepCapture, "_record", record_in_a_group)
        with caplog.at_level("INFO", logger="clframe"):
            loop.train(experiences[0])
        assert bool(loop.step_capture.recorded) is not bool(failed) and set(told) == {0}
    assert caplog.text.count("another process cannot record the step") == 1


def test_a_required_recording_that_did_not_happen_is_reported(caplog, monkeypatch):
    monkeypatch.setattr(capture, "FEWEST", 100)
    loop, experiences = capturing(compose(), required=True)
    with caplog.at_level("WARNING", logger="clframe"):
        loop.train(experiences[0])
    assert loop.step_capture.recorded == 0 and "found true, but no step of the experience was recorded" in caplog.text


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"accumulate": 2}, "gradients of several batches are accumulated"),
        ({"engine_name": "trainer"}, "engine trainer calls Lightning's hooks in every step"),
    ],
)
def test_what_prevents_recording_is_named(changes, reason):
    loop, _ = runs.prepare("naive", data=runs.stream())
    for name, value in changes.items():
        setattr(loop, name, value)
    assert capture.find_obstacle(loop) == reason


def test_capture_true_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(UnsupportedError, match=r"^trainer\.capture: found true with a cpu device, but CUDA graphs need"):
        clframe.run("quickstart", ["trainer.capture=true", f"output={tmp_path}"])
