"""Running text as a stream of domains for language models."""

from __future__ import annotations

import hashlib
import io
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from clframe.data.inputs import InputFormat
from clframe.data.samples import TensorSamples
from clframe.data.source import SOURCES, Source
from clframe.data.sources.paths import require_path
from clframe.data.tokenizer import TextTokenizer, digest_of, read_tokenizer, train_tokenizer
from clframe.errors import ConfigError, DataError, nearest
from clframe.files import write_atomically

_ENDINGS = (".txt", ".txt.xz")
_PARTS = ("train", "test")


@SOURCES.register("language_model")
def language_model(
    *,
    path: str = "",
    domains: tuple[str, ...] = (),
    context: int = 128,
    vocabulary: int = 2048,
    tokenizer: str = "",
    tokenizer_text: Literal["all", "first"] = "all",
    characters: int = 0,
    test_characters: int = 0,
    cache: str = "",
) -> Source:
    """Text files as a stream of domains for next-token prediction: ``path/NAME_train.txt``, ``path/NAME_test.txt``.

    Files may be compressed (``.txt.xz``). A sample is a window of ``context`` + 1 token ids; windows overlap by one id,
    so that every token of a text but the first is predicted exactly once, and a rest shorter than a window is left out.
    A domain is a class of the stream: ``experiences`` is the number of domains, ``class_order: sorted`` learns them in
    the order of ``domains``. Validation data are windows of the training text (``validation``); further files are not
    read.

    Args:
        path: The folder.
        domains: Names of domains, in order; empty: all in the folder, in alphabetical order.
        context: Tokens that a model predicts from, and predicts, at most.
        vocabulary: Number of token ids.
        tokenizer: A ``tokenizer.json``, or a folder with one; empty trains a byte-level BPE tokenizer.
        tokenizer_text: Training text of this tokenizer: of ``all`` domains, or of the ``first`` one, without knowledge
            of what follows.
        characters: Most characters of a domain's training text, from its start; 0 is all.
        test_characters: The same for its test text.
        cache: Folder for the trained tokenizer and the ids of texts, which later starts read; empty stores nothing.

    Raises:
        ConfigError: A size out of range, or a tokenizer of another vocabulary.
        DataError: A file that is missing, empty or unreadable, or a text shorter than a window.
        UnsupportedError: The package tokenizers is not installed.
    """
    sizes = (("context", context, 1), ("characters", characters, 0), ("test_characters", test_characters, 0))
    for option, value, least in sizes:
        if value < least:
            raise ConfigError(f"benchmark.{option}: found {value}; give at least {least}")
    root = require_path(path, option="path", kind="folder")
    files = domain_files(root, domains)
    limits = {"train": characters, "test": test_characters}
    texts = {part: [read_domain(of[part], characters=limits[part]) for of in files.values()] for part in _PARTS}
    if tokenizer:
        content = read_tokenizer(tokenizer, where="benchmark.tokenizer")
    else:
        fitted = texts["train"][: 1 if tokenizer_text == "first" else None]
        stored = _cached(cache, ["tokenizer", str(vocabulary), *fitted], ".json")
        if stored is not None and stored.is_file():
            content = read_tokenizer(stored, where="benchmark.cache")
        else:
            content = train_tokenizer(fitted, vocabulary=vocabulary)
            if stored is not None:
                write_atomically(stored, content)
    encoder = TextTokenizer(content)
    if len(encoder) != vocabulary:
        raise ConfigError(
            f"benchmark.vocabulary: found {vocabulary}, but {tokenizer} has {len(encoder)} ids; give that number"
        )
    samples = {
        part: _samples(
            [_ids(encoder, content, text, cache=cache) for text in texts[part]],
            [of[part] for of in files.values()],
            context=context,
        )
        for part in _PARTS
    }
    return Source(
        "language_model", samples["train"], samples["test"], classes=len(files), class_names=tuple(files),
        inputs=InputFormat(kind="language", max_length=context + 1, tokenizer=digest_of(content)),
        vocabulary=vocabulary, tokenizer=content,
    )  # fmt: skip


