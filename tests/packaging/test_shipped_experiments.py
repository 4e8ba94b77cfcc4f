"""Shipped experiments build and run, on small files that replace downloads."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import clframe
from clframe.build import build
from clframe.config.files import known_configs
from clframe.config.load import load_config

SETS = {"mnist": (10, (28, 28)), "cifar10": (10, (32, 32, 3)), "cifar100": (100, (32, 32, 3))}
TEXT = "split_clinc150"
EXPERIMENTS = [name.split("/")[1] for name in known_configs("experiment")]
IN_MEMORY = [name for name in EXPERIMENTS if load_config(name).benchmark.name in ("digits", *SETS)]
SHORT = ["trainer.fast_dev_run=1", "trainer.batch_size=4", "trainer.eval_batch_size=16", "trainer.progress=false",
         "trainer.loggers=[]", "trainer.precision=32-true"]  # fmt: skip
TINY_VIT = ["backbone=vit_tiny", "backbone.patch=16", "backbone.width=16", "backbone.heads=2", "backbone.depth=12"]
CUT = {
    "auxiliary_classifiers": ["trainer.fast_dev_run=2", "backbone.width=4"],
    "auxiliary_classifiers_5": ["backbone.width=4"],
    # Its exits train after the backbone, which one epoch cannot hold.
    "zero_time_waste": ["trainer.fast_dev_run=false", "trainer.epochs=2", "backbone.width=4", "benchmark.classes=4",
                        "components.exits.fit_epochs=2"],
    "zero_time_waste_vit": [*TINY_VIT, "components.exits.fit_epochs=2"],
    "d2dmoe_vit": [*TINY_VIT, "backbone.depth=2", "components.moe.experts=4", "components.moe.epochs=1"],
    "d2dmoe_text": ["components.moe.experts=4", "components.moe.epochs=1", "benchmark.experiences=1"],
    "photographs": ["backbone.weights=null", "benchmark.experiences=2"],
    "language_model": ["backbone.width=16", "benchmark.vocabulary=290", "benchmark.context=8"],
}  # fmt: skip
"""Overrides that make an experiment short and small; its strategy is as shipped."""
RUN_ELSEWHERE = {"quickstart", "split_mnist", TEXT, "auxiliary_classifiers_5", "zero_time_waste_vit"}
"""Experiments that other tests of the default suite run, or that differ from another one in a number or the network."""
HEADS = {"auxiliary_classifiers": 7, "auxiliary_classifiers_5": 7, "zero_time_waste": 16, "zero_time_waste_vit": 11,
         "early_exits": 11}  # fmt: skip
"""Exits by experiment; all others have one."""


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
    assert set(CUT) | {"quickstart", "split_mnist", "split_cifar100", "online", "activation_sparsity", TEXT} <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_its_first_line_says_what_it_is_and_how_long_it_takes(name):
    path = known_configs("experiment")[f"experiment/{name}"]
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"# [A-Z][^;]+; [^;]*(\d s|minutes?|hour|day)s? [^;]+(; not measured\))?\.", first), first


@pytest.mark.parametrize("name", IN_MEMORY)
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


@pytest.fixture
def photographs(tmp_path):
    """Three images of each of four classes to train on and one to test, of 40x36 pixels."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1)):
        for c in range(4):
            folder = tmp_path / "photographs" / split / f"n{c:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "photographs"


@pytest.fixture
def texts(tmp_path):
    """Four domains of a few sentences."""
    for number, words in enumerate(("one fish two fish", "red fish blue fish", "x = x + 1", "for (;;) { i++; }")):
        for part, count in (("train", 40), ("test", 10)):
            (tmp_path / f"d{number}_{part}.txt").write_text(f"{words}, line {number}\n" * count, encoding="utf-8")
    return tmp_path


def local(name, request):
    """Overrides that replace an experiment's data, and pre-trained weights, by small ones without a download."""
    source = load_config(name).benchmark.name
    if source in SETS:
        return [f"benchmark.data_dir={request.getfixturevalue('data_dir')}", "benchmark.download=false"]
    if source == "clinc150":
        return request.getfixturevalue("text_overrides")
    if source == "digits":
        return []
    if source == "language_model":
        return [f"benchmark.path={request.getfixturevalue('texts')}"]
    folder = request.getfixturevalue("photographs")
    key = "path" if source == "image_folder" else "data_dir"
    held_out = "benchmark.validation=0.34" if load_config(name).benchmark.validation else "benchmark.validation=0"
    return [f"benchmark.{key}={folder}", "benchmark.size=32", held_out]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in RUN_ELSEWHERE)) for name in EXPERIMENTS]
)
def test_it_runs_cut_short(name, request, tmp_path):
    shipped = load_config(name)
    overrides = [key for key in local(name, request) if "components.er." not in key or "er" in shipped.components]
    result = clframe.run(name, [*overrides, *SHORT, *CUT.get(name, [])], output=tmp_path / "runs")
    assert sorted(result.strategy.split(" + ")) == sorted(shipped.strategy.split(" + "))
    assert len(result.exit_names) == HEADS.get(name, 1)
    assert len(result.accuracy_matrix) == (2 if name == "auxiliary_classifiers" else 1)
    assert result.steps > 0 and 0 <= result.final_average_accuracy <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero_time_waste_vit", "d2dmoe_vit"])
def test_the_shipped_transformer_takes_the_placement_and_the_experts(name, request, tmp_path):
    overrides = [*local(name, request), *SHORT, "trainer.batch_size=2", "backbone.weights=null"]
    result = clframe.run(name, overrides, output=tmp_path / "runs")
    assert result.parameters > 85_000_000 and len(result.exit_names) == HEADS.get(name, 1)


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
