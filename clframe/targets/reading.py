"""Inputs of a trained model found in files, folders, arrays and texts, and read in batches.

:mod:`clframe.targets.stored_inputs` converts each to what training read.
"""

from __future__ import annotations

import csv
import glob
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clframe.data.numeric import numeric_tensor
from clframe.data.sources.image_files import IMAGE_ENDINGS
from clframe.data.sources.paths import images_below, read_text, shorten_path, suggest_path
from clframe.errors import DataError
from clframe.options import format_value
from clframe.targets.stored_inputs import as_stored, read_array, read_stored_image, require_images, texts_as_inputs
from clframe.training.trained import TrainedModel

_THREADS = 8


@dataclass(eq=False)
class InputReader:
    """Inputs of a model, read in batches; what cannot be read is skipped and named.

    Attributes:
        names: File, or file and row, of each input.
        shape: Shape of the model's input.
        skipped: Reason for each input that could not be read, by name; complete after the last batch.
        note: Number of images that had another size than the model's input, where training resized none; complete
            after the last batch.
    """

    names: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    _resized: int = 0
    _readers: list[Callable[[], tuple[Tensor, bool]]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def note(self) -> str:
        """See the class."""
        if not self._resized:
            return ""
        height, width = self.shape[1:]
        return f"{self._resized} images of another size were resized and center-cropped to {width}x{height}"

    def add(self, name: str, read: Callable[[], tuple[Tensor, bool]]) -> None:
        """Append an input: a function that returns it, as stored, and whether it had to be resized."""
        self.names.append(name)
        self._readers.append(read)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Skip an input that the block cannot find or read: its error is the reason."""
        try:
            yield
        except DataError as error:
            self.skipped[name] = str(error)

    def batches(self, size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Iterate over indices and stored inputs of up to ``size`` samples; several files are read at a time."""
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
            for start in range(0, len(self), size):
                part = range(start, min(start + size, len(self)))
                found = list(threads.map(_attempt, (self._readers[at] for at in part)))
                kept = [at for at, result in zip(part, found, strict=True) if not isinstance(result, DataError)]
                for at, result in zip(part, found, strict=True):
                    if isinstance(result, DataError):
                        self.skipped[self.names[at]] = str(result)
                    else:
                        self._resized += result[1]
                if kept:
                    yield kept, torch.stack([result[0] for result in found if not isinstance(result, DataError)])


def open_inputs(model: TrainedModel, inputs: Any) -> InputReader:
    """Find the inputs of a model.

    Args:
        model: The model.
        inputs: Paths (files, folders, patterns such as ``photos/**/*.jpg``), for text models also texts; or one tensor
            or array, a batch or a single sample.

    Raises:
        DataError: No input could be found, a run folder among them, inputs of another type, or arrays of another kind
            than the model was trained on. Of several inputs, those that can be read are returned, and the others are
            :attr:`InputReader.skipped`.
    """
    reader = InputReader(shape=model.network.input_shape)
    if isinstance(inputs, (Tensor, np.ndarray)):
        _add_arrays(reader, model, numeric_tensor(inputs, where="predict"), name="")
        return reader
    single = isinstance(inputs, (str, os.PathLike)) or not isinstance(inputs, Iterable)
    given = [inputs] if single else list(inputs)
    if not given:
        raise DataError("predict: found no inputs; give files, folders or arrays")
    arrays = [numeric_tensor(one, where="predict") for one in given if isinstance(one, (Tensor, np.ndarray))]
    if arrays and len(arrays) == len(given):
        if len({array.shape for array in arrays}) > 1:
            raise DataError("predict: found arrays of several shapes; give those of one shape together")
        _add_arrays(reader, model, torch.stack(arrays), name="")
        return reader
    for one in given:
        if not isinstance(one, (str, os.PathLike)):
            found = "arrays among other inputs" if arrays else format_value(one)
            raise DataError(f"predict: found {found}; give paths of files and folders, texts, or one array")
    kind = None if model.inputs is None else model.inputs.kind
    add = _add_texts if kind in ("words", "tokens") else _add_files
    add(reader, model, [os.fspath(one) for one in given])
    if not len(reader):
        raise DataError(next(iter(reader.skipped.values()), "predict: found no inputs; give files, folders or texts"))
    return reader


def image_reader(model: TrainedModel, paths: Sequence[str]) -> InputReader:
    """Reader of image files.

    Raises:
        DataError: The model was not trained on images.
    """
    reader = InputReader(shape=model.network.input_shape)
    for path in paths:
        require_images(model, path)
        reader.add(path, partial(read_stored_image, path, model))
    return reader


def _attempt(read: Callable[[], tuple[Tensor, bool]]) -> tuple[Tensor, bool] | DataError:
    try:
        return read()
    except DataError as error:
        return error


def _add_files(reader: InputReader, model: TrainedModel, given: Sequence[str]) -> None:
    """Add the images and arrays of all paths; an image that several paths lead to is added once."""
    seen: set[str] = set()
    for one in given:
        _refuse_run(one)
    for path in [path for one in given for path in _find_files(one, reader)]:
        with reader.attempt(path):
            if path.lower().endswith(".npz"):
                _add_arrays(reader, model, read_array(path), name=path)
            elif path not in seen:
                require_images(model, path)
                seen.add(path)
                reader.add(path, partial(read_stored_image, path, model))


def _refuse_run(given: str) -> None:
    """Refuse a run folder, whose only images are its figures."""
    path = Path(os.path.expanduser(given))
    if os.path.isfile(path / "config.yaml") and os.path.isdir(path / "checkpoints"):
        raise DataError(f"{shorten_path(path)}: is a run folder; give one run, then image files or folders")


def _find_files(given: str, reader: InputReader) -> list[str]:
    """Files of a path: itself, the images below a folder, the rows of a CSV file, or the matches of a pattern.

    What cannot be found or listed is added to ``reader.skipped``.
    """
    path = os.path.expanduser(given)
    with reader.attempt(given):
        if os.path.isdir(path):
            failed: dict[str, str] = {}
            found = images_below(Path(path), failed=failed)
            reader.skipped.update(failed)
            if not found and not failed:
                raise DataError(
                    f"{shorten_path(path)}: holds no images; give a folder with .png, .jpg, .webp, .bmp, .tif"
                )
            return found
        if os.path.exists(path):
            return _read_paths(path) if path.lower().endswith(".csv") else [path]
        if glob.has_magic(path) and not os.path.islink(path):
            return _expand(path, reader)
        raise DataError(f"{shorten_path(path)}: no such file or folder; {suggest_path(Path(path))}")
    return []


def _expand(pattern: str, reader: InputReader) -> list[str]:
    """Files that match a pattern; of one without an ending, such as ``photos/*``, only images, also in folders."""
    with_ending = "." in os.path.basename(pattern)
    files: list[str] = []
    before = len(reader.skipped)
    for match in sorted(glob.glob(pattern, recursive=True)):
        if os.path.isdir(match):
            if "**" not in pattern:  # which matches their files as well
                files += images_below(Path(match), failed=reader.skipped)
        elif with_ending or match.lower().endswith(IMAGE_ENDINGS):
            files += _find_files(match, reader)
    if not files and len(reader.skipped) == before:
        raise DataError(f"{shorten_path(pattern)}: matches no file; check the pattern")
    return files


def _read_paths(file: str) -> list[str]:
    """Paths in the column ``path`` of a CSV file, relative to its folder."""
    return [os.path.join(os.path.dirname(file), path) for path in _read_column(file, ("path",))]


def _read_column(file: str, names: Sequence[str], *, strip: bool = True) -> list[str]:
    """Values of a column of a CSV file that are not empty, without surrounding whitespace if ``strip``."""
    try:
        reader = csv.DictReader(io.StringIO(read_text(Path(file)), newline=""), strict=True, skipinitialspace=True)
        header = [name.strip() for name in reader.fieldnames or ()]
        column = next((name for name in names if name in header), None)
        if column is None:
            raise DataError(
                f"{file}: its first line is {','.join(header)[:80]!r}; start with a header that has the column "
                f"{' or '.join(names)}"
            )
        reader.fieldnames = header
        found = [row[column] or "" for row in reader]
    except csv.Error as error:
        raise DataError(f"{file}: is not valid CSV ({error}); save it again as comma-separated values") from None
    found = _without_empty(found, strip=strip)
    if not found:
        raise DataError(f"{file}: has no rows; add some below the header")
    return found


def _without_empty(texts: Iterable[str], *, strip: bool) -> list[str]:
    return [text.strip() if strip else text for text in texts if text.strip()]


def find_lines(given: str, *, strip: bool = True) -> list[str]:
    """Texts of an argument: lines of a ``.txt`` file or of the standard input (``-``), a CSV column, or itself.

    Args:
        given: The argument.
        strip: Whether whitespace around a line is removed; of a prompt it is part, such as the indentation of code.

    Raises:
        DataError: A folder, or a file without text.
    """
    path = os.path.expanduser(given)
    if given == "-":
        return _read_standard_input(strip=strip)
    if os.path.isdir(path):
        raise DataError(f"{shorten_path(path)}: is a folder; give texts, a .txt file with one a line, or a .csv file")
    if path.lower().endswith(".csv"):
        return _read_column(path, ("text",), strip=strip)
    if path.lower().endswith(".txt") or os.path.exists(path):
        lines = _without_empty(read_text(Path(path)).splitlines(), strip=strip)
        if not lines:
            raise DataError(f"{path}: holds no text; write one text a line")
        return lines
    try:
        given.encode()
    except UnicodeEncodeError:  # bytes of the command line that are not text
        raise DataError(f"{given}: is not UTF-8 text; give text, or a .txt file with one a line") from None
    return [given]


def _read_standard_input(*, strip: bool) -> list[str]:
    try:
        lines = _without_empty((line.rstrip("\r\n") for line in sys.stdin), strip=strip)
        "".join(lines).encode()  # in the C locale, Python replaces bytes that are not text by halves of characters
    except UnicodeError:
        raise DataError("-: the standard input is not UTF-8 text; convert it to UTF-8") from None
    return lines


def _add_texts(reader: InputReader, model: TrainedModel, given: Sequence[str]) -> None:
    """Add the texts of all arguments, and the arrays of ``.npz`` files before them."""
    texts: list[str] = []
    for one in given:
        path = os.path.expanduser(one)
        with reader.attempt(one):
            if path.lower().endswith(".npz") and os.path.exists(path):
                _add_arrays(reader, model, read_array(path), name=path)
            else:
                texts += find_lines(one)
    if texts:
        for text, x in zip(texts, texts_as_inputs(texts, model), strict=True):
            reader.add(text, partial(_unchanged, x))


def _add_arrays(reader: InputReader, model: TrainedModel, x: Tensor, *, name: str) -> None:
    """Add every sample of an array."""
    batch = as_stored(model, x, where=name or "predict")
    for at, sample in enumerate(batch):
        reader.add(f"{name}[{at}]" if name else str(at), partial(_unchanged, sample))


def _unchanged(x: Tensor) -> tuple[Tensor, bool]:
    return x, False
