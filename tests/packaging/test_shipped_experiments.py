"""Shipped experiments build and run, on small files that replace downloads."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import clframe
from clframe.build import build
from clframe.config.files import known_configs
from clframe.config.load import load_config

SETS = {"mnist": (10, (28, 28)), "cifar10": (10, (32, 32, 3)), "cifar100": (100, (32, 32, 3))}
TEXT = "split_clinc150"
EXPERIMENTS = [name.split("/")[1] for name in known_configs("experiment") if name != f"experiment/{TEXT}"]


@pytest.fixture
def data_dir(tmp_path):
    """A folder of the sets as arrays, two training images and a test image of each class."""
    rng = np.random.default_rng(0)
    for name, (classes, shape) in SETS.items():
        y = np.arange(3 * classes) % classes
        x = rng.integers(0, 256, (len(y), *shape), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", x_train=x[classes:], y_train=y[classes:], x_test=x[:classes], y_test=y[:classes])
    return tmp_path


def test_there_is_one_of_each_kind():
    assert {"quickstart", "split_mnist", "split_cifar100"} <= set(EXPERIMENTS)
    assert f"experiment/{TEXT}" in known_configs()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_builds_from_files_that_are_there(name, data_dir):
    downloaded = load_config(name).benchmark.name in SETS
    overrides = [f"benchmark.data_dir={data_dir}", "benchmark.download=false"] if downloaded else []
    parts = build(load_config(name, overrides))
    assert parts.benchmark.input_shape == parts.network.input_shape
    assert len(parts.benchmark) * len(parts.benchmark.classes[0]) == len(parts.benchmark.class_order)


@pytest.fixture
def text_overrides(tmp_path):
    """A random BERT with a tokenizer in a folder, and CLINC150 with four intents of two words each."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(8))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=8, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path / "model")
    folder = tmp_path / "clinc150"
    folder.mkdir()
    texts = [[f"w{2 * c} w{2 * c + k % 2}", f"intent{c}"] for k in range(8) for c in range(4)]
    (folder / "data_full.json").write_text(json.dumps({"train": texts, "test": texts}))
    (folder / "domains.json").write_text(json.dumps({"all": [f"intent{c}" for c in range(4)]}))
    return [f"benchmark.tokens={tmp_path / 'model'}", f"benchmark.data_dir={tmp_path}", "benchmark.download=false",
            "benchmark.experiences=2", "components.er.memory=8", "trainer.progress=false"]  # fmt: skip


def test_fine_tuning_a_text_encoder_trains(text_overrides, tmp_path):
    config = load_config(TEXT, text_overrides)
    assert config.optimizer.name == "adamw" and 2e-5 <= config.optimizer.lr <= 5e-5 and config.trainer.epochs <= 5
    assert config.backbone.options["pretrained"] == config.benchmark.options["tokens"]
    # A random encoder of this size needs a higher rate and more steps than a pre-trained one.
    faster = ["optimizer.lr=0.01", "trainer.epochs=10", "trainer.batch_size=4"]
    result = clframe.run(TEXT, [*text_overrides, *faster], output=tmp_path / "runs")
    assert result.accuracy_matrix[0][0] >= 0.9 and result.accuracy_matrix[1][1] >= 0.9


@pytest.mark.parametrize("strategy", ["naive", "er", "joint"])
def test_split_mnist_runs(strategy, data_dir, tmp_path):
    result = clframe.run(
        "split_mnist",
        [f"benchmark.data_dir={data_dir}", "trainer.fast_dev_run=5", "trainer.progress=false", f"strategy={strategy}"],
        output=tmp_path / "runs",
    )
    assert len(result.accuracy_matrix) == 5 and result.benchmark == "mnist"


def test_split_cifar100_joins_a_memory_of_2000_to_augmented_images(data_dir):
    config = load_config("split_cifar100", [f"benchmark.data_dir={data_dir}"])
    parts = build(config)
    (er,) = parts.composition
    assert (er.memory, er.replay, config.trainer.channels_last) == (2000, "concatenate", True)
    assert [type(a).__name__ for a in parts.benchmark.train[9].augment] == ["PadCrop", "Flip"]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny_imagenet"])
def test_photographs_are_cropped_and_mirrored(name, tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text(f"defaults: [benchmark/{name}, backbone/resnet20]\n")
    assert load_config(str(file)).benchmark.augment == "cifar"
