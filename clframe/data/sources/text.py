"""Short texts as bags of hashed words or as token ids: CLINC150 and BANKING77."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clframe.data.inputs import InputFormat
from clframe.data.samples import TensorSamples
from clframe.data.source import SOURCES, Source
from clframe.data.sources.paths import PublishedFile, ensure_files, read_text
from clframe.errors import ConfigError, DataError, UnsupportedError


def load_tokenizer(name: str, *, where: str) -> Any:
    """Load the tokenizer of a model.

    Args:
        name: Hub id, such as ``google-bert/bert-base-uncased``, or a folder.
        where: Start of error messages.

    Raises:
        UnsupportedError: transformers is not installed.
        DataError: No tokenizer, or one that needs remote code.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UnsupportedError(f"{where}: found no package transformers; pip install clframe[transformers]") from error
    folder = Path(name).expanduser()
    try:
        return AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else name, trust_remote_code=False)
    except Exception as error:  # the exceptions of transformers for broken files are not documented
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise DataError(
            f"{where}: the tokenizer of {name} could not be loaded ({reason}); go online, or give a folder with one"
        ) from error


def token_ids(texts: Sequence[str], tokenizer: Any, *, max_length: int) -> list[list[int]]:
    """Token ids of each text with special tokens, truncated to ``max_length``, without padding.

    Raises:
        ConfigError: A length without room for tokens other than the special ones.
    """
    least = int(tokenizer.num_special_tokens_to_add()) + 1
    if max_length < least:
        raise ConfigError(f"max_length: found {max_length}; give at least {least}, special tokens included")
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    return ids


def pad_ids(rows: Sequence[Sequence[int]], *, length: int | None = None, padding: int = 0) -> Tensor:
    """Pad rows of token ids at the end to ``length``, or to the longest row: ids_NT.

    >>> pad_ids([[5, 6, 7], [8]]).tolist()
    [[5, 6, 7], [8, 0, 0]]
    """
    width = max(map(len, rows), default=0) if length is None else length
    ids = [[*row, *[padding] * (width - len(row))] for row in rows]
    return torch.tensor(ids, dtype=torch.int32).reshape(len(rows), width)


def require_zero_padding(tokenizer: Any, *, name: str, where: str) -> None:
    """Refuse a tokenizer that does not pad with id 0, which the text backbones take for padding.

    Raises:
        ConfigError: Another padding token, or none.
    """
    found = tokenizer.pad_token_id
    if found != 0:
        fault = "has no padding token" if found is None else f"pads with id {found}"
        raise ConfigError(f"{where}: {name} {fault}; use a tokenizer that pads with id 0, such as BERT's")


_CLINC = "https://raw.githubusercontent.com/clinc/oos-eval/master/data"
CLINC150 = (
    PublishedFile("clinc150/data_full.json", f"{_CLINC}/data_full.json", "30c29dc6ab78edf3b5dfa640be204cde"),
    PublishedFile("clinc150/domains.json", f"{_CLINC}/domains.json", "9beee9d0f36e07e914c1e3a626bdcb4a"),
)
_POLYAI = "https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/master/banking_data"
BANKING77 = (
    PublishedFile("banking77/train.csv", f"{_POLYAI}/train.csv", "cec64185f4197906aabce0781ef9a19b"),
    PublishedFile("banking77/test.csv", f"{_POLYAI}/test.csv", "8dcd9dc31b686c75ec1f24bf23c140cb"),
    PublishedFile("banking77/categories.json", f"{_POLYAI}/categories.json", "8312ff01430af97fba5a113b7a490269"),
)

Text = tuple[str, str]
"""A text and its label."""


@dataclass(frozen=True)
class Corpus:
    """Texts with labels."""

    name: str
    train: tuple[Text, ...]
    test: tuple[Text, ...]
    class_names: tuple[str, ...]
    """Labels in order of their ids."""

    def ids(self, part: Sequence[Text]) -> Tensor:
        """Classes of texts: targets_N."""
        number = {intent: c for c, intent in enumerate(self.class_names)}
        return torch.tensor([number[label] for _, label in part], dtype=torch.long)


