"""Batches of the data that a trained model is evaluated on, with targets in its learning order.

Shape suffixes: B batch, C classes, N samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clframe.data.samples import TensorSamples
from clframe.data.sources.labeled import LabeledData
from clframe.data.target import Target
from clframe.errors import DataError, RunFolderError, nearest
from clframe.results import Result
from clframe.targets.loading import run_config
from clframe.targets.reading import InputReader
from clframe.targets.stored_inputs import as_stored, convert_images
from clframe.training.trained import TrainedModel

Batches = Iterator[tuple[Tensor, Tensor, int]]
"""Prepared inputs, targets in learning order, and the test experience (-1 for other data)."""


def match_classes(model: TrainedModel, names: Sequence[str], *, where: str) -> list[int]:
    """Rank in learning order of each class of other data.

    Args:
        model: The model.
        names: Names of the classes of the data.
        where: The data, for messages.

    Raises:
        DataError: A class that the model does not have, or has not learned yet.
    """
    known = model.class_names or tuple(str(c) for c in range(max(model.class_order) + 1))
    number, rank = {name: c for c, name in enumerate(known)}, {c: r for r, c in enumerate(model.class_order)}
    found = []
    for name in names:
        if name not in number or number[name] not in rank:
            raise DataError(f"{where}: the model has no class '{name}'; {_advice(name, known)}")
        if rank[number[name]] not in model.learner.past:
            raise DataError(f"{where}: class '{name}' has not been learned yet; finish the run, or remove the class")
        found.append(rank[number[name]])
    return found


def _advice(name: str, known: Sequence[str]) -> str:
    other_case = next((each for each in known if each.casefold() == name.casefold()), None)
    if other_case is not None:
        return f"rename it to '{other_case}', names are compared with their case"
    close = nearest(name, known)
    shown = ", ".join(known[:10]) + (f", ... {len(known)} in all" if len(known) > 10 else "")
    return (f"did you mean '{close}'?" if close else "rename or remove it") + f" (known: {shown})"


def trained_on(run: str | Path, path: Any) -> str:
    """Return a warning for data that the run was trained on, before or after it was extended; empty for others."""
    config = run_config(run)
    learned = [block.options.get("path") for block in (config.benchmark, *(each.benchmark for each in config.earlier))]
    if not isinstance(path, str):
        return ""
    given = Path(path).expanduser().resolve()
    same = any(isinstance(own, str) and Path(own).expanduser().resolve() == given for own in learned)
    return "this is the run's own data: without a test part, accuracy includes training samples" if same else ""


def check_unchanged(target: Target, model: TrainedModel) -> None:
    """Refuse test data of another size than the run was evaluated on, in the experiences that the model has learned."""
    file = target.folder / "results.json"
    if not file.is_file() or target.config.benchmark.evaluate != "test":
        return
    # The results are of more experiences than the model has learned where the last checkpoint is damaged.
    result, rank = Result.from_json(file), {c: r for r, c in enumerate(model.class_order)}
    learned = ({rank.get(c) for c in classes} <= set(model.learner.past) for classes in result.experiences)
    expected, found = sum(compress(result.test_samples, learned)), sum(map(len, target.experiences))
    if expected != found:
        raise RunFolderError(
            f"{target.name}: its data has {found:,} test samples, the run was evaluated on {expected:,}; restore the "
            f"data, or add benchmark=NAME to evaluate on other data"
        )


def own_batches(target: Target, size: int) -> Batches:
    """Batches of a run's own test data, experience by experience."""
    for experience, split in enumerate(target.experiences):
        for batch in split.batches(size=size):
            assert isinstance(batch.inputs, Tensor) and batch.targets is not None  # those of a run
            yield batch.inputs, batch.targets, experience


def file_batches(model: TrainedModel, reader: InputReader, y_N: Tensor, size: int) -> Batches:
    """Batches of image files; those that cannot be read are left out."""
    with warnings.catch_warnings():
        # Pillow warns about large images before they are refused: raise instead of warning twice.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for index, stored in reader.batches(size):
            yield model.prepare(stored), y_N[torch.tensor(index)], -1


def stored_batches(model: TrainedModel, data: LabeledData, y_N: Tensor, size: int) -> Batches:
    """Batches of stored inputs; images are converted to the model's size and channels.

    Raises:
        DataError: Inputs of another shape that are not images, or fractions for a model trained on bytes.
    """
    samples, shape, form = data.samples, model.network.input_shape, model.inputs
    assert samples is not None
    if data.is_array:
        assert isinstance(samples, TensorSamples)
        x = as_stored(model, samples.x, where=data.title)
        for index in torch.arange(len(y_N)).split(size):
            yield model.prepare(x[index]), y_N[index], -1
        return
    images = form is not None and form.kind == "image" and data.inputs.kind == "image"
    found = tuple(samples.input_shape)
    tokens = not model.std and len(found) == len(shape)
    if not images and found != tuple(shape) and not tokens:
        raise DataError(
            f"{data.title}: has inputs of shape {list(found)}, the model was trained on {list(shape)}; give data of "
            f"the same shape, or images for a model of images"
        )
    first = samples.raw(torch.arange(1))
    if form is not None and form.kind == "image" and not images and first.is_floating_point():
        raise DataError(f"{data.title}: has fractions, the model was trained on bytes; give images of bytes")
    for index in torch.arange(len(y_N)).split(size):
        raw = samples.raw(index)
        if images:
            assert form is not None
            raw = convert_images(raw, shape=shape, source=data.inputs, target=form)
        yield model.prepare(raw), y_N[index], -1
