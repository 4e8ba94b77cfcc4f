"""Conversion of files to inputs, recorded with a run so that predictions read files as training did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clframe.errors import DataError
from clframe.records import read_record


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFormat:
    """The file format behind the inputs of a data set, and the parameters of its conversion."""

    kind: Literal["image", "words", "tokens", "language", "array"] = "array"
    """``image``: pixels of image files; ``words``: texts as hashed words; ``tokens``: texts as token ids of a
    tokenizer; ``language``: windows of running text for a language model; ``array``: numbers without a file format,
    given as arrays."""
    size: int | None = None
    """Side in pixels to which the data set's images were resized; None where all had one size."""
    largest: int = 255
    """Value of a white pixel in the inputs of an image: 255 for bytes, 16 for the digits of scikit-learn."""
    n_features: int = 0
    """Length of the vectors of ``words``."""
    tokenizer: str = ""
    """Hub id or folder of the tokenizer of ``tokens``; of ``language`` the SHA-256 of its ``tokenizer.json``, empty in
    checkpoints of earlier versions."""
    max_length: int = 0
    """Largest number of tokens of a text."""

    def check_pixels(self, x: Tensor, *, where: str) -> None:
        """Refuse values that no stored image has; only for images.

        Raises:
            DataError: Fractions, or values below 0 or above ``largest``; the message begins with ``where``.
        """
        if self.kind != "image" or not x.numel() or (x.dtype == torch.uint8 and self.largest >= 255):
            return
        low, high = float(x.min()), float(x.max())
        if low < 0 or high > self.largest or (x.is_floating_point() and not bool((x == x.round()).all())):
            kind = "fractions" if x.is_floating_point() else "values"
            raise DataError(
                f"{where}: found {kind} from {low:g} to {high:g}, but the model was trained on whole numbers from 0 to "
                f"{self.largest}; give those"
            )

    def as_tree(self) -> dict[str, Any]:
        """Return plain values; :meth:`of` is the inverse."""
        return asdict(self)

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> InputFormat:
        """Build from :meth:`as_tree`; unknown fields, of later versions, are ignored."""
        return read_record(cls, tree, prefix="inputs.")
