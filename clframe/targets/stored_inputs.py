"""Arrays, images and texts as the inputs that a model's data set stores.

Shape suffixes: N samples, C channels, H height, W width, D features, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from clframe.data.images import to_pixels
from clframe.data.inputs import InputFormat
from clframe.data.npz import declared_arrays, read_arrays
from clframe.data.numeric import numeric_tensor
from clframe.data.sources.image_files import read_image
from clframe.data.sources.text import hash_features, load_tokenizer, pad_ids, token_ids
from clframe.errors import DataError, reason_of
from clframe.training.trained import TrainedModel

ARRAY_NAMES = ("x", "x_test", "test_x", "test_images")
"""Names of the inputs in an ``.npz`` file, in order of preference; the only array may have any name."""


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
        return model.as_batch(x, where=where)
    form.check_pixels(x, where=where)
    x = x.to(torch.uint8)
    try:
        return model.as_batch(x, where=where)
    except DataError:
        images = _as_images(x)
        if images is None:
            raise
        return convert_images(images, shape=model.network.input_shape, source=form, target=form)


def read_array(path: str) -> Tensor:
    """The inputs in an ``.npz`` file; see :data:`ARRAY_NAMES`.

    Raises:
        DataError: A file that cannot be read, without such an array, or with one that is not of numbers.
    """
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
        raise DataError(
            f"{path}: cannot be read as .npz ({reason_of(error)}); write it again with numpy.savez"
        ) from None
    return numeric_tensor(array, where=f"{path}: {name}")


def require_images(model: TrainedModel, path: str) -> None:
    """Refuse image files for a model whose inputs are not those of image files (DataError)."""
    if model.inputs is None:
        raise DataError(
            f"{path}: the run does not record how it read files, since an earlier version trained it; train again, or "
            f"give arrays as an .npz file"
        )
    if model.inputs.kind != "image":
        raise DataError(f"{path}: the model was trained on arrays, not on image files; give them as an .npz file")


def read_stored_image(path: str, model: TrainedModel) -> tuple[Tensor, bool]:
    """An image file as stored, and whether it was resized although training resized none.

    Raises:
        DataError: It cannot be read.
    """
    form = model.inputs
    assert form is not None
    pixels, differs = read_image(path, shape=model.network.input_shape)
    return _rescale(pixels, 255, form.largest), differs and form.size is None


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


def _rescale(pixels: Tensor, old: int, new: int) -> Tensor:
    """Map bytes from 0..old to 0..new, rounded to the nearest."""
    if old == new:
        return pixels
    return ((2 * new * pixels.long() + old) // (2 * old)).to(torch.uint8)
