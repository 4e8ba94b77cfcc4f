"""Published sets, fetched by torchvision's own code from a server on this machine, and the errors of incomplete or damaged ones."""

from __future__ import annotations

import errno
import gc
import gzip
import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import torchvision.datasets as tv
from PIL import Image

from clframe.data import SOURCES
from clframe.data.sources import published_folders, text
from clframe.data.sources.labels import PUBLISHED, measure_normalization
from clframe.data.sources.paths import PublishedFile
from clframe.errors import ConfigError, DataError

RANDOM = np.random.default_rng(0)


def md5(data):
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


class Server:
    """Serves ``files`` by path; ``asked`` counts requests."""

    def __init__(self):
        self.files, self.asked, self.cut = {}, 0, False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked += 1
                data = outer.files.get(self.path)
                if data is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if outer.cut else data)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def offer(self, path, data):
        self.files[f"/{path}"] = data
        return md5(data)

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    yield server
    server.close()


def archive(files, kind="zip"):
    """A zip or tar.gz of files by name."""
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as out:
            for name, data in files.items():
                out.writestr(name, data)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as out:
            for name, data in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                out.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def picture(size=(32, 32), mode="RGB", kind="PNG"):
    buffer = io.BytesIO()
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    image = Image.fromarray(RANDOM.integers(0, 256, shape, dtype=np.uint8))
    (image.point(lambda v: 255 * (v > 99)).convert("1") if mode == "1" else image).save(buffer, kind)
    return buffer.getvalue()


