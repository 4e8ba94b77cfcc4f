"""Exports: the same probabilities and decisions as clframe, from graphs that need neither clframe nor the strategy."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_models import BATCHES, SOURCE, assert_staged, assert_whole, images
from PIL import ExifTags, Image, ImageOps

import clframe
from clframe.data.images import to_pixels
from clframe.errors import ClframeError, ConfigError, RunFolderError, UnknownNameError, UnsupportedError
from clframe.targets import export_programs, runner
from clframe.targets.export import export, export_run
from clframe.targets.export_programs import onnx_outputs, pt2_outputs
from clframe.targets.runner import StagedModel

THRESHOLD = 0.7


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


def test_a_graph_that_differs_from_the_model_is_not_written(model, tmp_path, monkeypatch):
    def changed(path, batches):
        return [[value + 0.001 for value in found] for found in pt2_outputs(path, batches)]

    monkeypatch.setattr("clframe.targets.export.pt2_outputs", changed)
    with pytest.raises(UnsupportedError, match=r"differs from the model by 0.001, more than 0.0001"):
        export(model, tmp_path / "out", format="pt2")
    assert not any(tmp_path.iterdir())


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
        ({"staged": True, "threshold": 1.5}, ConfigError, "give a probability from 0 to 1"),
        ({"staged": True, "threshold": float("nan")}, ConfigError, "give a probability from 0 to 1"),
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
