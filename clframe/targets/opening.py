"""What a study is about: a trained model with the data that it is measured on.

A target is a run of ours, or a model of the Hugging Face hub or of timm, by its name or in a folder. All have the same
face, so that whatever is measured or converted here is written once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path

import torch
from torch import Tensor, nn

from clframe.build import build_data, load, run_config
from clframe.config.load import data_config
from clframe.config.schema import Config
from clframe.data.benchmark import Benchmark
from clframe.data.source import Data
from clframe.data.target import Parts, SamplePart, Target
from clframe.errors import ConfigError, RunFolderError, UnsupportedError
from clframe.nn.backbones.from_transformers import TextEmbed
from clframe.nn.types import Inputs
from clframe.results import Result


def open_target(
    name: str,
    *,
    data: str | None = None,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    max_length: int = 64,
    per_class: int = 20,
    generate: int = 0,
) -> Target:
    """The target that a name means.

    Args:
        name: A run folder; or the folder or hub name of a model of transformers (text encoders, causal language
            models) or timm. Weights are read from safetensors only, and no code that comes with a model is run.
        data: What a model that is no run is measured on: a benchmark config such as ``clinc150``, or for a language
            model a text file too, one text a line.
        overrides: Changes of the benchmark block, such as ``benchmark.data_dir=DIR``.
        device: Where to put the model.
        max_length: Most tokens of a text.
        per_class: Training samples of each class whose mean embedding stands for it, where a model has no classifier.
        generate: Tokens that a language model writes on after each text, greedily.

    Raises:
        RunFolderError: No such folder, or a run that does not fit its data.
        ConfigError: No data for a model that is no run, or data for one that is.
        DataError: A model or data that cannot be loaded.
        UnsupportedError: A model of another kind, or a package that is not installed.
    """
    if not name.strip():
        raise ConfigError("target: found nothing; give a run folder, or a model's folder or name on the hub")
    folder = Path(name).expanduser()
    if (folder / "config.yaml").is_file():
        if data is not None:
            raise ConfigError(f"--data: found {data} for a run, which is measured on its own data; leave it out")
        return _run_target(name, folder, overrides, device=usable_device(device))
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise RunFolderError(f"{name}: holds neither a run's config.yaml nor a model's config.json; give such a folder")
    beside = folder.parent != Path() and folder.parent.is_dir()  # a slip in a path, not a model on a hub
    if not folder.is_dir() and (beside or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)):
        raise RunFolderError(f"{name}: no such folder, and no name of a model on a hub; give one of them")
    if data is None:
        raise ConfigError(f"--data: found none for {name}; name what to measure it on, such as --data clinc150")
    from clframe.targets.images import images_target, is_timm
    from clframe.targets.texts import text_target

    place = usable_device(device)
    if is_timm(name):
        return images_target(name, config=data_config(data, overrides), device=place, per_class=per_class)
    return text_target(
        name, data, overrides, device=place, max_length=max_length, per_class=per_class, generate=generate
    )


def usable_device(name: str) -> torch.device:
    """The device that a name means: cpu, cuda, cuda:N, mps, or auto for the best there is.

    Raises:
        UnsupportedError: There is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device("cuda" if name == "gpu" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UnsupportedError(f"--device: found {name}, but {reason}; give cpu, cuda, cuda:N or mps") from None
    if device.type == "meta":
        raise UnsupportedError("--device: found meta, which holds no numbers; give cpu, cuda, cuda:N or mps")
    return device


def _run_target(name: str, folder: Path, overrides: Sequence[str], *, device: torch.device) -> Target:
    trained = load(folder, device=str(device))
    config = _changed(run_config(folder), overrides)
    benchmark = build_data(config.benchmark, seed=config.seed)[1]
    if benchmark.class_order != trained.class_order or benchmark.input_shape != trained.network.input_shape:
        raise RunFolderError(
            f"{folder}: was trained on other data than its config gives now; restore the data, or undo the overrides"
        )
    network, learner = trained.network, trained.learner
    tokens = _real_tokens if isinstance(network.backbone.stages[0], TextEmbed) else None

    def answer(model: nn.Module, inputs: Inputs) -> Tensor:
        return learner.adjust_logits(model(inputs, taps=learner.taps)).last

    # Of a run that is not finished, what it has learnt: nothing else can be answered.
    learnt = [set(classes) <= set(learner.past) for classes in benchmark.classes]

    def part(samples: Sequence[Data]) -> SamplePart:
        return SamplePart(list(compress(samples, learnt)), place=network.place, tokens=tokens)

    return Target(
        name=name, kind="run", model=network, accuracy_matrix=_accuracy_matrix(folder),
        body_name="backbone", answer=answer, run=trained, config=config,
        parts=Parts(
            part(_training(benchmark)), part(benchmark.validation) if benchmark.validation else None,
            part(benchmark.test),
        ),
        experiences=tuple(
            SamplePart([samples], place=network.place, tokens=tokens) for samples in compress(benchmark.test, learnt)
        ),
    )  # fmt: skip


def _accuracy_matrix(folder: Path) -> tuple[tuple[float, ...], ...] | None:
    """The accuracy matrix of a finished run."""
    file = folder / "results.json"
    return Result.from_json(file).accuracy_matrix if file.is_file() else None


def _training(benchmark: Benchmark) -> tuple[Data, ...]:
    """Training data as they are, not augmented; of an online stream the experiences that it is cut from."""
    return tuple(replace(samples, augment=()) for samples in benchmark.original or benchmark.train)


def _changed(config: Config, overrides: Sequence[str]) -> Config:
    """The config with other places of its data: what was learnt cannot change any more."""
    options = dict(config.benchmark.options)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or key not in ("benchmark.data_dir", "benchmark.path", "benchmark.tokens"):
            raise ConfigError(f"override '{text}': a run keeps its config; only benchmark.data_dir=DIR may differ")
        options[key.removeprefix("benchmark.")] = value
    return replace(config, benchmark=replace(config.benchmark, options=options))


def _real_tokens(ids_BT: Tensor) -> Tensor:
    """mask_BT of ids that are no padding; the first always counts, as in the backbone."""
    mask_BT = ids_BT != 0
    mask_BT[:, 0] = True
    return mask_BT