def idx(array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def offer_mnist(server, monkeypatch, kind="MNIST", classes=10):
    x = RANDOM.integers(0, 256, (3 * classes, 28, 28), dtype=np.uint8)
    y = np.arange(3 * classes) % classes
    parts = {"train-images-idx3": x[classes:], "train-labels-idx1": y[classes:],
             "t10k-images-idx3": x[:classes], "t10k-labels-idx1": y[:classes]}  # fmt: skip
    resources = []
    for name, array in parts.items():
        file = f"{name}-ubyte.gz"
        resources.append((file, server.offer(f"{kind}/{file}", gzip.compress(idx(array)))))
    monkeypatch.setattr(getattr(tv, kind), "resources", resources)
    monkeypatch.setattr(getattr(tv, kind), "mirrors", [f"{server.url}/{kind}/"])
    return (x[classes:], y[classes:]), (x[:classes], y[:classes])


def offer_emnist(server, monkeypatch, split="letters", first=1, classes=26):
    files, parts = {}, []
    for part, count in (("train", 2), ("test", 1)):
        x = RANDOM.integers(0, 256, (count * classes, 28, 28), dtype=np.uint8)
        y = np.arange(count * classes) % classes + first
        files[f"gzip/emnist-{split}-{part}-images-idx3-ubyte.gz"] = gzip.compress(idx(x))
        files[f"gzip/emnist-{split}-{part}-labels-idx1-ubyte.gz"] = gzip.compress(idx(y))
        parts.append((x.transpose(0, 2, 1), y - first))
    monkeypatch.setattr(tv.EMNIST, "md5", server.offer("gzip.zip", archive(files)))
    monkeypatch.setattr(tv.EMNIST, "url", f"{server.url}/gzip.zip")
    return parts


def offer_cifar(server, monkeypatch, kind="CIFAR100", classes=100):
    cls, parts, files, sums = getattr(tv, kind), [], {}, {}
    key = "fine_labels" if kind == "CIFAR100" else "labels"
    for lists in ("train_list", "test_list"):
        x, y = [], []
        for name, _ in getattr(cls, lists):
            data = RANDOM.integers(0, 256, (classes, 3072), dtype=np.uint8)
            labels = RANDOM.permutation(classes).tolist()
            files[f"{cls.base_folder}/{name}"] = pickle.dumps({"data": data, key: labels})
            x.append(data)
            y += labels
        sums[lists] = [[n, md5(files[f"{cls.base_folder}/{n}"])] for n, _ in getattr(cls, lists)]
        parts.append((np.concatenate(x).reshape(-1, 3, 32, 32), np.array(y)))
    meta = pickle.dumps({cls.meta["key"]: [f"class {c}" for c in range(classes)]})
    files[f"{cls.base_folder}/{cls.meta['filename']}"] = meta
    for name, value in {
        **sums, "meta": {**cls.meta, "md5": md5(meta)}, "url": f"{server.url}/{cls.filename}",
        "tgz_md5": server.offer(cls.filename, archive(files, "tar")),
    }.items():  # fmt: skip
        monkeypatch.setattr(cls, name, value)
    return parts


def offer_svhn(server, monkeypatch):
    from scipy.io import savemat

    parts, listed = [], {}
    for part, count in (("train", 20), ("test", 10)):
        x = RANDOM.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        y = np.arange(count) % 10
        buffer = io.BytesIO()
        savemat(buffer, {"X": x, "y": np.where(y == 0, 10, y)[:, None]})
        file = f"{part}_32x32.mat"
        listed[part] = [f"{server.url}/{file}", file, server.offer(file, buffer.getvalue())]
        parts.append((x.transpose(3, 2, 0, 1), y))
    monkeypatch.setattr(tv.SVHN, "split_list", listed)
    return parts


def offer_omniglot(server, monkeypatch):
    sums = {}
    for part, alphabets in (("images_background", ("Latin", "Greek")), ("images_evaluation", ("Atlantean",))):
        files = {
            f"{part}/{alphabet}/character{c:02d}/{c:04d}_{i:02d}.png": picture((105, 105), "1")
            for alphabet in alphabets for c in (1, 2) for i in range(4)
        }  # fmt: skip
        sums[part] = server.offer(f"{part}.zip", archive(files))
    monkeypatch.setattr(tv.Omniglot, "zips_md5", sums)
    monkeypatch.setattr(tv.Omniglot, "download_url_prefix", server.url)


def offer_tiny_imagenet(server, monkeypatch, change=None):
    names, root = ["n2", "n1"], "tiny-imagenet-200"
    files = {f"{root}/wnids.txt": b"n2\nn1\n"}
    for name in names:
        for i in range(3):
            mode = "L" if i == 2 else "RGB"  # some of the real images are gray
            files[f"{root}/train/{name}/images/{name}_{i}.JPEG"] = picture((64, 64), mode, "JPEG")
    for i in range(2):
        files[f"{root}/val/images/val_{i}.JPEG"] = picture((64, 64), kind="JPEG")
    lines = [f"val_{i}.JPEG\t{name}\t0\t0\t9\t9" for i, name in enumerate(["n1", "n2"])]
    files[f"{root}/val/val_annotations.txt"] = "\n".join(lines).encode()
    files = change(files) if change else files
    data = archive(files)
    published = PublishedFile("tiny-imagenet-200.zip", f"{server.url}/tiny.zip", server.offer("tiny.zip", data))
    monkeypatch.setattr(published_folders, "TINY_IMAGENET", published)
    return data


def offer_cub200(server, monkeypatch):
    root, files = "CUB_200_2011", {}
    tables = {"images": [], "image_class_labels": [], "train_test_split": []}
    for n in range(1, 9):
        c = (n - 1) // 4
        path = f"00{c + 1}.Bird_{c}/image_{n}.jpg"
        files[f"{root}/images/{path}"] = picture((20 + n, 18), kind="JPEG")
        for name, value in zip(tables, (path, c + 1, n % 2), strict=True):
            tables[name].append(f"{n} {value}")
    for name, lines in {**tables, "classes": ["1 001.Albatross", "2 002.Auklet"]}.items():
        files[f"{root}/{name}.txt"] = "\n".join(lines).encode()
    published = PublishedFile("CUB_200_2011.tgz", f"{server.url}/cub.tgz", server.offer("cub.tgz", archive(files, "tar")))
    monkeypatch.setattr(published_folders, "CUB_200_2011", published)


def offer_core50(server, monkeypatch, side=32):
    root, drawn = f"core50_{side}x{side}", picture((32, 32))
    files = {f"{root}/s{s}/o{o}/C_{s:02d}_{o:02d}_000.png": drawn for s in (1, 2, 3, 10) for o in range(1, 51)}
    files[f"{root}/s10/o7/C_10_07_000.png"] = picture((32, 32))
    published = PublishedFile(f"{root}.zip", f"{server.url}/{root}.zip", server.offer(f"{root}.zip", archive(files)))
    monkeypatch.setattr(published_folders, "CORE50", {side: published})


def offer_clinc150(server, monkeypatch):
    domains = {"bank": ["pay", "balance"], "home": ["alarm"]}
    said = {"pay": "pay my bill", "balance": "what is my balance", "alarm": "wake me at 6"}
    pairs = [[text, intent] for intent, text in said.items()]
    offered = {
        "data_full.json": json.dumps({"train": pairs * 2, "test": pairs, "val": pairs, "oos_test": [["?", "oos"]]}),
        "domains.json": json.dumps(domains),
    }
    monkeypatch.setattr(text, "CLINC150", offer_texts(server, "clinc150", offered))


def offer_banking77(server, monkeypatch):
    rows = 'text,category\n"Where is it, please?",card\nI want a refund,refund\n'
    offered = {"train.csv": rows, "test.csv": rows, "categories.json": '["refund", "card"]'}
    monkeypatch.setattr(text, "BANKING77", offer_texts(server, "banking77", offered))


def offer_texts(server, folder, files):
    return tuple(
        PublishedFile(f"{folder}/{name}", f"{server.url}/{folder}/{name}", server.offer(f"{folder}/{name}", data.encode()))
        for name, data in files.items()
    )


OFFERS = {
    "mnist": offer_mnist,
    "fashion_mnist": lambda s, m: offer_mnist(s, m, "FashionMNIST"),
    "kmnist": lambda s, m: offer_mnist(s, m, "KMNIST"),
    "emnist": lambda s, m: offer_emnist(s, m, "balanced", 0, 47),
    "svhn": offer_svhn,
    "cifar10": lambda s, m: offer_cifar(s, m, "CIFAR10", 10),
    "cifar100": offer_cifar,
    "omniglot": offer_omniglot,
    "tiny_imagenet": offer_tiny_imagenet,
    "cub200": offer_cub200,
    "core50": lambda s, m: offer_core50(s, m, 128),
    "clinc150": offer_clinc150,
    "banking77": offer_banking77,
}
"""Every source that downloads: how to offer a tiny set of its layout."""


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) if folder.exists() else None


