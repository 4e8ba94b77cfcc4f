"""Exports: the same probabilities and decisions as clframe, from graphs that need neither clframe nor the strategy."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from torch.torch_version import TorchVersion

import clframe
from clframe.accounting import cumulative_macs
from clframe.core import Component, Experience, compose, parse
from clframe.data.images import to_pixels
from clframe.data.sources.characters import digits
from clframe.errors import ClframeError, ConfigError, RunFolderError, UnknownNameError, UnsupportedError
from clframe.exits import ALWAYS
from clframe.exits.clearance import clear_threshold
from clframe.exits.learned import confidences
from clframe.nn import BACKBONES, Network
from clframe.targets import export_programs, runner
from clframe.targets.export import example_inputs, export, export_run
from clframe.targets.export_graphs import WholeModel, divide, stored_dtype, traceable
from clframe.targets.export_programs import onnx_outputs, pt2_outputs, trace
from clframe.targets.prediction import predict
from clframe.targets.runner import StagedModel
from clframe.training.learner import Learner
from clframe.training.trained import TrainedModel

THRESHOLD = 0.7
BATCHES = (1, 33)
SOURCE = digits()


def images(count):
    """Real digits, and random bytes."""
    random = torch.randint(0, 17, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    return SOURCE.test.x[:count], random


def learn(strategy, *, backbone="small_cnn", held_out=False, **options):
    """A model that learned six digits in two experiences, with a few steps of SGD and no engine."""
    torch.manual_seed(0)
    network = Network(BACKBONES.get(backbone)((1, 8, 8), **(options or {"width": 8})))
    learner = Learner(network, parse(strategy) if isinstance(strategy, str) else compose(*strategy), seed=0)
    held = []
    for index, classes in enumerate([(0, 1, 2), (3, 4, 5)]):
        chosen = torch.cat([(SOURCE.train.y == c).nonzero().flatten()[:40] for c in classes])
        samples, past = SOURCE.train.subset(chosen), tuple(range(3 * index))
        held.append(SOURCE.test.subset(torch.isin(SOURCE.test.y, torch.tensor(classes)).nonzero().flatten()))
        experience = Experience(index, 2, classes, past, (), samples, tuple(held) if held_out else ())
        learner.begin(experience, classes=classes, epochs=2)
        optimizer = partial(torch.optim.SGD, lr=0.05)(network.parameters())
        for epoch in range(2):
            network.train()
            learner.before_epoch(epoch)
            for at in torch.randperm(len(samples)).split(16):
                batch = learner.make_batch(samples.prepare(samples.raw(at)), samples.y[at])
                optimizer.zero_grad()
                learner.loss(batch, network(batch.x, taps=learner.taps)).sum().backward()
                learner.modify_gradients()
                optimizer.step()
                learner.after_step()
        learner.end()
    network.eval().requires_grad_(False)
    return TrainedModel(learner, (7, 3, 9, 0, 1, 4), SOURCE.train.mean, SOURCE.train.std)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with exits and thresholds, and the folder of its strategy."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = [
        f"strategy=er + exits(at=['block1']) + early_exit(threshold={THRESHOLD})", "components={}", "trainer.epochs=1",
        "benchmark.experiences=2", "backbone.width=8", "trainer.batch_size=32", "trainer.progress=false",
        "trainer.loggers=[]",
    ]  # fmt: skip
    return Path(clframe.run("quickstart", overrides, output=folder).run_folder)


@pytest.fixture(scope="module")
def model(run):
    return clframe.load(run)


@pytest.fixture(scope="module")
def whole(run):
    pytest.importorskip("onnxruntime")
    return export_run(run)


@pytest.fixture(scope="module")
def staged(run):
    pytest.importorskip("onnxruntime")
    return export_run(run, staged=True)


def assert_whole(model, found, x):
    """Every exit, the prediction and its class, as clframe computes them."""
    output = model.outputs(x)
    expected = torch.stack([scores_BC.softmax(1) for scores_BC in output.logits], 1)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1], model.learner.predict(output).softmax(1), rtol=0, atol=1e-4)
    assert torch.equal(found[2], model.classify(x))


def assert_staged(model, runner, x, *, threshold=None, given=None):
    """The same exits and probabilities as dynamic inference, and the cost of the exit where each sample stopped."""
    scores_BC, exit_B = model.dynamic(threshold=threshold)(model.prepare(x))
    found = runner(x.numpy() if runner.description["format"] == "onnx" else x, threshold=given)
    assert np.asarray(found.exits).tolist() == exit_B.tolist()
    np.testing.assert_allclose(np.asarray(found.probabilities), scores_BC.softmax(1).numpy(), rtol=0, atol=1e-4)
    assert np.asarray(found.classes).tolist() == model.ids(scores_BC).tolist()
    return found


def test_a_whole_onnx_graph_computes_every_exit_and_the_prediction(model, whole):
    samples = [x for count in BATCHES for x in images(count)]
    for x, found in zip(samples, onnx_outputs(whole / "model.onnx", [[x] for x in samples]), strict=True):
        assert_whole(model, found, x)


def test_a_staged_onnx_export_decides_as_dynamic_inference(model, staged):
    stages = StagedModel(staged, threads=1)
    for count in BATCHES:
        for x in images(count):
            assert_staged(model, stages, x)
    x = SOURCE.test.x[:200]
    middle = float(model.outputs(x).logits[0].softmax(1).amax(1).quantile(0.5))
    for threshold in (0.0, middle, 1.0):
        found = assert_staged(model, stages, x, threshold=threshold, given=threshold)
        macs = {stage["exit"]: stage["macs"] for stage in stages.stages}
        assert found.macs.tolist() == [macs[exit] for exit in found.exits.tolist()]
        if threshold == middle:
            assert 90 <= (found.exits == 0).sum() <= 110  # samples have stopped at both exits


def test_the_graph_states_classes_costs_and_thresholds(run, model, whole, staged):
    onnx = pytest.importorskip("onnx")
    described = json.loads((whole / "model.json").read_text())
    stored = {entry.key: json.loads(entry.value) for entry in onnx.load(whole / "model.onnx").metadata_props}
    assert stored["classes"] == described["classes"] == [{"id": c, "name": str(c)} for c in model.class_order]
    assert described["input"]["dtype"] == "uint8" and described["input"]["shape"] == [1, 8, 8]
    result = clframe.Result.from_json(run / "results.json")
    assert [entry["macs"] for entry in described["exits"]] == list(result.exits[-1].macs_K)
    assert described["rule"] == {
        "measure": "max_probability", "thresholds": [THRESHOLD] * (len(described["exits"]) - 1), "fallback": "last",
    }  # fmt: skip
    assert described["largest_difference"] <= export_programs.TOLERANCE
    assert [stage["macs"] for stage in json.loads((staged / "model.json").read_text())["stages"]] == list(
        result.exits[-1].macs_K
    )


def test_the_graph_names_no_path_of_this_machine(whole):
    content = (whole / "model.onnx").read_bytes()
    assert b".py" not in content and str(Path(clframe.__file__).parent).encode() not in content


def test_the_runner_needs_no_clframe(model, staged, tmp_path):
    np.save(tmp_path / "inputs.npy", SOURCE.test.x[:20].numpy())
    code = (
        "import sys; sys.argv = ['run_staged', sys.argv[1]]; sys.path.insert(0, '.'); import run_staged; "
        "code = run_staged.main(); assert not {'clframe', 'torch'} & set(sys.modules), 'imported'; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "inputs.npy")], cwd=staged, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    header, *lines = [line.split("\t") for line in done.stdout.splitlines()]
    scores_BC, exit_B = model.dynamic()(model.prepare(SOURCE.test.x[:20]))
    assert header == ["class", "name", "probability", "exit", "MACs"]
    assert [int(line[0]) for line in lines] == model.ids(scores_BC).tolist()
    assert [line[3] for line in lines] == [model.network.exit_names[exit] for exit in exit_B]


def test_the_runner_imports_nothing_else():
    tree = ast.parse(Path(runner.__file__).read_text())
    found = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                     else [node.module] if isinstance(node, ast.ImportFrom) else [])
    }  # fmt: skip
    assert found <= {"__future__", "argparse", "collections", "json", "numpy", "onnxruntime", "pathlib", "sys", "torch",
                     "typing"}  # fmt: skip


@pytest.mark.slow
def test_pt2_programs_decide_as_clframe(model, tmp_path):
    folder = export(model, tmp_path / "pt2", format="pt2")
    stages = StagedModel(export(model, tmp_path / "staged", format="pt2", staged=True))
    samples = [x for count in BATCHES for x in images(count)]
    for x, found in zip(samples, pt2_outputs(folder / "model.pt2", [[x] for x in samples]), strict=True):
        assert_whole(model, found, x)
        assert_staged(model, stages, x)
    extra = {"model.json": ""}
    torch.export.load(str(folder / "model.pt2"), extra_files=extra)
    assert json.loads(extra["model.json"])["classes"] == stages.description["classes"]


def traced(model, *, example=None):
    """The whole graph, not written to a file."""
    with traceable(model.network):
        return trace(WholeModel(model).eval(), [images(5)[0] if example is None else example], what="it").module()


def in_stages(model, *, threshold=None, example=None):
    """The runner over the stages as modules, not traced: decisions and carried tensors are those of an export."""
    dynamic = model.dynamic(threshold=threshold)
    example = images(2)[0] if example is None else example
    parts = divide(model, dynamic, example)
    made = StagedModel.__new__(StagedModel)
    made.stages = [{**vars(spec), "macs": spec.macs} for _, spec in parts]
    made.description = {
        "format": "pt2", "rule": {"fallback": dynamic.policy.fallback},
        "input": {"shape": [*example.shape[1:]], "dtype": str(example.dtype).removeprefix("torch.")},
    }  # fmt: skip
    made.classes = list(model.class_order)
    made._graphs = runner._TorchGraphs([])
    made._graphs.modules = [stage for stage, _ in parts]
    return made


VIT = {"backbone": "vit_tiny", "patch": 4, "width": 16, "depth": 2}
VARIANTS = {
    "bias correction": ("bic + exits", {}),
    "nearest class means": ("icarl + er + exits", {}),
    "discriminant analysis": ("slda + exits", {}),
    "geometric": ("er + exits(ensemble='geometric', fit_on='training') + early_exit(threshold=0.6)", {}),
    "product, patience": ("exits(ensemble='product') + early_exit(threshold=0.5, measure='patience')", {}),
    "cascade, most confident": ("exits(cascade=True) + early_exit(threshold=0.6, fallback='confident')", {}),
    "boosted": ("exits(ensemble='boosted') + early_exit(threshold=0.6)", {}),
    "isotonic": ("exits(calibration='isotonic') + early_exit(threshold=0.5)", {"held_out": True}),
    "temperature, gate": (
        "exits(calibration='temperature') + early_exit(measure='gate', threshold=0.5)", {"held_out": True},
    ),
    "experts": ("exits + moe(experts=4, epochs=1) + early_exit(threshold=0.4)", VIT),
}  # fmt: skip


OLD = TorchVersion(torch.__version__) < "2.7"
NOT_IN_OLD = (
    "bias correction", "nearest class means", "discriminant analysis", "isotonic", "temperature, gate", "experts",
)  # fmt: skip
"""Variants that torch 2.6 does not trace with a dynamic batch; ``clframe export`` then refuses them with one line."""
SLOW = ("product, patience", "boosted", "nearest class means", "discriminant analysis", "isotonic")
"""The default suite exports one of each kind: bias correction, a geometric ensemble, a cascade, a temperature, experts."""


def marks_of(name):
    skipped = [pytest.mark.skipif(OLD, reason="torch 2.6")] * (name in NOT_IN_OLD)
    return [*skipped, *[pytest.mark.slow] * (name in SLOW)]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name)) for name in VARIANTS])
def test_corrections_ensembles_calibration_and_experts_are_part_of_the_graph(name):
    strategy, options = VARIANTS[name]
    model = learn(strategy, **options)
    threshold = None if model.learner.composition.owner("prediction") is not None else 0.5
    graph, stages = traced(model), in_stages(model, threshold=threshold)
    for count in BATCHES:
        for x in images(count):
            assert_whole(model, graph(x), x)
            with traceable(model.network):
                assert_staged(model, stages, x, threshold=threshold)


COUNTED = {
    "failure": ("er + exits(cascade=True) + early_exit(measure='failure')", {"held_out": True}, True),
    "gate": ("er + exits + early_exit(measure='gate')", {"held_out": True}, True),
    "ncm": ("er + ncm + exits + early_exit", {}, True),
    "geometric": ("er + exits(ensemble='geometric', fit_on='training') + early_exit", {}, False),
    "most confident": ("er + exits + early_exit(measure='margin', fallback='confident')", {}, False),
    "never at the first": ("er + exits(at=['block1', 'block2']) + early_exit(threshold=[2.0, 0.5])", {}, False),
}  # fmt: skip
"""Strategies, options of the model, and whether predictions cost more than backbone and heads."""


@pytest.mark.parametrize("name", COUNTED)
def test_stages_cost_what_predict_reports(name):
    strategy, options, more = COUNTED[name]
    model, x = learn(strategy, **options), SOURCE.test.x[:200]
    state = model.learner.state["early_exit"]
    confidence_KN = confidences(model.dynamic().measure, model.outputs(x).logits)[:-1].double()
    middle = tuple(clear_threshold(float(confidence_N.median()), confidence_N) for confidence_N in confidence_KN)
    state["thresholds"] = (2.0, *middle[1:]) if name == "never at the first" else middle
    found, expected = in_stages(model)(x), predict(model, x)
    assert found.macs.tolist() == [row.macs for row in expected]
    assert len(set(found.macs.tolist())) == (2 if name == "never at the first" else len(middle) + 1)
    heads = cumulative_macs(model.network)[-1]
    assert (int(found.macs.max()) > heads) == more
    if name == "never at the first":
        assert found.macs.max() < heads


def test_the_description_of_stages_has_their_costs_and_plain_json(tmp_path):
    model = learn("er + exits(at=['block1', 'block2']) + early_exit(measure='gate', threshold=[2.0, 0.5])", held_out=True)
    model.learner.state["early_exit"]["thresholds"] = (2.0, ALWAYS)
    folder = export(model, tmp_path / "staged", format="pt2", staged=True)
    described = json.loads((folder / "model.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    (row,) = predict(model, SOURCE.test.x[:1])
    assert described["rule"]["thresholds"] == [None, 0.0]
    assert [stage["threshold"] for stage in described["stages"]] == [0.0, None]
    first, last = (stage["macs"] for stage in described["stages"])
    assert [entry["macs"] for entry in described["exits"]] == [None, first, last]
    assert (row.exit, row.macs) == ("block2", first)
    found = StagedModel(folder)(SOURCE.test.x[:9])
    assert (found.exits.tolist(), found.macs.tolist()) == ([1] * 9, [first] * 9)


@pytest.mark.parametrize("rule", ["vote", "mean"])
def test_a_rule_over_all_exits_is_exported_whole_and_refused_in_stages(rule, tmp_path):
    model = learn(f"exits + early_exit(rule='{rule}')")
    graph = traced(model)
    for x in images(33):
        assert_whole(model, graph(x), x)
    with pytest.raises(UnsupportedError, match=f"--staged cannot stop early here: rule '{rule}' uses all exits"):
        export(model, tmp_path / "staged", format="pt2", staged=True)
    assert not (tmp_path / "staged").exists()


@dataclass(frozen=True, kw_only=True)
class Joint(Component):
    """Replaces the logits of every exit by their mean over the exits."""

    name: ClassVar[str] = "joint_logits"
    slots: ClassVar[frozenset[str]] = frozenset({"logits"})

    def adjust_logits(self, output, state):
        mean = torch.stack(output.logits).mean(0)
        return output._replace(logits=(mean,) * len(output.logits))


@dataclass(frozen=True, kw_only=True)
class Branching(Component):
    """Corrects logits by a branch on their values."""

    name: ClassVar[str] = "branching"
    slots: ClassVar[frozenset[str]] = frozenset({"logits"})

    def adjust_exit_logits(self, exit, logits_BC, taps, state):
        return 2 * logits_BC if float(logits_BC.sum()) > 0 else logits_BC


def test_a_correction_of_all_exits_together_is_exported_whole_and_refused_in_stages(tmp_path):
    model = learn((*parse("exits"), Joint()))
    graph = traced(model)
    for x in images(33):
        assert_whole(model, graph(x), x)
    with pytest.raises(UnsupportedError, match="joint_logits corrects the logits of all exits together"):
        export(model, tmp_path / "staged", format="pt2", staged=True, threshold=0.5)


def test_a_strategy_that_branches_on_values_is_refused_in_one_line(tmp_path):
    model = learn((*parse("exits"), Branching()))
    with pytest.raises(UnsupportedError, match="cannot be traced to a graph with a dynamic batch") as caught:
        export(model, tmp_path / "here" / "deep", format="pt2")
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_graph_that_differs_from_the_model_is_not_written(model, tmp_path, monkeypatch):
    def changed(path, batches):
        return [[value + 0.001 for value in found] for found in pt2_outputs(path, batches)]

    monkeypatch.setattr("clframe.targets.export.pt2_outputs", changed)
    with pytest.raises(UnsupportedError, match=r"differs from the model by 0.001, more than 0.0001"):
        export(model, tmp_path / "out", format="pt2")
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(OLD, reason="torch 2.6 does not trace it with a dynamic batch")
def test_text_models_take_token_ids():
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    backbone = BACKBONES.get("bert")((7,), vocabulary=50, width=16, depth=2)
    learner = Learner(Network(backbone), parse("exits + early_exit(threshold=0.4)"), seed=0)
    learner.network.grow(range(4))
    for head in learner.network.heads:  # untrained heads predict almost uniformly
        for parameter in head.parameters():
            parameter.data.mul_(8)
    learner.network.eval().requires_grad_(False)
    model = TrainedModel(learner, (0, 1, 2, 3), (), ())
    ids = torch.randint(1, 50, (33, 7), generator=torch.Generator().manual_seed(0))
    ids[::2, 4:] = 0  # padding
    assert stored_dtype(model) == "int64"
    drawn = example_inputs(model, 20, dtype="int64")
    assert drawn.shape == (20, 7) and 20 < drawn.max() < 50
    graph, stages = traced(model, example=ids[:5]), in_stages(model, example=ids[:5])
    for x in (ids, ids[:1]):
        assert_whole(model, graph(x), x)
        assert_staged(model, stages, x)


def test_safetensors_are_loaded_as_the_same_model_without_training_data(run, model, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    folder = export_run(run, output=tmp_path / "weights", format="safetensors")
    loaded = clframe.load(folder)
    x = SOURCE.test.x[:100]
    assert all(torch.equal(*pair) for pair in zip(loaded.outputs(x).logits, model.outputs(x).logits, strict=True))
    assert torch.equal(loaded.classify(x), model.classify(x))
    assert torch.equal(loaded.dynamic()(loaded.prepare(x)).exit_B, model.dynamic()(model.prepare(x)).exit_B)
    assert loaded.class_order == model.class_order and loaded.class_names == model.class_names
    with safetensors.safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        names = set(file.keys())
    assert names == {f"network/{name}" for name in model.network.state_dict()}


@pytest.mark.parametrize("strategy", ["bic + exits", "icarl + er + exits"])
def test_states_that_change_predictions_are_kept_and_samples_are_not(strategy, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    from clframe.config.load import load_config
    from clframe.targets.portable import read_portable, write_portable
    from clframe.training.trained import restore_model

    model = learn(strategy)
    write_portable(model, load_config("quickstart"), tmp_path)
    content, recipe, _ = read_portable(tmp_path)
    assert recipe is None
    fresh = Network(BACKBONES.get("small_cnn")((1, 8, 8), width=8))
    restored = restore_model(fresh, parse(strategy), content)
    x = SOURCE.test.x[:50]
    assert all(torch.equal(*pair) for pair in zip(restored.outputs(x).logits, model.outputs(x).logits, strict=True))
    with safetensors.safe_open(str(tmp_path / "model.safetensors"), framework="pt") as file:
        shapes = [tuple(file.get_slice(name).get_shape()) for name in list(file.keys())]
    assert not [shape for shape in shapes if shape[1:] == (1, 8, 8)]


def test_a_damaged_file_is_refused(run, tmp_path):
    pytest.importorskip("safetensors")
    folder = export_run(run, output=tmp_path / "weights", format="safetensors")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RunFolderError, match="cannot be read as a model of clframe"):
        clframe.load(folder)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"format": "onx"}, UnknownNameError, "unknown format 'onx'; did you mean 'onnx'"),
        ({"opset": 7}, ConfigError, "--opset found 7; give 18 to 23"),
        ({"format": "pt2", "opset": 18}, ConfigError, "--opset found for --format pt2"),
        ({"threshold": 0.5}, ConfigError, "--threshold has an effect with --staged only"),
        ({"staged": True, "threshold": 1.5}, ConfigError, "give a number from 0 to 1"),
        ({"staged": True, "threshold": float("nan")}, ConfigError, "give a number from 0 to 1"),
        ({"format": "safetensors", "staged": True}, ConfigError, "--staged found for --format safetensors"),
        ({"dtype": "int9"}, UnknownNameError, "unknown type 'int9'"),
    ],
)
def test_options_that_do_not_fit_are_refused(model, tmp_path, options, kind, message):
    with pytest.raises(kind, match=message):
        export(model, tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())


def test_a_folder_with_content_is_refused(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("text")
    with pytest.raises(RunFolderError, match="exists; give another --output"):
        export(model, tmp_path / "out", format="pt2")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_missing_package_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UnsupportedError, match=r"found no usable package onnxscript; pip install 'clframe\[export\]'"):
        export(model, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UnsupportedError, match=r"safetensors; pip install 'clframe\[export\]'"):
        export(model, tmp_path / "out", format="safetensors")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_networks_with_one_exit_have_no_stages(threshold, tmp_path):
    with pytest.raises(UnsupportedError, match="found one exit; train with exits, or leave --staged out"):
        export(learn("er"), tmp_path / "out", format="pt2", staged=True, threshold=threshold)


def test_the_runner_refuses_inputs_that_do_not_fit(staged):
    stages = StagedModel(staged, threads=1)
    x = SOURCE.test.x[:3].numpy()
    with pytest.raises(ValueError, match=r"found shape \(3, 8, 8\); give a batch \(N, 1, 8, 8\)"):
        stages(x[:, 0])
    with pytest.raises(ValueError, match="found float32; give uint8"):
        stages(x.astype("float32"))
    with pytest.raises(ValueError, match="found shape"):
        stages(x[:0])
    with pytest.raises(ValueError, match="one for each of"):
        stages(x, threshold=[0.5] * 7)
    never = stages(x, threshold=[None] * (len(stages.stages) - 1))
    assert never.exits.tolist() == [stages.stages[-1]["exit"]] * 3


@pytest.mark.parametrize("content", [None, b"12 7 3\n", b"", b"PK\x03\x04", "npz"])
def test_the_runner_names_a_file_that_is_no_array(staged, tmp_path, content, capsys):
    file = tmp_path / "inputs.npy"
    if content == "npz":
        with open(file, "wb") as stream:
            np.savez(stream, x=SOURCE.test.x[:2].numpy())
    elif content is not None:
        file.write_bytes(content)
    assert runner.main([str(file), "--folder", str(staged)]) == 2
    reason = " (No such file or directory)" if content is None else ""
    found = capsys.readouterr().err
    assert found == f"run_staged: error: {file}: not an .npy array of inputs{reason}; save one with numpy.save\n"


@pytest.mark.parametrize("size", [(20, 20), (32, 32), (45, 31), (17, 50), (33, 64)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_the_documented_conversion_of_files_is_that_of_clframe(tmp_path, size, mode):
    text = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()
    code = text[text.index("def read(") :].partition("\n\n")[0]
    names = {"np": np, "Image": Image, "ImageOps": ImageOps}
    exec(code, names)
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = tmp_path / "photo.png"
    Image.fromarray(pixels.squeeze()).save(file, exif=exif)
    with Image.open(file) as image:
        expected = to_pixels(image, channels=3, size=32)
    assert np.array_equal(names["read"](file), expected.numpy())


def test_errors_are_one_line(tmp_path):
    for run in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ClframeError) as caught:
            export_run(run, format="pt2")
        assert "\n" not in str(caught.value) and str(caught.value).startswith("export: ")