def domain_files(
    root: Path, domains: tuple[str, ...] = (), *, parts: Sequence[str] = _PARTS
) -> dict[str, dict[str, Path]]:
    """Return the files of each domain of a folder by part, ``train`` and ``test``.

    Args:
        root: The folder.
        domains: Names, in order; empty: all, in alphabetical order.
        parts: The parts that a domain needs.

    Raises:
        ConfigError: A name given twice.
        DataError: No domain in the folder, or one without a file.
    """
    found = {path.name: path for path in sorted(root.iterdir()) if path.is_file()}
    first = parts[0]
    ends = [f"_{first}{end}" for end in _ENDINGS]
    known = sorted({name.removesuffix(end) for name in found for end in ends if name.endswith(end)})
    if not known:
        raise DataError(f"{root}: has no NAME_{first}.txt or NAME_{first}.txt.xz; put the text of each domain into one")
    if len(set(domains)) < len(domains):
        raise ConfigError(f"benchmark.domains: found {list(domains)}; name each domain once")
    chosen: dict[str, dict[str, Path]] = {}
    for name in domains or known:
        chosen[name] = {}
        for part in parts:
            path = next((found[f"{name}_{part}{end}"] for end in _ENDINGS if f"{name}_{part}{end}" in found), None)
            if path is None:
                close = nearest(name, known) if name not in known else None
                advice = f"did you mean '{close}'?" if close else "add the file"
                raise DataError(f"{root / f'{name}_{part}.txt'}: no such file (or .txt.xz); {advice}")
            chosen[name][part] = path
    return chosen


def has_domain(root: Path, name: str) -> bool:
    """Whether a folder has training and test text of a domain."""
    return all(any((root / f"{name}_{part}{end}").is_file() for end in _ENDINGS) for part in _PARTS)


def read_domain(path: Path, *, characters: int = 0) -> str:
    """Read a UTF-8 text, plain or compressed by xz.

    Args:
        path: The file.
        characters: Most characters to read; 0 is all.

    Raises:
        DataError: An empty file, or one that cannot be read.
    """
    try:
        with lzma.open(path, "rb") if path.suffix == ".xz" else path.open("rb") as file:
            # A character has up to four bytes; the last one may be cut.
            data = file.read(4 * characters) if characters else file.read()
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path}: could not be read ({error}); restore the file") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if not characters or error.start < len(data) - 3:
            raise DataError(f"{path}: byte {error.start} is not UTF-8 text; save the file as UTF-8") from None
        text = data[: error.start].decode("utf-8-sig")
    if not text:
        raise DataError(f"{path}: is empty; give a text")
    return text[:characters] if characters else text


def windows_of(ids_N: Tensor, *, context: int) -> Tensor:
    """Return ids_MS, all whole windows of ``context`` + 1 ids, each of which begins with the last id of the one before.

    They are those of :func:`~clframe.functional.language.strided_windows` with a stride of ``context``, without a
    shorter last one.

    >>> windows_of(torch.arange(9), context=3).tolist()
    [[0, 1, 2, 3], [3, 4, 5, 6]]
    """
    if len(ids_N) <= context:
        return ids_N.new_zeros(0, context + 1)
    return ids_N.unfold(0, context + 1, context).contiguous()


def _cached(folder: str, key: Sequence[str], ending: str) -> Path | None:
    """A file of the cache, named by the digest of what determines its content; None without a cache."""
    if not folder:
        return None
    digest = hashlib.sha256()
    for part in key:
        digest.update(hashlib.sha256(part.encode()).digest())
    root = Path(folder).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"benchmark.cache: {root} cannot be written ({error.strerror}); give another folder") from None
    return root / f"{digest.hexdigest()[:32]}{ending}"


def _ids(encoder: TextTokenizer, content: str, text: str, *, cache: str) -> Tensor:
    """Return ids_N of a text, read from the cache where they are in it."""
    file = _cached(cache, ["ids", content, text], ".npy")
    if file is not None and file.is_file():
        try:
            return torch.from_numpy(np.load(file, allow_pickle=False))
        except (OSError, ValueError, EOFError):
            raise DataError(f"benchmark.cache: {file} is damaged; delete it") from None
    ids_N = encoder.encode(text)
    if file is not None:
        buffer = io.BytesIO()
        np.save(buffer, ids_N.numpy())
        write_atomically(file, buffer.getvalue())
    return ids_N


def _samples(texts: Sequence[Tensor], files: Sequence[Path], *, context: int) -> TensorSamples:
    parts = []
    for ids_N, file in zip(texts, files, strict=True):
        windows_MS = windows_of(ids_N, context=context)
        if not len(windows_MS):
            raise DataError(
                f"{file}: has {len(ids_N)} tokens, fewer than a window of {context + 1}; lower benchmark.context or "
                f"give more text"
            )
        parts.append(windows_MS)
    domain_N = torch.cat([torch.full((len(part),), number) for number, part in enumerate(parts)])
    return TensorSamples(torch.cat(parts), domain_N, mean=(), std=())