@pytest.mark.parametrize("name", OFFERS)
def test_downloaded_once_then_used_as_it_is(server, monkeypatch, tmp_path, name, capfd):
    OFFERS[name](server, monkeypatch)
    where = tmp_path / "new" / "data"
    source = SOURCES.get(name)(data_dir=str(where))
    assert server.asked > 0 and "100%" in capfd.readouterr().err  # torchvision's progress bar
    assert not [entry for entry in listing(where) if ".download" in entry]
    asked, before = server.asked, listing(where)
    for options in ({}, {"download": False}):
        again = SOURCES.get(name)(data_dir=str(where), **options)
        assert torch.equal(again.train.x, source.train.x) and torch.equal(again.test.y, source.test.y)
    assert server.asked == asked and listing(where) == before
    assert len(source.class_names) == source.classes > 1
    assert len(source.train.mean) in (1, source.input_shape[0])


@pytest.mark.parametrize("name", OFFERS)
def test_without_a_network_one_line_and_nothing_left(server, monkeypatch, tmp_path, name):
    OFFERS[name](server, monkeypatch)
    server.close()  # the port refuses from here on
    where = tmp_path / "new" / "data"
    with pytest.raises(DataError) as error:
        SOURCES.get(name)(data_dir=str(where))
    message = str(error.value)
    assert message.startswith(f"{where}: holds no ") and " is missing) and http://127.0.0.1" in message
    assert "Connection refused" in message and message.endswith("go online, or put the files there")
    assert "\n" not in message and error.value.__cause__ is None and error.value.__suppress_context__
    assert listing(tmp_path) == []


@pytest.mark.parametrize("name", OFFERS)
def test_with_download_off_one_line_that_says_what_to_put_where(server, monkeypatch, tmp_path, name):
    OFFERS[name](server, monkeypatch)
    with pytest.raises(
        DataError, match=r"data: holds no .* is missing\) and download is off; set benchmark.download=true, or put http"
    ):
        SOURCES.get(name)(data_dir=str(tmp_path / "data"), download=False)
    assert listing(tmp_path) == [] and server.asked == 0


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # torchvision keeps the answers of its mirrors
@pytest.mark.parametrize("name", OFFERS)
def test_a_transfer_that_goes_wrong_leaves_nothing(server, monkeypatch, tmp_path, name):
    OFFERS[name](server, monkeypatch)
    (tmp_path / "mine.txt").write_text("keep me")
    offered = dict(server.files)
    for spoil in ("cut", "changed", "gone"):
        server.cut = spoil == "cut"
        server.files = {} if spoil == "gone" else offered
        if spoil == "changed":
            server.files = {path: data[:-1] + bytes([data[-1] ^ 1]) for path, data in offered.items()}
        with pytest.raises(DataError) as error:
            SOURCES.get(name)(data_dir=str(tmp_path))
        message = str(error.value)
        assert "http://127.0.0.1" in message and "\n" not in message, message
        assert ("HTTP Error 404" in message) == (spoil == "gone"), message
        assert listing(tmp_path) == ["mine.txt"]
    del error
    gc.collect()  # while the warning is ignored


