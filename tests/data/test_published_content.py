"""Content of published sets: images, labels and splits are those of their files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from PIL import Image
from published_sets import (
    RANDOM,
    idx,
    offer_banking77,
    offer_cifar,
    offer_clinc150,
    offer_core50,
    offer_cub200,
    offer_emnist,
    offer_mnist,
    offer_omniglot,
    offer_svhn,
    offer_tiny_imagenet,
)

from clframe.data import SOURCES
from clframe.data.sources import text
from clframe.data.sources.labels import PUBLISHED, measure_normalization
from clframe.errors import ConfigError, DataError


def same(samples, part):
    x, y = part
    return np.array_equal(samples.x.numpy().reshape(x.shape), x) and samples.y.tolist() == list(y)


@pytest.mark.parametrize("name, kind", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_idx_sets(server, monkeypatch, tmp_path, name, kind):
    train, test = offer_mnist(server, monkeypatch, kind)
    source = SOURCES.get(name)(data_dir=str(tmp_path))
    assert same(source.train, train) and same(source.test, test) and source.input_shape == (1, 28, 28)
    assert source.train.y.dtype == torch.int64 and source.train.x.dtype == torch.uint8
    assert (source.train.mean, source.train.std) == PUBLISHED[name]
    raw = tmp_path / kind / "raw"
    whole = (raw / "train-images-idx3-ubyte").read_bytes()
    for data, said in (
        (whole[:-1], r"15,695 bytes where its header declares 15,696"),
        (b"", "0 bytes and no idx header"),
        (b"PK\x03\x04" + whole[4:], "and no idx header"),
    ):
        (raw / "train-images-idx3-ubyte").write_bytes(data)
        with pytest.raises(DataError, match=rf"train-images-idx3-ubyte: {said}|{said}; delete it and run again"):
            SOURCES.get(name)(data_dir=str(tmp_path))
    (raw / "train-images-idx3-ubyte").write_bytes(idx(train[0][1:]))
    with pytest.raises(DataError, match="train-images-idx3-ubyte: has 19 images for 20 labels"):
        SOURCES.get(name)(data_dir=str(tmp_path))


def test_labels_out_of_range_in_a_published_file(server, monkeypatch, tmp_path):
    offer_mnist(server, monkeypatch, classes=12)
    with pytest.raises(DataError, match="mnist/train: found labels from 0 to 11 for 10 classes"):
        SOURCES.get("mnist")(data_dir=str(tmp_path))


@pytest.mark.parametrize("split, first, classes", [("letters", 1, 26), ("balanced", 0, 47), ("digits", 0, 10)])
def test_emnist_is_upright_and_counts_from_zero(server, monkeypatch, tmp_path, split, first, classes):
    train, test = offer_emnist(server, monkeypatch, split, first, classes)
    source = SOURCES.get("emnist")(data_dir=str(tmp_path), split=split)
    assert same(source.train, train) and same(source.test, test)
    assert source.name == f"emnist_{split}" and source.classes == classes
    assert (source.train.mean, source.train.std) == measure_normalization(source.train.x)
    assert source.class_names[0] == ("a" if split == "letters" else "0")
    with pytest.raises(DataError, match="emnist-mnist-train-images-idx3-ubyte is missing"):
        SOURCES.get("emnist")(data_dir=str(tmp_path), split="mnist", download=False)


@pytest.mark.parametrize("name, kind, classes", [("cifar10", "CIFAR10", 10), ("cifar100", "CIFAR100", 100)])
def test_cifar(server, monkeypatch, tmp_path, name, kind, classes):
    train, test = offer_cifar(server, monkeypatch, kind, classes)
    source = SOURCES.get(name)(data_dir=str(tmp_path))
    assert same(source.train, train) and same(source.test, test) and source.input_shape == (3, 32, 32)
    assert source.train.x.is_contiguous() and source.class_names[1] == "class 1"
    assert (source.train.mean, source.train.std) == PUBLISHED[name]
    file = tmp_path / getattr(tv, kind).base_folder / getattr(tv, kind).train_list[0][0]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=rf"{file.name}: its md5 is not .*; delete it and run again"):
        SOURCES.get(name)(data_dir=str(tmp_path))


def test_svhn(server, monkeypatch, tmp_path):
    train, test = offer_svhn(server, monkeypatch)
    source = SOURCES.get("svhn")(data_dir=str(tmp_path))
    assert same(source.train, train) and same(source.test, test) and source.input_shape == (3, 32, 32)
    assert (source.train.mean, source.train.std) == PUBLISHED["svhn"]
    file = tmp_path / "test_32x32.mat"
    file.write_bytes(file.read_bytes() + b"0")
    with pytest.raises(DataError, match=r"test_32x32\.mat: its md5 is not"):
        SOURCES.get("svhn")(data_dir=str(tmp_path))


def test_omniglot(server, monkeypatch, tmp_path):
    offer_omniglot(server, monkeypatch)
    source = SOURCES.get("omniglot")(data_dir=str(tmp_path))
    assert source.class_names == tuple(
        f"{alphabet}/character{c:02d}" for alphabet in ("Greek", "Latin", "Atlantean") for c in (1, 2)
    )
    assert torch.bincount(source.train.y).tolist() == [3] * 6 and torch.bincount(source.test.y).tolist() == [1] * 6
    assert (source.train.mean, source.train.std) == measure_normalization(source.train.x)
    whole = SOURCES.get("omniglot")(data_dir=str(tmp_path), size=105)
    drawn = tmp_path / "omniglot-py" / "images_background" / "Greek" / "character01"
    ink = set()
    for file in drawn.iterdir():
        with Image.open(file) as image:
            ink.add((255 - np.array(image.convert("L"))).tobytes())
    assert {whole.train.x[i].numpy().tobytes() for i in range(3)} < ink and len(ink) == 4
    assert source.input_shape == (1, 28, 28) and whole.input_shape == (1, 105, 105)
    quarter = SOURCES.get("omniglot")(data_dir=str(tmp_path), size=35)  # boxes of 3x3
    boxes = whole.train.x.double().reshape(-1, 1, 35, 3, 35, 3).mean((3, 5))
    assert float((quarter.train.x - boxes).abs().max()) <= 0.5
    with pytest.raises(ConfigError, match="benchmark.size: found 0; give 1 to 105 pixels"):
        SOURCES.get("omniglot")(data_dir=str(tmp_path), size=0)


def test_tiny_imagenet(server, monkeypatch, tmp_path):
    offer_tiny_imagenet(server, monkeypatch)
    source = SOURCES.get("tiny_imagenet")(data_dir=str(tmp_path))
    assert source.class_names == ("n2", "n1") and source.input_shape == (3, 64, 64)
    assert source.train.y.tolist() == [0, 0, 0, 1, 1, 1] and source.test.y.tolist() == [1, 0]
    root = tmp_path / "tiny-imagenet-200"
    with Image.open(root / "val" / "images" / "val_0.JPEG") as image:
        assert torch.equal(source.test.x[0], torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert (source.train.mean, source.train.std) == PUBLISHED["tiny_imagenet"]
    assert SOURCES.get("tiny_imagenet")(data_dir=str(tmp_path), size=32).input_shape == (3, 32, 32)
    (root / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(DataError, match=r"val_1\.JPEG: no such file"):
        SOURCES.get("tiny_imagenet")(data_dir=str(tmp_path))
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn1\nval_0.JPEG n1\n")
    with pytest.raises(DataError, match=r"val_annotations\.txt: line 2 has no known class; delete .*200 and run again"):
        SOURCES.get("tiny_imagenet")(data_dir=str(tmp_path))
    for file in (root / "train" / "n1" / "images").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="train/n1: holds no images"):
        SOURCES.get("tiny_imagenet")(data_dir=str(tmp_path))
    (root / "wnids.txt").unlink()
    with pytest.raises(DataError, match=r"wnids\.txt: cannot be read \(No such file or directory\)"):
        SOURCES.get("tiny_imagenet")(data_dir=str(tmp_path))


def test_cub200(server, monkeypatch, tmp_path):
    offer_cub200(server, monkeypatch)
    source = SOURCES.get("cub200")(data_dir=str(tmp_path), size=16)
    assert source.class_names == ("Albatross", "Auklet") and source.input_shape == (3, 16, 16)
    assert source.train.y.tolist() == [0, 0, 1, 1] and source.test.y.tolist() == [0, 0, 1, 1]
    assert (source.train.mean, source.train.std) == measure_normalization(source.train.x)
    root = tmp_path / "CUB_200_2011"
    with (root / "image_class_labels.txt").open("a") as file:
        file.write("\n9 1")
    with pytest.raises(DataError, match=r"image_class_labels\.txt: 9 lines do not match those of images\.txt"):
        SOURCES.get("cub200")(data_dir=str(tmp_path), size=16)
    (root / "image_class_labels.txt").write_text("\n".join(f"{n} 3" for n in range(1, 9)))
    with pytest.raises(DataError, match=r"image_class_labels\.txt: class 3 is not in classes\.txt"):
        SOURCES.get("cub200")(data_dir=str(tmp_path), size=16)
    (root / "train_test_split.txt").write_text("1 1\n2\n")
    with pytest.raises(DataError, match=r"train_test_split\.txt: line 2 is not a number and a value"):
        SOURCES.get("cub200")(data_dir=str(tmp_path), size=16)


def test_core50(server, monkeypatch, tmp_path):
    offer_core50(server, monkeypatch)
    core50 = SOURCES.get("core50")
    source = core50(data_dir=str(tmp_path), size=32)
    assert source.classes == 50 and len(source.train) == len(source.test) == 100  # sessions 1 and 2; 3 and 10
    assert source.class_names[:6] == (*(f"plug_adapter_{i}" for i in range(1, 6)), "mobile_phone_1")
    with Image.open(tmp_path / "core50_32x32" / "s10" / "o7" / "C_10_07_000.png") as image:
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    at = [i for i, x in enumerate(source.test.x) if torch.equal(x, expected)]
    assert source.test.y[at].tolist() == [6]
    categories = core50(data_dir=str(tmp_path), size=16, labels="category")
    assert categories.classes == 10 and categories.input_shape == (3, 16, 16)
    assert torch.bincount(categories.train.y).tolist() == [10] * 10
    (tmp_path / "core50_32x32" / "s1" / "o51").mkdir()
    with pytest.raises(DataError, match="s1/o51: is not one of o1 to o50; remove it"):
        core50(data_dir=str(tmp_path), size=32)


def test_clinc150(server, monkeypatch, tmp_path):
    offer_clinc150(server, monkeypatch)
    source = SOURCES.get("clinc150")(data_dir=str(tmp_path), n_features=64)
    assert source.class_names == ("pay", "balance", "alarm")  # domain by domain; nothing out of scope
    assert source.train.y.tolist() == [0, 1, 2] * 2 and source.test.y.tolist() == [0, 1, 2]
    assert source.input_shape == (64,) and source.train.x.dtype == torch.float32
    assert source.train.x.norm(dim=1).tolist() == pytest.approx([1] * 6)
    # Prepared, a text has the length of 64 normalized pixels.
    assert source.train.prepare(source.train.x).norm(dim=1).tolist() == pytest.approx([8] * 6)
    with pytest.raises(ConfigError, match="benchmark.n_features: found 0; give at least 1"):
        SOURCES.get("clinc150")(data_dir=str(tmp_path), n_features=0)
    file = tmp_path / "clinc150" / "data_full.json"
    whole = file.read_text()
    for spoilt, said in (
        (whole[:50], "is not valid JSON"),
        ("[]", "is not in the published format"),
        (whole.replace('"alarm"', '"alarms"'), "intent 'alarms' is not listed"),
    ):
        file.write_text(spoilt)
        with pytest.raises(DataError, match=f"clinc150.*{said}.*run again"):
            SOURCES.get("clinc150")(data_dir=str(tmp_path))


def test_banking77(server, monkeypatch, tmp_path):
    offer_banking77(server, monkeypatch)
    source = SOURCES.get("banking77")(data_dir=str(tmp_path))
    assert source.class_names == ("refund", "card") and source.train.y.tolist() == [1, 0]
    assert source.input_shape == (2048,)
    (tmp_path / "banking77" / "test.csv").write_text("text;category\na;b\n")
    with pytest.raises(DataError, match=r"test\.csv: is not in the published format \(text,category\)"):
        SOURCES.get("banking77")(data_dir=str(tmp_path))


def test_hashing_knows_words_and_their_neighbors_and_nothing_else():
    one, same_words, other = text.hash_features(["lost my card", "card, my LOST!", "lost my card"], n_features=4096)
    assert torch.equal(one, other) and int((one != 0).sum()) == 5  # three words and two pairs
    assert not torch.equal(one, same_words) and float(one @ same_words) == pytest.approx(3 / 5)
    alone = text.hash_features(["lost my card"], n_features=4096)[0]
    assert torch.equal(alone, one)  # the other texts have no part in it
    assert text.hash_features(["", "?"], n_features=8).tolist() == [[0.0] * 8] * 2


def test_a_set_as_arrays_does_for_the_published_files(tmp_path):
    x = RANDOM.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    y = np.arange(100)
    names = np.array([f"thing {c}" for c in range(100)])
    np.savez(tmp_path / "cifar100.npz", train_x=x, train_y=y, test_x=255 - x, test_y=y, classes=names)
    source = SOURCES.get("cifar100")(data_dir=str(tmp_path), download=False)
    assert np.array_equal(source.train.x.numpy(), x.transpose(0, 3, 1, 2))
    assert (source.train.mean, source.train.std) == PUBLISHED["cifar100"]
    assert source.name == "cifar100" and source.class_names == tuple(names)
