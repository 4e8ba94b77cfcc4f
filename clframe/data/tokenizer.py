"""Byte-level BPE tokenizer: trained on texts, read from and written as ``tokenizer.json`` (package tokenizers)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from clframe.errors import ConfigError, DataError, UnsupportedError

BYTES: Final = 256
"""Ids of single bytes, with which every text can be encoded."""
_LINES, _TOGETHER = 200, 64
"""Lines of a text that are encoded as one piece, and pieces that are encoded by several threads. Pieces are part of the
definition of the ids: a pair of ids is never joined across their borders."""


def train_tokenizer(texts: Sequence[str], *, vocabulary: int) -> str:
    """Train a byte-level BPE tokenizer; returns the content of its ``tokenizer.json``.

    Ids 0 to 255 are the bytes, in the order of tokenizers' byte alphabet; each further id joins the pair of ids that is
    most frequent within words. Texts and vocabulary alone determine the result. Sennrich et al., "Neural Machine
    Translation of Rare Words with Subword Units" (2016); on bytes: Radford et al., "Language Models are Unsupervised
    Multitask Learners" (2019).

    Args:
        texts: Training texts.
        vocabulary: Number of ids, at least 257.

    Raises:
        ConfigError: A vocabulary that is too small, or larger than the texts have pairs to join.
        UnsupportedError: tokenizers is not installed.
    """
    if vocabulary <= BYTES:
        raise ConfigError(
            f"benchmark.vocabulary: found {vocabulary}; give more than {BYTES}, of which each byte needs one"
        )
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    found = tokenizer.get_vocab_size()
    if found < vocabulary:
        raise ConfigError(
            f"benchmark.vocabulary: found {vocabulary}, but the texts have pairs for {found} ids only; give at most "
            f"{found}, or more text"
        )
    content: str = tokenizer.to_str()
    return content


def read_tokenizer(path: str | Path, *, where: str) -> str:
    """Read the content of a ``tokenizer.json``, or of the one in a folder.

    Raises:
        DataError: No such file, or one that tokenizers cannot read.
        UnsupportedError: tokenizers is not installed.
    """
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: {file} could not be read ({error}); give a tokenizer.json") from None
    TextTokenizer(content, where=f"{where}: {file}")
    return content


def digest_of(content: str) -> str:
    """Return the SHA-256 of the content of a ``tokenizer.json``, in hexadecimal digits: equal ids mean equal text."""
    return hashlib.sha256(content.encode()).hexdigest()


class TextTokenizer:
    """Converts texts to ids and back.

    Args:
        content: Content of a ``tokenizer.json``.
        where: Start of error messages.

    Raises:
        DataError: Content that tokenizers cannot read.
        UnsupportedError: tokenizers is not installed.
    """

    def __init__(self, content: str, *, where: str = "tokenizer") -> None:
        try:
            self._tokenizer = _library().Tokenizer.from_str(content)
        except UnsupportedError:
            raise
        except Exception as error:  # tokenizers raises plain Exceptions
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise DataError(f"{where} is not a tokenizer ({reason}); give a tokenizer.json") from None

    def __len__(self) -> int:
        """Number of ids."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> Tensor:
        """Return ids_N, int32, of a text, without special tokens."""
        parts = [np.zeros(0, dtype=np.int32)]
        pieces = list(_pieces(text))
        for start in range(0, len(pieces), _TOGETHER):  # bounds the memory of the encodings, 50 times that of the ids
            found = self._tokenizer.encode_batch(pieces[start : start + _TOGETHER], add_special_tokens=False)
            parts += [np.asarray(encoding.ids, dtype=np.int32) for encoding in found]
        return torch.from_numpy(np.concatenate(parts))

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Return the text of ids; parts of characters at the ends become replacement characters."""
        listed = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        text: str = self._tokenizer.decode(listed, skip_special_tokens=False)
        return text


def _pieces(text: str) -> Iterator[str]:
    lines = text.splitlines(keepends=True)
    for start in range(0, len(lines), _LINES):
        yield "".join(lines[start : start + _LINES])


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UnsupportedError(
            "benchmark.tokenizer: found no package tokenizers; pip install clframe[transformers]"
        ) from error
    return tokenizers