ARCHIVED = sorted(set(OFFERS) - {"svhn", "clinc150", "banking77"})
"""Sources whose files come packed."""


def published_files(name, server, where):
    """Puts the archives of a set, as a browser would have fetched them, into ``where``."""
    kind = {"mnist": tv.MNIST, "fashion_mnist": tv.FashionMNIST, "kmnist": tv.KMNIST, "emnist": tv.EMNIST}.get(name)
    folder = {"omniglot": "omniglot-py"}.get(name, f"{kind.__name__}/raw" if kind else "")
    names = {"/tiny.zip": "tiny-imagenet-200.zip", "/cub.tgz": "CUB_200_2011.tgz"}
    files = []
    for path, data in server.files.items():
        file = where / folder / names.get(path, os.path.basename(path))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        files.append(file)
    return files


@pytest.mark.parametrize("name", ARCHIVED)
def test_archives_that_lie_there_are_unpacked_without_a_network(server, monkeypatch, tmp_path, name):
    OFFERS[name](server, monkeypatch)
    files = published_files(name, server, tmp_path)
    source = SOURCES.get(name)(data_dir=str(tmp_path), download=False)
    assert server.asked == 0 and len(source.train) > 0
    assert all(file.is_file() for file in files)  # not ours to remove
    assert not [entry for entry in listing(tmp_path) if ".download" in entry]


@pytest.mark.parametrize("name", ARCHIVED)
def test_a_damaged_archive_is_named_and_left_alone(server, monkeypatch, tmp_path, name):
    OFFERS[name](server, monkeypatch)
    files = published_files(name, server, tmp_path)
    files[-1].write_bytes(files[-1].read_bytes()[:-7])
    before = listing(tmp_path)
    for download in (True, False):
        with pytest.raises(DataError, match="its md5 is not .* delete it and run again") as error:
            SOURCES.get(name)(data_dir=str(tmp_path), download=download)
        assert str(error.value).startswith(f"{files[-1]}: ")
    assert listing(tmp_path) == before and server.asked == 0


def test_an_interrupted_download_leaves_nothing(server, monkeypatch, tmp_path):
    from torchvision.datasets import utils

    offer_cifar(server, monkeypatch)

    def interrupted(url, filename, *_):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(utils, "_urlretrieve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        SOURCES.get("cifar100")(data_dir=str(tmp_path / "a" / "b"))
    assert listing(tmp_path) == []


def test_a_full_disk_is_said_to_be_one(server, monkeypatch, tmp_path):
    from torchvision.datasets import utils

    offer_cifar(server, monkeypatch)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(utils, "_urlretrieve", full)
    with pytest.raises(DataError, match=r"data: cannot be written \(No space left on device\); check its permissions"):
        SOURCES.get("cifar100")(data_dir=str(tmp_path / "data"))
    assert listing(tmp_path) == []


def test_a_data_dir_that_is_a_file(server, monkeypatch, tmp_path):
    offer_cifar(server, monkeypatch)
    (tmp_path / "data").write_text("a file")
    for where in (tmp_path / "data", tmp_path / "data" / "below"):
        with pytest.raises(DataError, match="cannot be written"):
            SOURCES.get("cifar100")(data_dir=str(where))
    assert (tmp_path / "data").read_text() == "a file"


def test_two_runs_that_download_at_once_both_get_there(server, monkeypatch, tmp_path):
    offer_mnist(server, monkeypatch)
    offer_tiny_imagenet(server, monkeypatch)
    from clframe.data.sources.paths import _move

    for name in ("mnist", "tiny_imagenet"):
        one, other = tmp_path / name / "one", tmp_path / name / "other"
        for where in (one, other):
            SOURCES.get(name)(data_dir=str(where))
        before = listing(one)
        _move(other, one)  # as the slower of two processes does
        assert listing(one) == before
        SOURCES.get(name)(data_dir=str(one), download=False)


def test_an_archive_that_points_outside_writes_nothing_there(server, monkeypatch, tmp_path):
    offer_tiny_imagenet(server, monkeypatch, lambda files: {**files, "../../evil.txt": b"", "/tmp/evil.txt": b""})
    SOURCES.get("tiny_imagenet")(data_dir=str(tmp_path / "a" / "data"))
    assert listing(tmp_path / "a")[:2] == ["data", "data/evil.txt"] and not (tmp_path / "evil.txt").exists()
    assert [
        entry for entry in listing(tmp_path) if entry.endswith("evil.txt") and not entry.startswith("a/data/")
    ] == []


# --- content of the sources ---


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