@SOURCES.register("clinc150")
def clinc150(
    *,
    n_features: int = 2048,
    tokens: str | None = None,
    max_length: int = 64,
    data_dir: str = "data",
    download: bool = True,
) -> Source:
    """Queries to an assistant (CLINC150), 15,000 + 4,500 texts, 150 intents in 10 domains. Larson et al. (2019).

    Classes are numbered domain by domain, so ``class_order: sorted`` in 10 experiences learns one domain after the
    other. Out-of-scope texts and the published validation texts are not used. For the features see
    :func:`hash_features`.

    Args:
        n_features: Length of the vector of a text, without ``tokens``.
        tokens: Hub id or folder of a model whose tokenizer converts the texts to token ids, for the backbones bert and
            hf_text (extra transformers).
        max_length: Maximum number of tokens; longer texts are truncated.
        data_dir: Folder of ``clinc150`` or ``text/clinc150``, with ``data_full.json`` and ``domains.json``.
        download: Download missing files.
    """
    corpus = clinc150_texts(data_dir=data_dir, download=download)
    return _source(corpus, n_features=n_features, tokens=tokens, max_length=max_length)


@SOURCES.register("banking77")
def banking77(
    *,
    n_features: int = 2048,
    tokens: str | None = None,
    max_length: int = 64,
    data_dir: str = "data",
    download: bool = True,
) -> Source:
    """Queries to a bank (Banking77), 10,003 + 3,080 texts, 77 intents of unequal size. Casanueva et al. (2020).

    Classes are numbered as in ``categories.json``. For the features see :func:`hash_features`.

    Args:
        n_features: Length of the vector of a text, without ``tokens``.
        tokens: Hub id or folder of a model whose tokenizer converts the texts to token ids, for the backbones bert and
            hf_text (extra transformers).
        max_length: Maximum number of tokens; longer texts are truncated.
        data_dir: Folder of ``banking77`` or ``text/banking77``, with ``train.csv``, ``test.csv``,
            ``categories.json``.
        download: Download missing files.
    """
    corpus = banking77_texts(data_dir=data_dir, download=download)
    return _source(corpus, n_features=n_features, tokens=tokens, max_length=max_length)


def clinc150_texts(*, data_dir: str = "data", download: bool = True) -> Corpus:
    """Texts of CLINC150; for the options see :func:`clinc150`."""
    root = _download("CLINC150", data_dir, CLINC150, download=download)
    texts, domains = _json(root / "data_full.json"), _json(root / "domains.json")
    try:
        names = [str(intent) for intents in domains.values() for intent in intents]
        train, test = ([(str(text), str(label)) for text, label in texts[part]] for part in ("train", "test"))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataError(
            f"{root / 'data_full.json'}: is not in the published format; delete {root} and run again"
        ) from None
    return _corpus("clinc150", train, test, names, where=root)


def banking77_texts(*, data_dir: str = "data", download: bool = True) -> Corpus:
    """Texts of Banking77; for the options see :func:`banking77`."""
    root = _download("Banking77", data_dir, BANKING77, download=download)
    names = _json(root / "categories.json")
    if not isinstance(names, list):
        raise DataError(f"{root / 'categories.json'}: is not a list of names; delete it and run again")
    train, test = (_csv(root / name) for name in ("train.csv", "test.csv"))
    return _corpus("banking77", train, test, [str(name) for name in names], where=root)


CORPORA: Mapping[str, Callable[..., Corpus]] = {"banking77": banking77_texts, "clinc150": clinc150_texts}
"""Text data sets by name: functions of ``data_dir`` and ``download``."""


