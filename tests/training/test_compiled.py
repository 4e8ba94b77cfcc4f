"""Compiled stages compute what uncompiled ones do, are compiled once while heads grow, and change nothing else."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import capture_runs as runs
import pytest
import torch
from conformance_runs import NEEDS_TOKENS
from power_cuts import TINY, assert_same_run, cut_run, without_pictures
from torch import nn

import clframe
from clframe.core import COMPONENTS, compose, parse
from clframe.errors import ConfigError, UnsupportedError
from clframe.nn import Network
from clframe.nn.backbones import Backbone, mlp
from clframe.training import capture
from clframe.training.compiled import CompiledStages, require_compiler
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
COMPILABLE = [name for name in COMPONENTS.names() if COMPONENTS.get(name).compilable]


def backbone_of(expression, device):
    """A network of convolutions on a GPU and of few operators on a CPU; data that fit it."""
    if device == "cpu" or any(name in expression for name in NEEDS_TOKENS):
        return (1, 4, 4), {}
    return (3, 16, 16), {"backbone": "small_cnn"}


def both(expression, backend, *, device="cpu", recorded=False, experiences=2, **options):
    """Results of runs with uncompiled and with compiled stages, and the graphs of each experience."""
    shape, more = backbone_of(expression, device)
    data = runs.stream(shape=shape)
    found, graphs = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        loop, costs = runs.prepare(expression, data=data, device=device, **more, **options)
        if compiled:
            loop.stages = CompiledStages(backend=backend)
        state, _ = runs.train(loop, costs, data, recorded=compiled and recorded, experiences=experiences)
        loop.eval(data.avalanche.test_stream)
        scores = [logits_BC.detach().clone() for logits_BC in loop.output.logits]
        found.append({**state, "scores": scores, "names": list(loop.model.state_dict())})
        if compiled:
            graphs = [loop.stages.take()[0], loop]
    return *found, graphs[0], graphs[1]


def largest_difference(a, b):
    """Largest difference of two lists of tensors, relative to the largest number of each tensor."""
    pairs = [(p, q) for p, q in zip(a, b, strict=True) if p.numel() and p.is_floating_point()]
    return max(float((p - q).abs().nan_to_num().max() / p.abs().nan_to_num(posinf=0, neginf=0).max().clamp_min(1e-6)) for p, q in pairs)


def check(expression, backend, *, tolerance=1e-5, **options):
    """Train ten steps on two experiences, compare, and return the number of graphs and the strategy."""
    epochs = 2 if "disjoint" in expression else 1
    plain, compiled, graphs, loop = both(expression, backend, epochs=epochs, **options)
    assert plain["names"] == compiled["names"]
    for expected, found in zip(plain["costs"], compiled["costs"], strict=True):
        if "bic" in expression:  # it fits a pair by Newton's method: rounding changes its steps
            if isinstance(found, dict) and "auxiliary" in found:
                assert found.pop("auxiliary") == pytest.approx(expected.pop("auxiliary"), rel=1e-5)
            assert found == pytest.approx(expected, rel=1e-6)
        else:
            assert found == expected
    for part in ("weights", "scores"):
        assert largest_difference(plain[part], compiled[part]) < tolerance, part
    return graphs, loop


@pytest.mark.parametrize("expression", ["er + exits(weights=ramp, every=1)", "sparsity"])
def test_stages_in_one_graph_compute_what_single_ones_do(expression):
    """Dynamo's graph is run as it is: one graph for training and one for evaluation serve growing heads."""
    graphs, _ = check(expression, "eager", experiences=3)
    assert graphs == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILABLE)
def test_every_component_that_says_so_can_be_compiled(name):
    graphs, _ = check(name, "aot_eager")
    trains = any(COMPONENTS.get(name)().training_experiences(index, 3) for index in range(3))
    assert graphs >= 1 + trains


@pytest.mark.slow
@pytest.mark.parametrize("expression", ["naive", "er + exits(regime=disjoint, every=1) + lwf", "sparsity"])
def test_generated_code_computes_the_same(expression):
    check(expression, "inductor")


