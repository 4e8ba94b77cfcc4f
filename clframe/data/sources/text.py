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

from clframe.data.samples import TensorSamples
from clframe.data.source import SOURCES, Source
from clframe.data.sources.paths import Published, provide, text_of
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


_CLINC = "https://raw.githubusercontent.com/clinc/oos-eval/master/data"
CLINC150 = (
    Published("clinc150/data_full.json", f"{_CLINC}/data_full.json", "30c29dc6ab78edf3b5dfa640be204cde"),
    Published("clinc150/domains.json", f"{_CLINC}/domains.json", "9beee9d0f36e07e914c1e3a626bdcb4a"),
)
_POLYAI = "https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/master/banking_data"
BANKING77 = (
    Published("banking77/train.csv", f"{_POLYAI}/train.csv", "cec64185f4197906aabce0781ef9a19b"),
    Published("banking77/test.csv", f"{_POLYAI}/test.csv", "8dcd9dc31b686c75ec1f24bf23c140cb"),
    Published("banking77/categories.json", f"{_POLYAI}/categories.json", "8312ff01430af97fba5a113b7a490269"),
)

Text = tuple[str, str]
"""A text and its label."""


@dataclass(frozen=True)
class Corpus:
    """Texts with labels, before anything is made of them."""

    name: str
    train: tuple[Text, ...]
    test: tuple[Text, ...]
    class_names: tuple[str, ...]
    """Labels in order of their ids."""

    def ids(self, part: Sequence[Text]) -> Tensor:
        """The classes of texts: targets_N."""
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
    """Questions to an assistant, 15,000 + 4,500 texts, 150 intents in 10 domains. Larson et al. (2019).

    Classes are numbered domain by domain, so ``class_order: sorted`` in 10 experiences learns one domain
    after the other. Texts out of scope and the published validation texts are left out. For the features
    see :func:`hashed`.

    Args:
        n_features: Length of a text's vector, where ``tokens`` is not given.
        tokens: A model of the Hugging Face hub, or a folder, whose tokenizer makes token ids of the texts, for the
            backbones bert and hf_text (extra transformers).
        max_length: Most tokens of a text; what is beyond them is cut off.
        data_dir: Folder of ``clinc150`` or ``text/clinc150``, with ``data_full.json`` and ``domains.json``.
        download: Fetch what is missing.
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
    """Questions to a bank, 10,003 + 3,080 texts, 77 intents of unequal size. Casanueva et al. (2020).

    Classes are numbered as in ``categories.json``. For the features see :func:`hashed`.

    Args:
        n_features: Length of a text's vector, where ``tokens`` is not given.
        tokens: A model of the Hugging Face hub, or a folder, whose tokenizer makes token ids of the texts, for the
            backbones bert and hf_text (extra transformers).
        max_length: Most tokens of a text; what is beyond them is cut off.
        data_dir: Folder of ``banking77`` or ``text/banking77``, with ``train.csv``, ``test.csv``,
            ``categories.json``.
        download: Fetch what is missing.
    """
    corpus = banking77_texts(data_dir=data_dir, download=download)
    return _source(corpus, n_features=n_features, tokens=tokens, max_length=max_length)


def clinc150_texts(*, data_dir: str = "data", download: bool = True) -> Corpus:
    """The texts of CLINC150; options as of :func:`clinc150`."""
    root = _downloaded("CLINC150", data_dir, CLINC150, download=download)
    texts, domains = _json(root / "data_full.json"), _json(root / "domains.json")
    try:
        names = [str(intent) for intents in domains.values() for intent in intents]
        train, test = ([(str(text), str(label)) for text, label in texts[part]] for part in ("train", "test"))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataError(f"{root / 'data_full.json'}: not laid out as published; delete {root} and run again") from None
    return _corpus("clinc150", train, test, names, where=root)


def banking77_texts(*, data_dir: str = "data", download: bool = True) -> Corpus:
    """The texts of Banking77; options as of :func:`banking77`."""
    root = _downloaded("Banking77", data_dir, BANKING77, download=download)
    names = _json(root / "categories.json")
    if not isinstance(names, list):
        raise DataError(f"{root / 'categories.json'}: no list of names; delete it and run again")
    train, test = (_csv(root / name) for name in ("train.csv", "test.csv"))
    return _corpus("banking77", train, test, [str(name) for name in names], where=root)


CORPORA: Mapping[str, Callable[..., Corpus]] = {"banking77": banking77_texts, "clinc150": clinc150_texts}
"""Data sets of texts by name: each is read with ``data_dir`` and ``download``."""


def hashed(texts: Sequence[str], *, n_features: int) -> Tensor:
    """texts_ND: counts of words and of pairs of neighbors, each hashed to one of D places, of length 1.

    Nothing is fitted: a vocabulary or word weights from all training texts would tell the first experience
    about the last one's. Weinberger et al., "Feature Hashing for Large Scale Multitask Learning" (2009).

    Raises:
        ConfigError: Fewer than one place.

    >>> hashed(["where is my card"], n_features=64).norm().item()
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
    strange = {label for _, label in train + test} - set(names)
    if strange:
        raise DataError(f"{where}: intent '{min(strange)}' is not listed; delete {where} and run again")
    return Corpus(name, tuple(train), tuple(test), tuple(names))


