"""Published sets, fetched by torchvision's own code from a server on this machine, and the errors of incomplete or damaged ones."""

from __future__ import annotations

import errno
import gc
import os

import pytest
import torch
import torchvision.datasets as tv
from published_sets import OFFERS, offer_cifar, offer_mnist, offer_tiny_imagenet

from clframe.data import SOURCES
from clframe.errors import DataError


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
