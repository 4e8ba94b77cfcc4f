"""Texts as token ids, by the tokenizer of a model of the Hugging Face hub (extra ``transformers``).

Nothing of a tokenizer's own code is ever run, and a folder needs no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clframe.errors import ConfigError, DataError, UnsupportedError


def load_tokenizer(name: str, *, where: str) -> Any:
    """The tokenizer of a model of the hub, or of a folder.

    Args:
        name: Of the model, such as ``google-bert/bert-base-uncased``, or a folder.
        where: What messages begin with.

    Raises:
        UnsupportedError: transformers is not installed.
        DataError: There is none, or it brings code of its own.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UnsupportedError(f"{where}: found no package transformers; pip install clframe[transformers]") from error
    folder = Path(name).expanduser()
    try:
        return AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else name, trust_remote_code=False)
    except Exception as error:  # what a library may say of a broken file is not listed anywhere
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DataError(
            f"{where}: the tokenizer of {name} could not be loaded ({reason}); connect, or give a folder that has one"
        ) from error


def token_ids(texts: Sequence[str], tokenizer: Any, *, max_length: int) -> list[list[int]]:
    """The ids of each text with the tokenizer's special tokens, cut to ``max_length``, without padding.

    Raises:
        ConfigError: A length that leaves no room beside special tokens.
    """
    least = int(tokenizer.num_special_tokens_to_add()) + 1
    if max_length < least:
        raise ConfigError(f"max_length: found {max_length}; give at least {least}, special tokens included")
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    return ids


def padded(rows: Sequence[Sequence[int]], *, length: int | None = None, padding: int = 0) -> Tensor:
    """ids_NT of rows of any lengths, padded at the end to ``length`` or the longest.

    >>> padded([[5, 6, 7], [8]]).tolist()
    [[5, 6, 7], [8, 0, 0]]
    """
    width = max(map(len, rows), default=0) if length is None else length
    ids = [[*row, *[padding] * (width - len(row))] for row in rows]
    return torch.tensor(ids, dtype=torch.int32).reshape(len(rows), width)


def require_zero_padding(tokenizer: Any, *, name: str, where: str) -> None:
    """Refuse a tokenizer whose id 0 is a token of its own: encoders here take it for padding.

    Raises:
        ConfigError: Padding that has another id, or none.
    """
    found = tokenizer.pad_token_id
    if found != 0:
        said = "has no padding token" if found is None else f"pads with id {found}"
        raise ConfigError(f"{where}: {name} {said}; take a tokenizer that pads with id 0, such as BERT's")
