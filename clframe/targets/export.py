"""Export of trained models: ONNX and ``torch.export`` graphs, whole or in stages, and safetensors.

A graph takes inputs as the data set stores them, such as bytes, and returns probabilities: normalization, corrections
of the strategy (bias correction, nearest class means), ensembles and calibration are part of it. Every graph is
compared with the model before the export is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from clframe.accounting import cumulative_macs
from clframe.config.schema import BenchmarkConfig, Config
from clframe.config.typed import to_yaml
from clframe.environment import versions
from clframe.errors import ConfigError, UnknownNameError, UnsupportedError, unknown_name
from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.policies import probability_threshold
from clframe.files import to_path, write_atomically
from clframe.options import convert_argument
from clframe.stream import LOCATIONS
from clframe.targets import runner
from clframe.targets.export_folder import new_folder
from clframe.targets.export_graphs import (
    DTYPES,
    INPUTS,
    WholeModel,
    divide,
    has_experts,
    stored_dtype,
    traceable,
)
from clframe.targets.export_programs import (
    OPSET,
    OPSETS,
    largest_difference,
    onnx_outputs,
    pt2_outputs,
    require_onnx,
    trace,
    write_onnx,
    write_pt2,
)
from clframe.targets.export_transformers import write_llama
from clframe.targets.loading import RunModel, load_model, load_run, refuse_language_model
from clframe.targets.portable import write_portable
from clframe.training.trained import CONVERTED, TrainedModel, read_recipe

Format = Literal["onnx", "pt2", "safetensors", "transformers"]
FORMATS: tuple[str, ...] = get_args(Format)
DESCRIPTION = "model.json"
RUNNER = "run_staged.py"

CHECKED = (1, 5)
"""Batch sizes at which a graph is compared with the model."""


def export(
    model: TrainedModel,
    folder: str | Path,
    *,
    format: Format = "onnx",
    staged: bool = False,
    threshold: float | None = None,
    opset: int | None = None,
    dtype: str | None = None,
) -> Path:
    """Export a trained model to a new folder.

    Args:
        model: As returned by ``clframe.load``, on the CPU.
        folder: The folder to create.
        format: ``onnx``, ``pt2`` (``torch.export``) or ``safetensors`` (weights that ``clframe.load`` reads); of a
            language model ``transformers``, a folder with a Llama and its tokenizer.
        staged: Whether to write one graph for each exit, with a runner that stops early.
        threshold: Confidence from which an exit stops a sample, for ``staged``; None takes the policy of
            ``early_exit``.
        opset: Operator set of ONNX; None is 18.
        dtype: Type of the inputs; None takes the data set's, see
            :func:`~clframe.targets.export_graphs.stored_dtype`.

    Returns:
        The folder.

    Raises:
        UnknownNameError: An unknown format or type.
        ConfigError: Options that do not fit the format.
        UnsupportedError: A model that cannot be exported so, with the reason; or a missing package.
        RunFolderError: The folder has content, or cannot be written.
    """
    _check_options(format, staged=staged, threshold=threshold, opset=opset, dtype=dtype)
    folder = to_path(folder, where="export").expanduser()
    if format == "transformers":
        return _export_text(model, folder)
    refuse_language_model(model.network, where="export", advice="--format transformers writes it")
    config: Config | None = getattr(model, "config", None)
    if next(model.network.parameters()).device.type != "cpu":
        raise UnsupportedError("export: found a model on an accelerator; load it with device='cpu'")
    with new_folder(folder, where="export") as fresh:
        if format == "safetensors":
            if config is None:
                raise ConfigError("export: found no config for safetensors; give the model of clframe.load")
            description = {**describe(model, config=config, dtype=stored_dtype(model)), "format": format}
            write_weights(model, config, fresh)
        else:
            if format == "onnx":
                require_onnx()
            write = partial(_write_graph, format=format, opset=opset or OPSET)
            with traceable(model.network):
                description = describe(model, config=config, dtype=dtype or stored_dtype(model))
                description["format"] = format
                if staged:
                    _write_stages(model, fresh, description, write, threshold=threshold)
                else:
                    _write_whole(model, fresh, description, write)
        write_atomically(fresh / DESCRIPTION, json.dumps(description, indent=1) + "\n")
    return folder


def _export_text(model: TrainedModel, folder: Path) -> Path:
    """Export a language model as a folder of transformers."""
    if not model.network.vocabulary:
        raise UnsupportedError("export: found --format transformers for a classifier; use onnx, pt2 or safetensors")
    source = getattr(model, "folder", None)
    file = None if source is None else Path(source) / "tokenizer.json"
    text = file.read_text(encoding="utf-8") if file is not None and file.is_file() else ""
    with new_folder(folder, where="export") as fresh:
        write_llama(model.network, fresh, tokenizer=text)
    return folder


def export_run(
    run: str | Path,
    *,
    output: str | Path | None = None,
    format: Format = "onnx",
    staged: bool = False,
    threshold: float | None = None,
    opset: int | None = None,
    dtype: str | None = None,
) -> Path:
    """Export the model of a run; the verb ``clframe export``.

    Args:
        run: A run folder, or the folder of a converted model.
        output: The folder to create; None is ``RUN/export/FORMAT``, or ``RUN/export/FORMAT-staged``.
        format: See :func:`export`, as for the other options.
        staged: One graph for each exit.
        threshold: For ``staged``.
        opset: Of ONNX.
        dtype: Of the inputs.

    Raises:
        RunFolderError: No run, a run without checkpoint, or a folder that has content.
        ClframeError: See :func:`export`.
    """
    _check_options(format, staged=staged, threshold=threshold, opset=opset, dtype=dtype)
    if format == "onnx":
        require_onnx()
    trained = load_run(run, kind=RunModel, where="export")
    name = f"{format}-staged" if staged else format
    folder = Path(output) if output is not None else Path(run) / "export" / name
    return export(trained, folder, format=format, staged=staged, threshold=threshold, opset=opset, dtype=dtype)


def write_weights(model: TrainedModel, config: Config, folder: Path) -> None:
    """Write ``model.safetensors`` and ``config.yaml``, and check that ``clframe.load`` reads the same model.

    Args:
        model: The model.
        config: Its config. Locations of data and of earlier runs are reduced to the last part of their path.
        folder: An existing folder.

    Raises:
        UnsupportedError: A model that does not predict the same without the strategy's samples and teachers.
    """
    source = getattr(model, "folder", None)
    converted = source is not None and (Path(source) / CONVERTED).is_file()
    write_portable(model, config, folder, recipe=read_recipe(Path(source)) if source and converted else None)
    write_atomically(folder / "config.yaml", to_yaml(without_locations(config)))
    x = example_inputs(model, 3, dtype=stored_dtype(model))
    expected, found = (each.learner.predict(each.outputs(x)) for each in (model, load_model(folder)))
    largest_difference([expected], [found], what="the model read from safetensors")


def without_locations(config: Config) -> Config:
    """The config without folders of this machine, which a model that is passed on must not name."""
    earlier = tuple(
        replace(entry, run=Path(entry.run).name, benchmark=_shorten_locations(entry.benchmark))
        for entry in config.earlier
    )
    return replace(config, output="runs", benchmark=_shorten_locations(config.benchmark), earlier=earlier)


def _shorten_locations(benchmark: BenchmarkConfig) -> BenchmarkConfig:
    options = dict(benchmark.options)
    for key in LOCATIONS:
        if isinstance(options.get(key), str) and options[key]:
            options[key] = Path(options[key]).name
    return replace(benchmark, options=options)


def describe(model: TrainedModel, *, config: Config | None, dtype: str) -> dict[str, Any]:
    """Describe an exported model as plain values: inputs, classes, exits and their cost, strategy."""
    network = model.network
    names = model.class_names
    classes = [
        {"id": int(c), "name": names[c] if c < len(names) else None} for c in model.class_order[: network.classes]
    ]
    costs = cumulative_macs(network)
    return {
        "clframe": versions()["clframe"],
        "format": None,
        "strategy": str(model.learner.composition),
        "backbone": None if config is None else config.backbone.name,
        "benchmark": None if config is None else config.benchmark.name,
        "input": {
            "name": INPUTS, "dtype": dtype, "shape": list(network.input_shape),
            "mean": list(model.mean), "std": list(model.std), "normalized_inside": True,
        },
        "classes": classes,
        "exits": [{"name": name, "macs": macs} for name, macs in zip(network.exit_names, costs, strict=True)],
        "experts": "all computed, unselected ones masked" if has_experts(network) else None,
    }  # fmt: skip


def example_inputs(model: TrainedModel, count: int, *, dtype: str, seed: int = 0) -> Tensor:
    """Random stored inputs of a model.

    Args:
        model: The model.
        count: Number of samples.
        dtype: Name of their type.
        seed: Seed of the generator.
    """
    shape = (count, *model.network.input_shape)
    generator = torch.Generator().manual_seed(seed)
    if not model.std:
        # The first embedding is that of the tokens; others are of positions and segments.
        embeddings = (part for part in model.network.modules() if isinstance(part, nn.Embedding))
        largest = next((part.num_embeddings for part in embeddings), 2)
        return torch.randint(0, largest, shape, generator=generator).to(DTYPES[dtype])
    channels = (-1,) + (1,) * (len(shape) - 2) if len(model.mean) > 1 else ()
    mean, std = (torch.tensor(values).reshape(channels) for values in (model.mean, model.std))
    drawn = torch.randn(shape, generator=generator) * std + mean
    largest = 255 if model.inputs is None else model.inputs.largest
    return drawn if dtype == "float32" else drawn.clamp(0, largest).to(DTYPES[dtype])


Write = Callable[..., float]


def _write_whole(model: TrainedModel, folder: Path, description: dict[str, Any], write: Write) -> None:
    dtype = description["input"]["dtype"]
    batches = [(example_inputs(model, size, dtype=dtype, seed=size),) for size in CHECKED]
    module = WholeModel(model).eval()
    description["outputs"] = {
        "exit_probabilities": "[N, exits, classes]: of each exit, corrected, combined and calibrated",
        "probabilities": "[N, classes]: of the strategy's prediction",
        "classes": "[N]: id of the predicted class",
    }
    description["rule"] = _rule(model)
    name = f"model.{description['format']}"
    difference = write(
        module, batches, folder / name, description, inputs=(INPUTS,), outputs=module.outputs, what="the model"
    )
    description["file"], description["largest_difference"] = name, difference


def _write_stages(
    model: TrainedModel, folder: Path, description: dict[str, Any], write: Write, *, threshold: float | None
) -> None:
    dynamic = _dynamic(model, threshold)
    dtype, form = description["input"]["dtype"], description["format"]
    parts = divide(model, dynamic, example_inputs(model, 2, dtype=dtype))
    description["rule"] = _describe_policy(dynamic)
    names = model.network.exit_names
    description["stages"] = [
        {
            "file": f"stage_{k}.{form}", "exit": spec.exit, "name": names[spec.exit], "macs": spec.macs,
            "threshold": spec.threshold, "inputs": list(spec.inputs), "outputs": list(spec.outputs),
        }
        for k, (_, spec) in enumerate(parts)
    ]  # fmt: skip
    costs = {spec.exit: spec.macs for _, spec in parts}
    for exit, entry in enumerate(description["exits"]):
        entry["macs"] = costs.get(exit)
    flows: list[Mapping[str, Tensor]] = [
        {INPUTS: example_inputs(model, size, dtype=dtype, seed=size)} for size in CHECKED
    ]
    differences = []
    for k, (stage, spec) in enumerate(parts):
        batches = [[flow[name] for name in spec.inputs] for flow in flows]
        inputs = [f"{name}_in" if name in spec.outputs else name for name in spec.inputs]
        differences.append(write(
            stage, batches, folder / f"stage_{k}.{form}", description, inputs=inputs, outputs=spec.outputs,
            what=f"stage {k}",
        ))  # fmt: skip
        with torch.no_grad():
            flows = [dict(zip(spec.outputs, stage(*batch), strict=True)) for batch in batches]
    description["largest_difference"] = max(differences)
    write_atomically(folder / RUNNER, Path(runner.__file__).read_bytes())


def _write_graph(
    module: nn.Module,
    batches: Sequence[Sequence[Tensor]],
    path: Path,
    description: Mapping[str, Any],
    *,
    format: Format,
    opset: int,
    inputs: Sequence[str],
    outputs: Sequence[str],
    what: str,
) -> float:
    """Trace, write and check one graph; returns its largest difference from the module."""
    program = trace(module, batches[-1], what=what)
    if format == "onnx":
        write_onnx(program, path, description, inputs=inputs, outputs=outputs, opset=opset)
    else:
        write_pt2(program, path, description)
    run = onnx_outputs if format == "onnx" else pt2_outputs
    differences = []
    for batch, found in zip(batches, run(path, batches), strict=True):
        with torch.no_grad():
            differences.append(largest_difference(module(*batch), found, what=f"{what} as {format}"))
    return max(differences)


def _dynamic(model: TrainedModel, threshold: float | None) -> DynamicNetwork:
    if len(model.network.heads) == 1:
        raise UnsupportedError(
            "export: --staged needs exits to stop at and found one exit; train with exits, or leave --staged out"
        )
    try:
        return model.dynamic(threshold=threshold)
    except UnsupportedError as error:
        reason = str(error).removeprefix("dynamic: ")
        raise UnsupportedError(f"export: --staged cannot stop early here: {reason}") from None


def _rule(model: TrainedModel) -> dict[str, Any] | None:
    """The exit policy in a whole graph; None where another rule, or the last exit, predicts."""
    owner = model.learner.composition.owner("prediction")
    if owner is None or getattr(owner, "rule", "first") != "first" or model.learner.simulated_exits:
        return None
    try:
        return _describe_policy(model.dynamic())
    except UnsupportedError:
        return None


def _describe_policy(dynamic: DynamicNetwork) -> dict[str, Any]:
    policy = dynamic.policy
    thresholds = policy.of_exits(len(dynamic.network.heads))
    measure = getattr(policy.measure, "__name__", type(policy.measure).__name__)
    return {
        "measure": measure,
        "thresholds": [max(threshold, 0.0) if threshold <= 1 else None for threshold in thresholds],
        "fallback": policy.fallback,
    }


def _check_options(
    format: str, *, staged: bool, threshold: float | None, opset: int | None, dtype: str | None
) -> None:
    if format not in FORMATS:
        raise UnknownNameError(unknown_name("format", format, FORMATS, where="export: --format"))
    if dtype is not None and dtype not in DTYPES:
        raise UnknownNameError(unknown_name("type", dtype, DTYPES, where="export: --input"))
    if threshold is not None and not staged:
        raise ConfigError("export: --threshold has an effect with --staged only; add --staged")
    convert_argument(staged, bool, where="export: --staged")
    if threshold is not None and probability_threshold(threshold, where="export: --threshold") > 1:
        raise ConfigError("export: --threshold: found inf; give a probability from 0 to 1")
    if opset is not None and format != "onnx":
        raise ConfigError(f"export: --opset found for --format {format}; leave it out, or use --format onnx")
    if convert_argument(opset, int | None, where="export: --opset") is not None and opset not in OPSETS:
        raise ConfigError(f"export: --opset found {opset}; give {OPSETS[0]} to {OPSETS[-1]}")
    if format in ("safetensors", "transformers") and (staged or dtype is not None):
        option = "--staged" if staged else "--input"
        raise ConfigError(f"export: {option} found for --format {format}, which has no graph; leave it out")
