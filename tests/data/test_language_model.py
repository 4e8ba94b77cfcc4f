"""Running text as a stream of domains: windows, the tokenizer, and files that cannot be used."""

from __future__ import annotations

import lzma

import pytest
import torch

from clframe.data import SOURCES
from clframe.data.benchmark import class_incremental
from clframe.data.sources.language import read_domain, windows_of
from clframe.data.tokenizer import TextTokenizer, train_tokenizer
from clframe.errors import ConfigError, DataError
from clframe.functional.language import strided_windows

WORDS = ("the quick brown fox jumps over the lazy dog\n", "def area(radius):\n    return 3.14 * radius ** 2\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts")
    for name, words in zip(("prose", "code"), WORDS, strict=True):
        (path / f"{name}_train.txt").write_text(words * 30, encoding="utf-8")
        with lzma.open(path / f"{name}_test.txt.xz", "wt", encoding="utf-8") as file:
            file.write(words * 8)
    return path


def load(folder, **options):
    return SOURCES.get("language_model")(path=str(folder), **{"context": 10, "vocabulary": 280, **options})


def test_a_domain_is_a_class_and_an_experience_in_the_given_order(folder):
    source = load(folder, domains=("prose", "code"))
    stream = class_incremental(source, experiences=2, order="sorted")
    assert stream.classes == ((0,), (1,)) and [stream.title(e) for e in range(2)] == ["prose", "code"]
    tokenizer = TextTokenizer(stream.tokenizer)
    assert stream.vocabulary == len(tokenizer) == 280 and stream.input_shape == (11,)
    for experience, words in enumerate(WORDS):
        text = words * 30
        ids = tokenizer.encode(text)
        samples = stream.train[experience]
        assert len(samples) == (len(ids) - 1) // 10  # a rest shorter than a window is left out
        windows = samples.prepare(samples.raw(torch.arange(len(samples))))
        assert windows.dtype == torch.int64
        joined = torch.cat([windows[:1, 0], windows[:, 1:].flatten()])  # each token is predicted once
        assert torch.equal(joined.int(), ids[: len(joined)])
        assert text.startswith(tokenizer.decode(joined))


def test_windows_are_those_of_the_definition():
    for tokens in (1, 4, 5, 9, 12):
        found = windows_of(torch.arange(tokens), context=4)
        whole = [w for w in strided_windows(tokens, window=5, stride=4) if w.stop - w.start == 5] if tokens > 1 else []
        assert found[:, 0].tolist() == [window.start for window in whole]
        assert all(row.tolist() == list(range(w.start, w.stop)) for row, w in zip(found, whole, strict=True))


def test_texts_survive_encoding_and_training_is_deterministic():
    content = train_tokenizer(WORDS, vocabulary=270)
    assert content == train_tokenizer(WORDS, vocabulary=270)
    tokenizer = TextTokenizer(content)
    for text in (*WORDS, "", "\n\n", "a\r\nb\tc  d ", "naïve 日本語 \U0001f600", "\x00\x0c\x1c\u2028end"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) == 0 or int(ids.max()) < 270


def test_a_given_tokenizer_is_used_and_must_have_the_vocabulary(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_text(train_tokenizer(WORDS[:1], vocabulary=264), encoding="utf-8")
    assert load(folder, tokenizer=str(tmp_path), vocabulary=264).tokenizer == (tmp_path / "tokenizer.json").read_text()
    with pytest.raises(ConfigError, match="found 280, but .* has 264 ids; give that number"):
        load(folder, tokenizer=str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer"):
        load(folder, tokenizer=str(tmp_path))
    with pytest.raises(DataError, match="could not be read"):
        load(folder, tokenizer=str(tmp_path / "none"))


def test_the_tokenizer_of_the_first_domain_differs(folder):
    domains = ("prose", "code")
    first = load(folder, domains=domains, tokenizer_text="first", vocabulary=265).tokenizer
    assert first == train_tokenizer([WORDS[0] * 30], vocabulary=265)
    assert first != load(folder, domains=domains, vocabulary=265).tokenizer


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"vocabulary": 256}, ConfigError, "benchmark.vocabulary: found 256; give more than 256"),
        ({"vocabulary": 5000}, ConfigError, "benchmark.vocabulary: found 5000, but the texts have pairs for"),
        ({"context": 0}, ConfigError, "benchmark.context: found 0; give at least 1"),
        ({"characters": -1}, ConfigError, "benchmark.characters: found -1; give at least 0"),
        ({"context": 1000}, DataError, "has .* tokens, fewer than a window of 1001; lower benchmark.context"),
        ({"domains": ("prose", "prose")}, ConfigError, "name each domain once"),
        ({"domains": ("prose", "cod")}, DataError, "did you mean 'code'"),
    ],
)
def test_what_cannot_be_used_is_refused(folder, options, error, message):
    with pytest.raises(error, match=message):
        load(folder, **options)


def test_files_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(DataError, match="has no NAME_train.txt"):
        load(tmp_path)
    (tmp_path / "a_train.txt").write_text("")
    with pytest.raises(DataError, match="a_test.txt: no such file"):
        load(tmp_path)
    (tmp_path / "a_test.txt").write_text("b")
    with pytest.raises(DataError, match="a_train.txt: is empty; give a text"):
        load(tmp_path)
    (tmp_path / "a_train.txt").write_bytes(b"caf\xe9 noir")
    with pytest.raises(DataError, match="byte 3 is not UTF-8"):
        load(tmp_path)
    (tmp_path / "a_train.txt.xz").write_bytes(b"not xz")
    (tmp_path / "a_train.txt").unlink()
    with pytest.raises(DataError, match="a_train.txt.xz: could not be read"):
        load(tmp_path)


def test_the_cache_gives_the_same_samples_without_encoding(folder, tmp_path, monkeypatch):
    plain, first = load(folder), load(folder, cache=str(tmp_path / "c"))
    monkeypatch.setattr(TextTokenizer, "encode", None)
    again = load(folder, cache=str(tmp_path / "c"))
    for source in (first, again):
        assert source.tokenizer == plain.tokenizer
        assert torch.equal(source.train.x, plain.train.x) and torch.equal(source.test.x, plain.test.x)
    next((tmp_path / "c").glob("*.npy")).write_bytes(b"")
    with pytest.raises(DataError, match="is damaged; delete it"):
        load(folder, cache=str(tmp_path / "c"))


def test_a_limit_counts_characters_not_bytes(tmp_path):
    file = tmp_path / "x.txt"
    file.write_text("äöü\U0001f600" * 10, encoding="utf-8")
    assert read_domain(file, characters=5) == "äöü\U0001f600ä"
    assert read_domain(file, characters=1000) == read_domain(file)
