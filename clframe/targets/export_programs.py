"""Graphs of a trained model: traced by ``torch.export``, converted to ONNX, and compared with the model.

torch.onnx and onnxruntime are imported where they are used; they are the extra ``export``.
"""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from clframe.errors import UnsupportedError, reason_of

TOLERANCE = 1e-4
"""Largest difference between a graph and the model at which the graph is written."""

OPSET = 18
"""Default operator set of ONNX graphs: the one that torch converts to without a further conversion."""

OPSETS = range(18, 24)
"""Operator sets that can be asked for."""


def require_onnx() -> None:
    """Check that the packages of ONNX exports are installed.

    Raises:
        UnsupportedError: One is missing.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UnsupportedError(
                f"export: --format onnx found no usable package {package}; pip install 'clframe[export]'"
            ) from error


_MOST_SAMPLES: Final = 2**31 - 1
"""Bound of the dynamic batch: without one, some traces of torch 2.6 demand that it differs from the largest integer."""


def trace(module: nn.Module, example: Sequence[Tensor], *, what: str) -> torch.export.ExportedProgram:
    """Trace a module with a dynamic batch.

    Args:
        module: Takes tensors with the batch first; in evaluation mode.
        example: Its arguments, with more than one sample.
        what: Subject of messages.

    Raises:
        UnsupportedError: A module that cannot be traced.
    """
    batch = torch.export.Dim("batch", max=_MOST_SAMPLES)
    shapes: Any = tuple({0: batch} for _ in example)
    if _is_variadic(module):
        shapes = (shapes,)
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(module, tuple(example), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # tracing runs the strategy's own code, which may raise anything
        raise UnsupportedError(
            f"export: {what} cannot be traced to a graph with a dynamic batch ({_reason(error)}); "
            f"use --format safetensors"
        ) from error


def write_pt2(program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write a program with the metadata as its extra file ``model.json``."""
    with _quiet():
        torch.export.save(program, str(path), extra_files={"model.json": json.dumps(metadata)})


def write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    metadata: Mapping[str, Any],
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int,
) -> None:
    """Convert a program to ONNX and write it with the metadata, one entry of JSON for each key.

    Raises:
        UnsupportedError: An operator that ONNX lacks, or an operator set that the graph cannot be converted to.
    """
    try:
        with torch.no_grad(), _quiet():
            converted = torch.onnx.export(
                program, (), dynamo=True, input_names=list(inputs), output_names=list(outputs), opset_version=opset,
                verbose=False,
            )  # fmt: skip
        assert converted is not None
        model = converted.model
    except Exception as error:
        raise UnsupportedError(
            f"export: the graph cannot be converted to ONNX operator set {opset} ({_reason(error)}); use --format pt2"
        ) from error
    found = model.opset_imports.get("", 0)
    if found != opset:
        raise UnsupportedError(
            f"export: --opset {opset} is not available for this model, torch produced {found}; use --opset {found}"
        )
    for key, value in metadata.items():
        model.metadata_props[key] = json.dumps(value)
    _remove_traces(model)
    converted.save(str(path))


def pt2_outputs(path: Path, batches: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Run a written program on the arguments of each batch."""
    with torch.no_grad(), _quiet():
        module = torch.export.load(str(path)).module()
        return [list(module(*arguments)) for arguments in batches]


def onnx_outputs(path: Path, batches: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Run a written ONNX graph under onnxruntime, on one thread, on the arguments of each batch.

    Raises:
        UnsupportedError: onnxruntime cannot run the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
        feeds = [dict(zip(names, (value.numpy() for value in batch), strict=True)) for batch in batches]
        return [[torch.from_numpy(value) for value in session.run(None, feed)] for feed in feeds]
    except Exception as error:
        raise UnsupportedError(
            f"export: onnxruntime cannot run the graph ({_reason(error)}); use another --opset, or --format pt2"
        ) from error


def largest_difference(expected: Sequence[Tensor], found: Sequence[Tensor], *, what: str) -> float:
    """Largest absolute difference of floating-point outputs.

    Raises:
        UnsupportedError: More than :data:`TOLERANCE`, or outputs of other shapes.
    """
    largest = 0.0
    for left, right in zip(expected, found, strict=True):
        if left.shape != right.shape:
            raise UnsupportedError(
                f"export: {what} gives {tuple(right.shape)} where the model gives {tuple(left.shape)}; "
                f"use --format safetensors"
            )
        if left.is_floating_point() and left.numel():
            # Values passed from stage to stage may be large: relative to their size, never less than 1.
            scale = left.double().abs().nan_to_num(0, 0, 0).amax().clamp_min(1)
            difference = (left.double() - right.double()).masked_fill(left == right, 0.0).abs().amax() / scale
            largest = max(largest, float(difference.nan_to_num(torch.inf)))
    if largest > TOLERANCE:
        raise UnsupportedError(
            f"export: {what} differs from the model by {largest:.2g}, more than {TOLERANCE:g}; use --format safetensors"
        )
    return largest


def _remove_traces(model: Any) -> None:
    """Remove the stack traces that torch attaches to nodes: they hold paths of this machine."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph:
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
        graph.metadata_props.clear()


def _is_variadic(module: nn.Module) -> bool:
    import inspect

    parameters = inspect.signature(module.forward).parameters.values()
    return any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)


def _reason(error: Exception) -> str:
    text = reason_of(error)
    return text if len(text) <= 160 else f"{text[:160]}..."


@contextmanager
def _quiet() -> Iterator[None]:
    """Context without the warnings and log lines of torch's exporters, which concern their own internals."""
    names = ("torch.onnx", "torch.export", "torch._export", "torch.__trace", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