def hash_features(texts: Sequence[str], *, n_features: int) -> Tensor:
    """texts_ND: counts of words and word pairs, hashed to D features and normalized to length 1.

    Nothing is fitted: a vocabulary or word weights of all training texts would leak later experiences into the first.
    Weinberger et al., "Feature Hashing for Large Scale Multitask Learning" (2009).

    Raises:
        ConfigError: Fewer than one feature.

    >>> hash_features(["where is my card"], n_features=64).norm().item()
    1.0
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    if n_features < 1:
        raise ConfigError(f"benchmark.n_features: found {n_features}; give at least 1")
    words = HashingVectorizer(
        n_features=n_features, ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", norm="l2", dtype=np.float32
    )
    return torch.from_numpy(words.transform(texts).toarray())


def _corpus(name: str, train: list[Text], test: list[Text], names: list[str], *, where: Path) -> Corpus:
    unknown = {label for _, label in train + test} - set(names)
    if unknown:
        raise DataError(f"{where}: intent '{min(unknown)}' is not listed; delete {where} and run again")
    return Corpus(name, tuple(train), tuple(test), tuple(names))


def _source(corpus: Corpus, *, n_features: int, tokens: str | None, max_length: int) -> Source:
    parts = (corpus.train, corpus.test)
    texts = [[text for text, _ in part] for part in parts]
    # A vector of length 1 is far shorter than a normalized image. It is scaled to the length of as many normalized
    # pixels, so that the same learning rates work.
    scale: tuple[float, ...] = (n_features**-0.5,) if n_features > 0 else (1.0,)
    if tokens is None:
        x = [hash_features(part, n_features=n_features) for part in texts]
        train, test = (
            TensorSamples(x_ND, corpus.ids(part), std=scale) for x_ND, part in zip(x, parts, strict=True)
        )
    else:
        x = _tokens(texts, tokens, max_length=max_length)
        train, test = (
            TensorSamples(ids_NT, corpus.ids(part), mean=(), std=()) for ids_NT, part in zip(x, parts, strict=True)
        )
    inputs = (
        InputFormat(kind="words", n_features=n_features)
        if tokens is None
        else InputFormat(kind="tokens", tokenizer=_absolute(tokens), max_length=max_length)
    )
    names = corpus.class_names
    return Source(corpus.name, train, test, classes=len(names), class_names=names, inputs=inputs)


def _absolute(tokenizer: str) -> str:
    """The full path of a folder; the name of a hub unchanged."""
    folder = Path(tokenizer).expanduser()
    return str(folder.resolve()) if folder.is_dir() else tokenizer


def _tokens(parts: Sequence[Sequence[str]], name: str, *, max_length: int) -> list[Tensor]:
    """ids_NT of each split, padded to the length of the longest text of all."""
    tokenizer = load_tokenizer(name, where="benchmark.tokens")
    require_zero_padding(tokenizer, name=name, where="benchmark.tokens")
    try:
        rows = [token_ids(part, tokenizer, max_length=max_length) for part in parts]
    except ConfigError as error:
        raise ConfigError(f"benchmark.{error}") from None
    length = max(len(row) for part in rows for row in part)
    return [pad_ids(part, length=length) for part in rows]


def _download(title: str, data_dir: str, published: Sequence[PublishedFile], *, download: bool) -> Path:
    from torchvision.datasets.utils import download_url

    root, folder = Path(data_dir).expanduser(), Path(published[0].file).parent
    inside = root / "text"
    if all((inside / p.file).is_file() for p in published):
        return inside / folder

    def fetch(place: str) -> None:
        for p in published:
            download_url(p.url, str(Path(place) / folder), filename=Path(p.file).name, md5=p.md5)

    ensure_files(title, root, wanted=[p.file for p in published], published=published, download=download, fetch=fetch)
    return root / folder


def _json(file: Path) -> Any:
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: is not valid JSON ({error}); delete it and run again") from None


def _csv(file: Path) -> list[Text]:
    rows = list(csv.DictReader(io.StringIO(read_text(file), newline="")))
    if not rows or not {"text", "category"} <= set(rows[0]) or any(None in row.values() for row in rows):
        raise DataError(f"{file}: is not in the published format (text,category); delete it and run again")
    return [(row["text"], row["category"]) for row in rows]