@pytest.mark.filterwarnings("default")  # torch's advice on kernels differs from GPU to GPU
@pytest.mark.parametrize("expression", [pytest.param(name, marks=GPU) for name in (*runs.COMPOSED, *COMPILABLE)])
def test_generated_kernels_compute_the_same_on_a_gpu(expression, monkeypatch):
    """Compiled code becomes part of CUDA graphs if the component can be recorded."""
    monkeypatch.setattr(capture, "WARM", 2)
    monkeypatch.setattr(capture, "FEWEST", 2)
    components = list(parse(expression))
    recorded = all(component.capturable for component in components)
    with clframe.seeding.torch_settings(deterministic=True, cuda=True):
        _, loop = check(expression, "inductor", device="cuda", recorded=recorded, tolerance=1e-4)
    trains = all(component.training_experiences(1, 3) for component in components)
    assert not recorded or not trains or loop.step_capture.recorded


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("precision", [pytest.param(name, marks=GPU) for name in ("bf16-mixed", "16-mixed")])
@pytest.mark.parametrize("engine", ["fabric", "trainer"])
def test_generated_kernels_run_in_mixed_precision_on_a_gpu(precision, engine, tmp_path):
    options = [
        "strategy=er + exits + lwf", "backbone=resnet20", "backbone.width=8", "benchmark.experiences=3", "trainer.epochs=2",
        "trainer.accelerator=gpu", "trainer.loggers=[]", "trainer.progress=false", f"trainer.engine={engine}",
        f"trainer.precision={precision}",
    ]  # fmt: skip
    found = [
        clframe.run("quickstart", [*options, f"trainer.compile={wanted}"], output=tmp_path / wanted)
        for wanted in ("false", "true")
    ]
    plain, compiled = (result.metrics["final_average_accuracy"] for result in found)
    assert plain > 0.3 and abs(plain - compiled) < 0.25
    log = (Path(found[1].run_folder) / "log.txt").read_text()
    assert log.count("trainer.compile: ") == 1 and "graph(s) compiled in" in log


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture
def traced(monkeypatch):
    """Runs whose stages are traced to a graph, which then runs as it is: no code is generated."""
    torch._dynamo.reset()
    monkeypatch.setitem(CompiledStages.__init__.__kwdefaults__, "backend", "eager")
    patch = without_pictures()
    yield
    patch.undo()


def checkpoint(result):
    return torch.load(sorted((Path(result.run_folder) / "checkpoints").glob("*.ckpt"))[-1], weights_only=True)


@pytest.mark.parametrize("engine", ["fabric", pytest.param("trainer", marks=pytest.mark.slow)])
def test_a_run_says_what_was_compiled_and_has_the_weights_of_another(engine, tmp_path, traced):
    options = [*TINY, "strategy=er(memory=20) + exits", f"trainer.engine={engine}"]
    plain = clframe.run("quickstart", options, output=tmp_path / "plain")
    compiled = clframe.run("quickstart", [*options, "trainer.compile=true"], output=tmp_path / "compiled")
    assert plain.accuracy_matrix == compiled.accuracy_matrix
    one, other = checkpoint(plain)["network"], checkpoint(compiled)["network"]
    assert list(one) == list(other)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)
    lines = [line for line in (Path(compiled.run_folder) / "log.txt").read_text().splitlines() if "trainer.compile" in line]
    assert len(lines) == 1 and "trainer.compile: 2 graph(s) compiled in " in lines[0]
    ledger = json.loads((Path(compiled.run_folder) / "ledger.json").read_text())["ledger"]
    assert [(row["experience"], row["value"]) for row in ledger["figures"] if row["name"] == "compiled_graphs"] == [(0, 2)]
    assert [row["experience"] for row in ledger["times"] if row["phase"] == "compile"] == [0]


