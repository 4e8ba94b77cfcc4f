"""Tiny sets in the layouts of published ones, offered by a server on this machine."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import struct
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torchvision.datasets as tv
from PIL import Image

from clframe.data.sources import published_folders, text
from clframe.data.sources.paths import PublishedFile

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