def _source(corpus: Corpus, *, n_features: int, tokens: str | None, max_length: int) -> Source:
    parts = (corpus.train, corpus.test)
    texts = [[text for text, _ in part] for part in parts]
    # A vector of length 1 is far shorter than a normalized image; to be learnt at the same rate it is
    # stretched to the length that as many normalized pixels would have.
    scale: tuple[float, ...] = (n_features**-0.5,) if n_features > 0 else (1.0,)
    if tokens is None:
        x = [hashed(part, n_features=n_features) for part in texts]
        train, test = (
            TensorSamples(x_ND, corpus.ids(part), std=scale) for x_ND, part in zip(x, parts, strict=True)
        )
    else:
        x = _tokens(texts, tokens, max_length=max_length)
        train, test = (
            TensorSamples(ids_NT, corpus.ids(part), mean=(), std=()) for ids_NT, part in zip(x, parts, strict=True)
        )
    return Source(corpus.name, train, test, classes=len(corpus.class_names), class_names=corpus.class_names)


def _tokens(parts: Sequence[Sequence[str]], name: str, *, max_length: int) -> list[Tensor]:
    """ids_NT of each part, all of one length: the longest text's, or ``max_length``."""
    tokenizer = load_tokenizer(name, where="benchmark.tokens")
    require_zero_padding(tokenizer, name=name, where="benchmark.tokens")
    try:
        rows = [token_ids(part, tokenizer, max_length=max_length) for part in parts]
    except ConfigError as error:
        raise ConfigError(f"benchmark.{error}") from None
    length = max(len(row) for part in rows for row in part)
    return [padded(part, length=length) for part in rows]


def _downloaded(title: str, data_dir: str, published: Sequence[Published], *, download: bool) -> Path:
    from torchvision.datasets.utils import download_url

    root, folder = Path(data_dir).expanduser(), Path(published[0].file).parent
    inside = root / "text"
    if all((inside / p.file).is_file() for p in published):
        return inside / folder

    def fetch(place: str) -> None:
        for p in published:
            download_url(p.url, str(Path(place) / folder), filename=Path(p.file).name, md5=p.md5)

    provide(title, root, wanted=[p.file for p in published], published=published, download=download, fetch=fetch)
    return root / folder


def _json(file: Path) -> Any:
    try:
        return json.loads(text_of(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: no whole JSON ({error}); delete it and run again") from None


def _csv(file: Path) -> list[Text]:
    rows = list(csv.DictReader(io.StringIO(text_of(file), newline="")))
    if not rows or not {"text", "category"} <= set(rows[0]) or any(None in row.values() for row in rows):
        raise DataError(f"{file}: not laid out as published (text,category); delete it and run again")
    return [(row["text"], row["category"]) for row in rows]
