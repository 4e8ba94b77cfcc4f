"""Runs, a text encoder, a language model and a few texts, all tiny, all made here."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

INTENTS = {"pay": ["pay my bill", "pay the rent now"], "card": ["lost my card", "where is my card"],
           "alarm": ["wake me up", "set the alarm now please"]}
WORDS = sorted({word for texts in INTENTS.values() for text in texts for word in text.split()})
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SMALL_VIT = ("backbone=vit_tiny", "backbone.width=12", "backbone.heads=2", "backbone.depth=2", "trainer.progress=false",
             "trainer.epochs=1", "benchmark.experiences=2", "benchmark.classes=4", "trainer.loggers=[csv]")  # fmt: skip


def make_tokenizer(folder, *, padding=True):
    """A tokenizer of whole words; without padding of its own, id 0 is a word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *WORDS] if padding else [*WORDS, "[UNK]", "[CLS]", "[SEP]"]
    made = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", words.index("[CLS]")), ("[SEP]", words.index("[SEP]"))]
    )
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    if padding:
        names["pad_token"] = "[PAD]"
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    return {word: at for at, word in enumerate(words)}


def make_texts(root):
    """CLINC150's layout with three intents: two training texts and one test text each."""
    folder = root / "text" / "clinc150"
    folder.mkdir(parents=True)
    train = [[text, intent] for intent, texts in INTENTS.items() for text in texts]
    test = [[texts[1], intent] for intent, texts in INTENTS.items()]
    (folder / "data_full.json").write_text(json.dumps({"train": train, "test": test}))
    (folder / "domains.json").write_text(json.dumps({"all": list(INTENTS)}))
    return root


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    return make_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A BERT of two layers with its tokenizer."""
    library = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("encoder")
    words = make_tokenizer(folder)
    torch.manual_seed(3)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    library.BertModel(library.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A gated causal language model of two layers."""
    library = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llama")
    words = make_tokenizer(folder)
    torch.manual_seed(3)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    ids = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = library.LlamaConfig(vocab_size=len(words), **sizes, **ids)
    library.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run of two experiences that holds validation data out."""
    from clframe import run

    words = ["benchmark.experiences=2", "backbone=mlp", "backbone.width=8", "trainer.epochs=1", "trainer.progress=false",
             "benchmark.validation=0.1", "strategy=er", "trainer.loggers=[]"]
    return run("quickstart", words, output=tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def vit_run(tmp_path_factory):
    """er + exits on a small transformer, with validation data."""
    from clframe import run

    strategy = ("strategy=er + exits", "benchmark.validation=0.1", "components.exits={at: [encoder.0]}")
    return Path(run("quickstart", [*SMALL_VIT, *strategy], output=tmp_path_factory.mktemp("runs")).run_folder)


@pytest.fixture(scope="session")
def plain_vit_run(tmp_path_factory):
    """naive, with neither memory nor validation data."""
    from clframe import run

    return Path(run("quickstart", [*SMALL_VIT, "strategy=naive"], output=tmp_path_factory.mktemp("bare")).run_folder)
