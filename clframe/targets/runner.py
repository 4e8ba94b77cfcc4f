"""Run a staged export of clframe: each sample stops at the first exit that is confident enough.

This file needs no clframe. ``clframe export --staged`` copies it next to the stages as ``run_staged.py``; it needs
numpy and onnxruntime for stages in ONNX, and only torch for stages in pt2::

    python run_staged.py inputs.npy                 # one line per sample: class, probability, exit, MACs
    python run_staged.py inputs.npy --threshold 0.9

    from run_staged import StagedModel
    model = StagedModel("export")
    found = model(inputs)                           # inputs as the data set stores them, such as bytes, batch first
    found.probabilities, found.exits, found.macs

Inputs and results are numpy arrays for ONNX and tensors for pt2. ``model.json`` describes the stages: a stage
receives the tensors that the one before it has sent, without the rows of the samples that have stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Predictions(NamedTuple):
    """Predictions of a batch, in its order."""

    probabilities: Any
    """[N, C], columns in the order of ``model.classes``."""
    classes: Any
    """[N], ids of the predicted classes."""
    exits: Any
    """[N], index of the exit that predicts."""
    macs: Any
    """[N], multiply-adds up to the exit at which the sample stopped."""


class StagedModel:
    """The stages of an exported network, and the rule by which samples stop.

    Args:
        folder: Folder of the export.
        threads: CPU threads of onnxruntime; None takes its default. Torch's are set by ``torch.set_num_threads``.

    Attributes:
        description: Content of ``model.json``.
        classes: Ids of the classes, in the order of the columns of the probabilities.
        names: Names of the classes; their ids as text where they have none.

    Raises:
        ValueError: No staged export.
    """

    def __init__(self, folder: str | Path, *, threads: int | None = None) -> None:
        folder = Path(folder)
        file = folder / "model.json"
        if not file.is_file():
            raise ValueError(f"{folder}: found no model.json; give the folder of an export")
        self.description: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if not self.description.get("stages"):
            raise ValueError(f"{folder}: found an export without stages; export with --staged")
        self.stages: list[dict[str, Any]] = self.description["stages"]
        self.classes: list[int] = [entry["id"] for entry in self.description["classes"]]
        self.names = [str(entry["name"] or entry["id"]) for entry in self.description["classes"]]
        files = [folder / stage["file"] for stage in self.stages]
        onnx = self.description["format"] == "onnx"
        self._graphs: Any = _OnnxGraphs(files, threads) if onnx else _TorchGraphs(files)

    def __call__(
        self, inputs: Any, *, threshold: float | Sequence[float | None] | None = None
    ) -> Predictions:
        """Predict a batch of stored inputs.

        Args:
            inputs: Batch first, of the type and shape in ``description["input"]``.
            threshold: Confidence from which an exit stops a sample, one for all or one for each stage but the last,
                where None never stops one; None takes those of the export.

        Raises:
            ValueError: Inputs or thresholds that do not fit.
        """
        graphs, confident = self._graphs, self.description["rule"]["fallback"] == "confident"
        limits = self._limits(threshold)
        inputs = graphs.check(inputs, self.description["input"])
        count = inputs.shape[0]
        index, best, found = graphs.arange(count), None, None
        values: Mapping[str, Any] = {"inputs": inputs}
        for k, (stage, limit) in enumerate(zip(self.stages, limits, strict=True)):
            sent = graphs.run(k, [values[name] for name in stage["inputs"]], stage["outputs"])
            probabilities, confidence = sent["probabilities"], sent.get("confidence")
            found = graphs.empty(count, probabilities) if found is None else found
            last, everyone = k == len(self.stages) - 1, index >= 0
            fires = None if limit is None or confidence is None else confidence >= limit
            takes = everyone if last else fires
            if confident:
                takes = everyone if best is None else confidence > best
                takes = takes if fires is None else takes | fires
                best = confidence if best is None else graphs.maximum(best, confidence)
            if takes is not None:
                found[0][index[takes]], found[1][index[takes]] = probabilities[takes], stage["exit"]
            stops = everyone if last else fires
            if stops is not None:
                found[2][index[stops]] = stage["macs"]
                index = index[~stops]
                if not index.shape[0]:
                    break
                best = None if best is None else best[~stops]
                sent = {name: value[~stops] for name, value in sent.items()}
            values = sent
        assert found is not None
        return Predictions(found[0], graphs.take(self.classes, found[0].argmax(1)), found[1], found[2])

    def _limits(self, threshold: float | Sequence[float | None] | None) -> list[float | None]:
        """Threshold of each stage; None where its exit stops nothing."""
        early = len(self.stages) - 1
        if threshold is None:
            return [*(stage["threshold"] for stage in self.stages[:-1]), None]
        given = [threshold] * early if isinstance(threshold, (int, float)) else list(threshold)
        if len(given) != early or any(limit is not None and limit != limit for limit in given):
            raise ValueError(f"threshold: found {threshold}; give one number, or one for each of {early} early stages")
        return [*given, None]


class _OnnxGraphs:
    """Stages under onnxruntime, on numpy arrays."""

    def __init__(self, files: Sequence[Path], threads: int | None) -> None:
        import numpy
        import onnxruntime

        self.numpy = numpy
        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        # One after the other on the same cores: threads of one stage that keep spinning would slow the next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0" if len(files) > 1 else "1")
        make, providers = onnxruntime.InferenceSession, ["CPUExecutionProvider"]
        self.sessions = [make(str(file), options, providers=providers) for file in files]
        self.inputs = [[entry.name for entry in session.get_inputs()] for session in self.sessions]

    def check(self, inputs: Any, expected: Mapping[str, Any]) -> Any:
        found = self.numpy.ascontiguousarray(inputs)
        _check(found.shape, str(found.dtype), expected)
        return found

    def run(self, stage: int, values: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
        session = self.sessions[stage]
        found = session.run(None, dict(zip(self.inputs[stage], values, strict=True)))
        return dict(zip(names, found, strict=True))

    def arange(self, count: int) -> Any:
        return self.numpy.arange(count)

    def maximum(self, left: Any, right: Any) -> Any:
        return self.numpy.maximum(left, right)

    def take(self, values: Sequence[int], index: Any) -> Any:
        return self.numpy.asarray(values)[index]

    def empty(self, count: int, like: Any) -> tuple[Any, Any, Any]:
        make = self.numpy.zeros
        return make((count, like.shape[1]), like.dtype), make(count, "int64"), make(count, "int64")


class _TorchGraphs:
    """Stages as exported programs of torch, on tensors."""

    def __init__(self, files: Sequence[Path]) -> None:
        import torch

        self.torch = torch
        self.modules = [torch.export.load(str(file)).module() for file in files]

    def check(self, inputs: Any, expected: Mapping[str, Any]) -> Any:
        found = self.torch.as_tensor(inputs)
        _check(tuple(found.shape), str(found.dtype).removeprefix("torch."), expected)
        return found

    def run(self, stage: int, values: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
        with self.torch.no_grad():
            found = self.modules[stage](*values)
        return dict(zip(names, found, strict=True))

    def arange(self, count: int) -> Any:
        return self.torch.arange(count)

    def maximum(self, left: Any, right: Any) -> Any:
        return self.torch.maximum(left, right)

    def take(self, values: Sequence[int], index: Any) -> Any:
        return self.torch.tensor(list(values))[index]

    def empty(self, count: int, like: Any) -> tuple[Any, Any, Any]:
        integers = self.torch.zeros(2, count, dtype=self.torch.int64)
        return like.new_zeros(count, like.shape[1]), integers[0], integers[1]


def _check(shape: Sequence[int], dtype: str, expected: Mapping[str, Any]) -> None:
    wanted = tuple(expected["shape"])
    if tuple(shape[1:]) != wanted or not shape[0]:
        raise ValueError(f"inputs: found shape {tuple(shape)}; give a batch (N, {', '.join(map(str, wanted))})")
    if dtype != expected["dtype"]:
        raise ValueError(f"inputs: found {dtype}; give {expected['dtype']}, values as the data set stores them")


def _read(file: str) -> Any:
    import numpy

    reason = ""
    try:
        with open(file, "rb") as stream:  # numpy leaves damaged archives open
            found = numpy.load(stream, allow_pickle=False)
    except OSError as error:
        found, reason = None, f" ({error.strerror})" if error.strerror else ""
    except Exception:  # another format or a damaged file raises nearly anything
        found = None
    if not isinstance(found, numpy.ndarray):
        raise ValueError(f"{file}: not an .npy array of inputs{reason}; save one with numpy.save")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict the inputs in a .npy file and print one line for each."""
    parser = argparse.ArgumentParser(description="Predict with a staged export of clframe.")
    parser.add_argument("inputs", help="a .npy file: a batch as the data set stores it")
    parser.add_argument("--folder", default=str(Path(__file__).parent), help="the export (default: this file's folder)")
    parser.add_argument("--threshold", type=float, help="confidence from which an exit stops a sample")
    options = parser.parse_args(arguments)
    try:
        model = StagedModel(options.folder)
        found = model(_read(options.inputs), threshold=options.threshold)
    except (OSError, ValueError, ImportError) as error:
        print(f"run_staged: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    names = dict(zip(model.classes, model.names, strict=True))
    exits = {stage["exit"]: stage["name"] for stage in model.stages}
    print("class\tname\tprobability\texit\tMACs")
    for probability, label, exit, macs in zip(*found, strict=True):
        # This file is copied into exports and imports nothing of clframe. Other characters may control a terminal.
        text = "".join(c if c.isprintable() else "?" for c in " ".join(names[int(label)].split()))
        print(f"{int(label)}\t{text}\t{float(probability.max()):.4f}\t{exits[int(exit)]}\t{int(macs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
