"""Dense tensors of numbers, from tensors and arrays of any type."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from clframe.errors import DataError

_UNSIGNED = frozenset({torch.uint16, torch.uint32, torch.uint64})
_NUMBERS = frozenset({
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
})  # fmt: skip


def numeric_tensor(array: Tensor | ArrayLike, *, where: str) -> Tensor:
    """Return the values of an array as a tensor with which torch computes.

    Unsigned integers of more than 8 bits become int64, and the extended precision of numpy float64. Memory is shared
    with the array where its type, byte order and layout allow it.

    Args:
        array: A tensor, an array, or nested sequences of numbers.
        where: Start of the error.

    Raises:
        DataError: Text, objects, complex, quantized or 8-bit floating-point numbers, a sparse tensor, nested sequences
            of different lengths, or integers above 2**63 - 1.

    >>> numeric_tensor(np.array([1, 65535], dtype=">u2"), where="x")
    tensor([    1, 65535])
    """
    if not isinstance(array, Tensor):
        array = _from_numpy(array, where=where)
    if array.layout != torch.strided:
        raise DataError(f"{where}: found a tensor of layout {array.layout}; give a dense one")
    if array.dtype in _UNSIGNED:  # torch has hardly any operator for them
        whole = array.to(torch.int64)
        if array.dtype == torch.uint64 and bool((whole < 0).any()):
            raise DataError(f"{where}: found integers above {2**63 - 1}; give smaller ones, or fractions")
        return whole
    if array.dtype not in _NUMBERS:
        raise DataError(f"{where}: found an array that is not of numbers ({array.dtype}); give whole or real numbers")
    return array


def _from_numpy(array: ArrayLike, *, where: str) -> Tensor:
    try:
        found = np.asarray(array)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: found no array ({error}); give numbers, as many in each row") from None
    if found.dtype.kind not in "buif":
        raise DataError(f"{where}: found an array that is not of numbers ({found.dtype}); give whole or real numbers")
    native = np.dtype(np.float64) if found.dtype.char == "g" else found.dtype.newbyteorder("=")
    found = np.asarray(found, dtype=native, order="C")  # torch has neither other byte orders nor negative strides
    return torch.from_numpy(found if found.flags.writeable else found.copy())
