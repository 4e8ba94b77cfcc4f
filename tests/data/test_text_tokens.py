"""Texts as token ids: the tokenizer's own, padded with 0, and never anything but whole numbers."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from clframe.data import SOURCES, class_incremental
from clframe.data.epoch_loader import EpochLoader
from clframe.data.samples import TensorSamples
from clframe.data.sources.text import pad_ids
from clframe.errors import ConfigError, DataError, UnsupportedError

pytest.importorskip("transformers")

WORDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "pay": 4, "my": 5, "bill": 6, "lost": 7, "card": 8}


def make_tokenizer(folder, *, pad="[PAD]"):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordLevel(WORDS, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {} if pad is None else {"pad_token": pad}
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", **names).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "text" / "clinc150"
    folder.mkdir(parents=True)
    train = [["pay my bill", "pay"], ["lost my new card", "card"], ["pay", "pay"], ["card", "card"]]
    (folder / "data_full.json").write_text(json.dumps({"train": train, "test": [["my bill", "pay"], ["lost", "card"]]}))
    (folder / "domains.json").write_text(json.dumps({"bank": ["pay", "card"]}))
    return str(tmp_path)


@pytest.fixture
def source(data, tmp_path):
    return SOURCES.get("clinc150")(data_dir=data, tokens=make_tokenizer(tmp_path / "words"))


TRAIN = [[2, 4, 5, 6, 3, 0], [2, 7, 5, 1, 8, 3], [2, 4, 3, 0, 0, 0], [2, 8, 3, 0, 0, 0]]


def test_ids_are_the_tokenizers_and_padding_is_zero(source):
    assert source.train.x.tolist() == TRAIN and source.train.y.tolist() == [0, 1, 0, 1]
    assert source.test.x.tolist() == [[2, 5, 6, 3, 0, 0], [2, 7, 3, 0, 0, 0]]
    assert source.input_shape == (6,) and source.train.x.dtype == torch.int32 and source.class_names == ("pay", "card")


def test_batches_are_whole_numbers_of_their_own(source):
    for samples in (source.train, source.train.to("cpu")):
        for raw in (samples.x, samples.x.long(), samples.x.float()):
            ids = samples.prepare(raw)
            assert ids.dtype == torch.int64 and ids.tolist() == TRAIN
            ids.zero_()
            assert raw.tolist() == TRAIN
    seen = [x for x, _ in EpochLoader(source.train, 3, shuffle=True, seed=1)]
    assert all(x.dtype == torch.int64 for x in seen) and sorted(torch.cat(seen).tolist()) == sorted(TRAIN)


def test_experiences_validation_and_memory_keep_ids(source):
    benchmark = class_incremental(source, experiences=2, order="sorted", validation=0.5)
    assert [len(part) for part in (*benchmark.train, *benchmark.validation, *benchmark.test)] == [1] * 6
    kept = benchmark.train[0].raw(torch.tensor([0]))
    both = benchmark.train[1].with_stored(kept, torch.tensor([0]))
    (batch,) = both.batches(None, 4)
    assert kept.dtype == torch.int32 and both.x.dtype == torch.int32 and batch[0].dtype == torch.int64
    assert all(row in TRAIN for row in batch[0].tolist()) and batch[1].tolist() == [1, 0]


def test_long_texts_are_cut(data, tmp_path):
    folder = make_tokenizer(tmp_path / "words")
    source = SOURCES.get("clinc150")(data_dir=data, tokens=folder, max_length=4)
    assert source.train.x.tolist() == [[2, 4, 5, 3], [2, 7, 5, 3], [2, 4, 3, 0], [2, 8, 3, 0]]
    with pytest.raises(ConfigError, match=r"^benchmark.max_length: found 2; give at least 3, special tokens included"):
        SOURCES.get("clinc150")(data_dir=data, tokens=folder, max_length=2)


def test_a_float_sample_is_normalized_as_before():
    samples = TensorSamples(torch.tensor([[1.0, 3.0]]), torch.tensor([0]), mean=(1.0,), std=(2.0,))
    assert samples.prepare(samples.x).tolist() == [[0, 1]]


@pytest.mark.parametrize("pad, said", [("pay", "pads with id 4"), (None, "has no padding token")])
def test_padding_must_be_zero(data, tmp_path, pad, said):
    with pytest.raises(ConfigError, match=f"benchmark.tokens: .*{said}; use a tokenizer that pads with id 0"):
        SOURCES.get("clinc150")(data_dir=data, tokens=make_tokenizer(tmp_path / "other", pad=pad))


def test_no_tokenizer(data, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="benchmark.tokens: the tokenizer of .*empty could not be loaded"):
        SOURCES.get("clinc150")(data_dir=data, tokens=str(tmp_path / "empty"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedError, match=r"benchmark.tokens: found no package transformers; pip install clframe\[tr"):
        SOURCES.get("clinc150")(data_dir=data, tokens="anything")


def test_padded():
    assert pad_ids([[5], []], length=2, padding=9).tolist() == [[5, 9], [9, 9]]
    assert pad_ids([]).shape == (0, 0)
