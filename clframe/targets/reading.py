"""Inputs of a trained model read from files, folders, arrays and texts, as training read them.

Shape suffixes: N samples, C channels, H height, W width, T tokens.
"""

from __future__ import annotations

import csv
import glob
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clframe.data.images import to_pixels
from clframe.data.inputs import InputFormat
from clframe.data.npz import declared_arrays, read_arrays
from clframe.data.sources.image_files import IMAGE_ENDINGS, read_image
from clframe.data.sources.paths import images_below, read_text, shorten_path, suggest_path
from clframe.data.sources.text import hash_features, load_tokenizer, pad_ids, token_ids
from clframe.errors import DataError
from clframe.options import format_value
from clframe.training.trained import TrainedModel

ARRAY_NAMES = ("x", "x_test", "test_x", "test_images")
"""Names of the inputs in an ``.npz`` file, in order of preference; the only array may have any name."""

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
            than the model was trained on.
    """
    reader = InputReader(shape=model.network.input_shape)
    if isinstance(inputs, (Tensor, np.ndarray)):
        _add_arrays(reader, model, _as_tensor(inputs), name="")
        return reader
    single = isinstance(inputs, (str, os.PathLike)) or not isinstance(inputs, Iterable)
    given = [inputs] if single else list(inputs)
    if not given:
        raise DataError("predict: found no inputs; give files, folders or arrays")
    arrays = [_as_tensor(one) for one in given if isinstance(one, (Tensor, np.ndarray))]
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
    if kind in ("words", "tokens"):
        _add_texts(reader, model, [text for one in given for text in _find_texts(os.fspath(one), reader, model)])
        return reader
    seen: set[str] = set()
    for path in _find_all([os.fspath(one) for one in given], reader):
        if path.lower().endswith(".npz"):
            _add_arrays(reader, model, _read_array(path), name=path)
        elif path not in seen:
            _require_images(model, path)
            seen.add(path)
            reader.add(path, partial(_read_image, path, model))
    return reader


def image_reader(model: TrainedModel, paths: Sequence[str]) -> InputReader:
    """Reader of image files.

    Raises:
        DataError: The model was not trained on images.
    """
    reader = InputReader(shape=model.network.input_shape)
    for path in paths:
        _require_images(model, path)
        reader.add(path, partial(_read_image, path, model))
    return reader


def convert_images(x_NCHW: Tensor, *, shape: Sequence[int], source: InputFormat, target: InputFormat) -> Tensor:
    """Convert stored images of one data set to those of another, by the conversion of image files.

    Args:
        x_NCHW: Stored images of 1 or 3 channels.
        shape: Channels, height and width of the target.
        source: Format of ``x_NCHW``.
        target: Format of the result.
    """
    if tuple(x_NCHW.shape[1:]) == tuple(shape) and source.largest == target.largest:
        return x_NCHW
    channels, height, width = shape
    images = []
    for x_CHW in x_NCHW:
        pixels = _rescale(x_CHW, source.largest, 255)
        image = Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy())
        images.append(_rescale(to_pixels(image, channels=channels, size=(height, width)), 255, target.largest))
    return torch.stack(images)


def texts_as_inputs(texts: Sequence[str], model: TrainedModel) -> Tensor:
    """Convert texts as training did: hashed words [N, D], or token ids [N, T].

    Ids are padded as the training texts were, or to the longest of these texts if that is longer.
    """
    form = model.inputs
    assert form is not None
    if form.kind == "words":
        return hash_features(texts, n_features=form.n_features)
    tokenizer = load_tokenizer(form.tokenizer, where="predict")
    rows = token_ids(texts, tokenizer, max_length=form.max_length)
    return pad_ids(rows, length=max([model.network.input_shape[0], *map(len, rows)]))


def _attempt(read: Callable[[], tuple[Tensor, bool]]) -> tuple[Tensor, bool] | DataError:
    try:
        return read()
    except DataError as error:
        return error


def _find_all(given: Sequence[str], reader: InputReader) -> list[str]:
    """Files of all paths; those that give none are skipped, the first is refused where no file is left."""
    files: list[str] = []
    failed: list[DataError] = []
    for one in given:
        _refuse_run(one)
        try:
            files += _find_files(one)
        except DataError as error:
            reader.skipped[one] = str(error)
            failed.append(error)
    if not files:
        raise failed[0]
    return files


def _refuse_run(given: str) -> None:
    """Refuse a run folder, whose only images are its figures."""
    path = Path(os.path.expanduser(given))
    if os.path.isfile(path / "config.yaml") and os.path.isdir(path / "checkpoints"):
        raise DataError(f"{shorten_path(path)}: is a run folder; give one run, then image files or folders")


def _find_files(given: str) -> list[str]:
    """Files of a path: itself, the images below a folder, the rows of a CSV file, or the matches of a pattern."""
    path = os.path.expanduser(given)
    if os.path.isdir(path):
        found = images_below(Path(path))
        if not found:
            raise DataError(f"{shorten_path(path)}: holds no images; give a folder with .png, .jpg, .webp, .bmp, .tif")
        return found
    if os.path.exists(path):
        return _read_paths(path) if path.lower().endswith(".csv") else [path]
    if glob.has_magic(path):
        return _expand(path)
    raise DataError(f"{shorten_path(path)}: no such file or folder; {suggest_path(Path(path))}")


def _expand(pattern: str) -> list[str]:
    """Files that match a pattern; of one without an ending, such as ``photos/*``, only images, also in folders."""
    with_ending = "." in os.path.basename(pattern)
    files: list[str] = []
    for match in sorted(glob.glob(pattern, recursive=True)):
        if os.path.isdir(match):
            files += [] if "**" in pattern else images_below(Path(match))  # ** matches their files as well
        elif with_ending or match.lower().endswith(IMAGE_ENDINGS):
            files += _find_files(match)
    if not files:
        raise DataError(f"{shorten_path(pattern)}: matches no file; check the pattern")
    return files


def _read_paths(file: str) -> list[str]:
    """Paths in the column ``path`` of a CSV file, relative to its folder."""
    return [os.path.join(os.path.dirname(file), path) for path in _read_column(file, ("path",))]


def _read_column(file: str, names: Sequence[str]) -> list[str]:
    """Values of a column of a CSV file that are not empty."""
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
        found = [(row[column] or "").strip() for row in reader]
    except csv.Error as error:
        raise DataError(f"{file}: is not valid CSV ({error}); save it again as comma-separated values") from None
    found = [value for value in found if value]
    if not found:
        raise DataError(f"{file}: has no rows; add some below the header")
    return found


def _find_texts(given: str, reader: InputReader, model: TrainedModel) -> list[str]:
    """Texts of an argument, see :func:`find_lines`; arrays of an ``.npz`` file are added to the reader."""
    path = os.path.expanduser(given)
    if path.lower().endswith(".npz") and os.path.exists(path):
        _add_arrays(reader, model, _read_array(path), name=path)
        return []
    return find_lines(given)


def find_lines(given: str) -> list[str]:
    """Texts of an argument: lines of a ``.txt`` file or of the standard input (``-``), a CSV column, or itself.

    Raises:
        DataError: A folder, or a file without text.
    """
    path = os.path.expanduser(given)
    if given == "-":
        return [line.strip() for line in sys.stdin if line.strip()]
    if os.path.isdir(path):
        raise DataError(f"{shorten_path(path)}: is a folder; give texts, a .txt file with one a line, or a .csv file")
    if path.lower().endswith(".csv"):
        return _read_column(path, ("text",))
    if path.lower().endswith(".txt") or os.path.exists(path):
        lines = [line.strip() for line in read_text(Path(path)).splitlines() if line.strip()]
        if not lines:
            raise DataError(f"{path}: holds no text; write one text a line")
        return lines
    return [given]


def _add_texts(reader: InputReader, model: TrainedModel, texts: Sequence[str]) -> None:
    if texts:
        for text, x in zip(texts, texts_as_inputs(texts, model), strict=True):
            reader.add(text, partial(_unchanged, x))


def _as_tensor(array: Tensor | np.ndarray) -> Tensor:
    try:
        return torch.as_tensor(array)
    except (TypeError, ValueError) as error:  # texts, objects, or a byte order that torch lacks
        raise DataError(f"predict: found an array that is not of numbers ({error}); give numbers") from None


def _add_arrays(reader: InputReader, model: TrainedModel, x: Tensor, *, name: str) -> None:
    """Add every sample of an array."""
    batch = as_stored(model, x, where=name or "predict")
    for at, sample in enumerate(batch):
        reader.add(f"{name}[{at}]" if name else str(at), partial(_unchanged, sample))


def as_stored(model: TrainedModel, x: Tensor, *, where: str) -> Tensor:
    """A batch of inputs as the model's data set stores them.

    Raises:
        DataError: Values that are not finite, fractions for a model that was trained on bytes, or another shape.
    """
    form = model.inputs or InputFormat()
    if not x.ndim or not len(x):
        raise DataError(f"{where}: found no samples; give at least one")
    if x.is_floating_point() and not bool(x.isfinite().all()):
        raise DataError(f"{where}: found values that are not finite (NaN or infinity); replace them, or leave them out")
    if form.kind != "image":
        return model.as_batch(x)
    low, high = float(x.min()), float(x.max())
    if low < 0 or high > form.largest or (x.is_floating_point() and not bool((x == x.round()).all())):
        kind = "fractions" if x.is_floating_point() else "values"
        raise DataError(
            f"{where}: found {kind} from {low:g} to {high:g}, but the model was trained on whole numbers from 0 to "
            f"{form.largest}; give those"
        )
    x = x.to(torch.uint8)
    try:
        return model.as_batch(x)
    except DataError:
        images = _as_images(x)
        if images is None:
            raise
        return convert_images(images, shape=model.network.input_shape, source=form, target=form)


def _as_images(x: Tensor) -> Tensor | None:
    """x_NCHW of one image or a batch, of any size; None where the layout is not clear."""
    if x.ndim == 2:
        return x[None, None]
    if x.ndim not in (3, 4):
        return None
    first, last = x.shape[-3] in (1, 3), x.shape[-1] in (1, 3)
    if first != last:
        batch = x if x.ndim == 4 else x[None]
        return batch if first else batch.permute(0, 3, 1, 2)
    return x[:, None] if x.ndim == 3 and not first else None  # gray images [N, H, W]


def _require_images(model: TrainedModel, path: str) -> None:
    """Refuse image files for a model whose inputs are not those of image files."""
    if model.inputs is None:
        raise DataError(
            f"{path}: the run does not record how it read files, since an earlier version trained it; train again, or "
            f"give arrays as an .npz file"
        )
    if model.inputs.kind != "image":
        raise DataError(f"{path}: the model was trained on arrays, not on image files; give them as an .npz file")


def _read_image(path: str, model: TrainedModel) -> tuple[Tensor, bool]:
    form = model.inputs
    assert form is not None
    pixels, differs = read_image(path, shape=model.network.input_shape)
    return _rescale(pixels, 255, form.largest), differs and form.size is None


def _rescale(pixels: Tensor, old: int, new: int) -> Tensor:
    """Map bytes from 0..old to 0..new, rounded to the nearest."""
    if old == new:
        return pixels
    return ((2 * new * pixels.long() + old) // (2 * old)).to(torch.uint8)


def _unchanged(x: Tensor) -> tuple[Tensor, bool]:
    return x, False


def _read_array(path: str) -> Tensor:
    """The inputs in an ``.npz`` file; see :data:`ARRAY_NAMES`."""
    try:
        declared = declared_arrays(path)
        name = next((name for name in ARRAY_NAMES if name in declared), None)
        if name is None and len(declared) == 1:
            (name,) = declared
        if name is None:
            found = ", ".join(sorted(declared)) or "no arrays"
            raise DataError(f"{path}: found {found}; save the inputs as x")
        array = read_arrays(path, [name])[name]
    except DataError:
        raise
    except Exception as error:  # damaged archives raise anything from BadZipFile to UnicodeDecodeError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read as .npz ({reason}); write it again with numpy.savez") from None
    if array.dtype.kind not in "buif":
        raise DataError(f"{path}: {name} has type {array.dtype}; give numbers")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{path}: {name} has NaN or infinite values; clean them")
    if array.dtype.kind in "ui" and array.dtype != np.uint8:
        array = array.astype(np.int64)  # torch does not compute with all unsigned integers
    return torch.from_numpy(np.ascontiguousarray(array))