@pytest.mark.slow
def test_a_stopped_run_ends_as_if_it_had_not_been(tmp_path):
    """With generated code, whose sums do not depend on the batch that it was compiled for."""
    patch = without_pictures()
    options = [*TINY, "strategy=er(memory=20) + exits", "trainer.compile=true", "backbone=small_cnn", "benchmark.augment=[crop]"]
    try:
        whole, copies = cut_run(options, tmp_path, cuts=4, seed="compiled")
        for _, folder in copies:
            clframe.run(resume=folder)
            assert_same_run(whole, folder, sizes=False)  # the ledger inside says that a resumed run compiled again
    finally:
        patch.undo()


# --- what is refused, and what runs uncompiled ----------------------------------------------------


def test_a_missing_compiler_is_named_before_training(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(UnsupportedError, match=r"^trainer\.compile: found no C\+\+ compiler \(no-such-compiler\), which"):
        clframe.run("quickstart", ["trainer.compile=true", "trainer.accelerator=cpu"], output=tmp_path)
    with pytest.raises(UnsupportedError, match=r"found no C compiler \(no-such-compiler\)"):
        require_compiler(cuda=True)
    monkeypatch.setenv("CXX", "python3")  # found, whatever it is
    require_compiler(cuda=False)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_compiled_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("CXX", "python3")
    with pytest.raises(UnsupportedError, match=r"^trainer\.compile: found true with moe, which decides on the host"):
        clframe.explain("quickstart", ["strategy=moe", "backbone=vit_tiny", "backbone.patch=4", "trainer.compile=true"])
    with pytest.raises(ConfigError, match=r"trainer\.compile: found true; set trainer\.sync_batchnorm=false"):
        clframe.explain("quickstart", ["trainer.compile=true", "trainer.sync_batchnorm=true"])
    foreign = nn.Linear(2, 2)
    with pytest.raises(UnsupportedError, match="a model without components; pass the model through torch.compile"):
        LightningStrategy(model=foreign, optimizer=torch.optim.SGD(foreign.parameters(), lr=0.1), compile=True)


class Deciding(nn.Module):
    """A layer that decides by a value of its input."""

    def forward(self, x):
        return x if float(x.sum()) > 0 else -x


def strategy(stages):
    data = runs.stream()
    network = Network(Backbone([("flat", nn.Flatten(), (16,)), *stages], input_shape=(1, 4, 4)))
    module = ContinualModule(network, compose(), optimizer=partial(torch.optim.SGD, lr=0.01), seed=3)
    loop = LightningStrategy(
        model=module, benchmark=data, train_mb_size=6, train_epochs=2, eval_mb_size=64, evaluator=None, compile="eager"
    )
    return loop, data.avalanche.train_stream


def test_a_backbone_that_decides_by_values_is_refused_in_one_line():
    loop, experiences = strategy([("out", nn.Linear(16, 4), (4,)), ("decide", Deciding(), (4,))])
    with pytest.raises(UnsupportedError, match=r"^trainer\.compile: .* as one graph \(.*\); set trainer\.compile=false$"):
        loop.train(experiences[0])


def test_evaluations_that_choose_between_weights_are_reported_once(caplog):
    network, stages = Network(mlp((4,), width=8)), CompiledStages(backend="eager")
    stages.watch(network)
    assert not caplog.messages
    network.choice = SimpleNamespace(owner="lora")
    stages.watch(network)
    stages.watch(network)
    assert caplog.messages == ["trainer.compile: lora chooses between weights; evaluations run uncompiled"]


def test_hooks_that_are_added_later_are_called(caplog):
    torch._dynamo.reset()
    layer, seen = nn.Linear(16, 4), []
    loop, experiences = strategy([("out", layer, (4,))])
    loop.train(experiences[0])
    assert loop.stages.take()[0] == 1
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    with caplog.at_level("WARNING", logger="clframe"):
        loop.train(experiences[1])
    assert seen == 2 * [6, 6, 6, 6, 2]
    said = [record.getMessage() for record in caplog.records if record.name.startswith("clframe")]
    assert said == ["trainer.compile: a plugin or callback observes layers of the network by hooks; the run continues uncompiled"]
    hook.remove()
    loop.train(experiences[2])
    assert len(seen) == 10 and loop.stages.take()[0] == 0
