"""The cache of decoded images: the same pixels, written again when a file changes, safe and atomic."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clframe.data import SOURCES, ImageFiles
from clframe.data.lazy import DatasetSamples
from clframe.data.sources import image_files
from clframe.errors import ConfigError, DataError
from clframe.options import check_options

image_folder, csv = SOURCES.get("image_folder"), SOURCES.get("csv")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """train/ and test/ with two classes of images of several sizes and formats."""
    root, draw = tmp_path / "photographs", np.random.default_rng(0)
    for part, count in (("train", 5), ("test", 3)):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (7 + i, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}{('.png', '.jpg')[i % 2]}", quality=90)
    return root


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are decoded, in order."""
    found: list[str] = []
    read = ImageFiles.__getitem__
    monkeypatch.setattr(ImageFiles, "__getitem__", lambda self, i: (found.append(self.paths[i]), read(self, i))[1])
    return found


def _caches(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("memory_gb", [4.0, 0.0], ids=["in memory", "batch by batch"])
def test_cached_images_are_the_images_bit_for_bit(photographs, tmp_path, decoded, memory_gb):
    options = {"path": str(photographs), "size": 6, "memory_gb": memory_gb}
    plain = image_folder(**options)
    decoded.clear()
    for decodings in (16, 0):  # written, then read
        cached = image_folder(**options, cache=str(tmp_path / "cache"))
        assert len(decoded) == decodings
        assert isinstance(cached.train, DatasetSamples) == (memory_gb == 0)
        for part, other in ((plain.train, cached.train), (plain.test, cached.test)):
            everything = torch.arange(len(part))
            assert torch.equal(part.raw(everything), other.raw(everything)) and torch.equal(part.y, other.y)
            assert (part.mean, part.std) == (other.mean, other.std)
            x, _ = next(other.batches(everything.flip(0), 4))
            assert torch.equal(x, next(part.batches(everything.flip(0), 4))[0])
        decoded.clear()
    assert plain.inputs == cached.inputs and plain.class_names == cached.class_names
    assert len(_caches(tmp_path / "cache")) == 1


def test_a_csv_file_in_any_order_uses_the_same_cache(photographs, tmp_path, decoded):
    rows = [f"{part}/{name}/{i}{'.jpg' if i % 2 else '.png'},{name},{part}" for i in range(3) for name in "ba"
            for part in ("test", "train")]  # fmt: skip
    (photographs / "list.csv").write_text("path,label,split\n" + "\n".join(rows))
    options = {"path": str(photographs / "list.csv"), "size": 5, "channels": 1}
    plain = csv(**options)
    for _ in range(2):
        cached = csv(**options, cache=str(tmp_path / "cache"))
        assert torch.equal(plain.train.x, cached.train.x) and torch.equal(plain.test.x, cached.test.x)


def test_a_changed_file_is_decoded_again_and_the_old_cache_deleted(photographs, tmp_path, decoded):
    options = {"path": str(photographs), "size": 6, "cache": str(tmp_path / "cache")}
    image_folder(**options)
    before = _caches(tmp_path / "cache")
    path = photographs / "train" / "a" / "0.png"
    pixels = np.array(Image.open(path))
    Image.fromarray(255 - pixels).save(path)
    os.utime(path, ns=(1, 1))
    source = image_folder(**options)
    assert torch.equal(source.train.x, image_folder(path=str(photographs), size=6).train.x)
    assert len(_caches(tmp_path / "cache")) == 1 and _caches(tmp_path / "cache") != before
    before = _caches(tmp_path / "cache")
    decoded.clear()
    os.utime(path, ns=(2, 2))  # the same bytes with another time: nothing tells that they are the same
    image_folder(**options)
    assert len(decoded) == 16 and _caches(tmp_path / "cache") != before
    decoded.clear()
    image_folder(**{**options, "size": 7})  # of another format: the first one stays
    assert len(decoded) == 16 and len(_caches(tmp_path / "cache")) == 2


@pytest.mark.parametrize("damage", ["truncated", "pickle", "other numbers", "empty"])
def test_a_damaged_cache_is_written_again(photographs, tmp_path, decoded, damage):
    options = {"path": str(photographs), "size": 6, "cache": str(tmp_path / "cache")}
    image_folder(**options)
    (name,) = _caches(tmp_path / "cache")
    path, marker = tmp_path / "cache" / name, tmp_path / "executed"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "pickle":

        class Bomb:
            def __reduce__(self):
                return Path.touch, (marker,)

        np.save(path, np.array([Bomb()], dtype=object), allow_pickle=True)
    elif damage == "other numbers":
        np.save(path, np.zeros((16, 3, 6, 5), dtype=np.uint8))
    else:
        path.write_bytes(b"")
    decoded.clear()
    source = image_folder(**options)
    assert len(decoded) == 16 and not marker.exists()
    assert torch.equal(source.train.x, image_folder(path=str(photographs), size=6).train.x)


def test_a_full_disk_is_one_line_and_leaves_nothing(photographs, tmp_path, monkeypatch):
    options = {"path": str(photographs), "size": 6, "cache": str(tmp_path / "cache")}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
        with pytest.raises(ConfigError, match=r"benchmark\.cache: .*needed, 0\.000 GB free\); free space, choose"):
            image_folder(**options)

    def refuse(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(ConfigError, match=r"benchmark\.cache: .*No space left on device"):
            image_folder(**options)
    assert _caches(tmp_path / "cache") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"benchmark\.cache: .*; free space, choose another folder, or leave it out"):
        image_folder(**{**options, "cache": str(tmp_path / "file" / "cache")})


def test_a_damaged_image_is_named_and_leaves_no_cache(photographs, tmp_path):
    path = photographs / "test" / "b" / "1.jpg"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"b/1\.jpg: cannot be read as an image"):
        image_folder(path=str(photographs), size=6, cache=str(tmp_path / "cache"))
    assert _caches(tmp_path / "cache") == []


def test_abandoned_temporary_files_are_deleted_and_those_in_use_are_kept(photographs, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    for name, age in ((".old.npy.17.tmp", 4000), (".new.npy.18.tmp", 0)):
        (folder / name).write_text("")
        then = (folder / name).stat().st_mtime - age
        os.utime(folder / name, (then, then))
    image_folder(path=str(photographs), size=6, cache=str(folder))
    assert [name for name in _caches(folder) if name.endswith(".tmp")] == [".new.npy.18.tmp"]


def test_cached_images_are_pickled_without_pixels(photographs, tmp_path):
    paths = sorted(str(path) for path in photographs.rglob("*.png"))
    files = ImageFiles(paths, torch.zeros(len(paths)), size=64)
    cached = files.cached(str(tmp_path), title="a title/with: signs")
    assert torch.equal(cached[1], files[1])  # maps the file
    copy = pickle.loads(pickle.dumps(cached))
    assert len(pickle.dumps(cached)) < 1000 and torch.equal(copy[1], files[1]) and copy.shape == (3, 64, 64)
    assert cached.path.name.startswith("a_title_with__signs-")
    cached.path.unlink()
    with pytest.raises(DataError, match="is damaged or gone; run again"):
        pickle.loads(pickle.dumps(copy))[0]


def test_chunks_of_all_threads_are_in_order(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "_CHUNK", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # 8 chunks at a time
    source = image_folder(path=str(photographs), size=6, cache=str(tmp_path))
    assert torch.equal(source.train.x, torch.stack([source.train.x[i] for i in range(10)]))
    paths = [str(photographs / "train" / name / f"{i}{'.jpg' if i % 2 else '.png'}") for name in "ab" for i in range(5)]
    assert torch.equal(source.train.x, torch.stack(list(ImageFiles(paths, torch.zeros(10), size=6))))


def test_it_is_said_where_the_images_are_and_what_a_cache_is(photographs, tmp_path, caplog):
    caplog.set_level("INFO", logger="clframe.data")
    for verb in ("are cached in", "are read from"):
        caplog.clear()
        image_folder(path=str(photographs), size=6, cache=str(tmp_path / "cache"))
        assert f"photographs: decoded images {verb} {tmp_path / 'cache'}" in caplog.text
    with pytest.raises(ConfigError, match=r"^benchmark\.cache: found true; give a path or null$"):
        check_options(image_folder, {"cache": True}, where="benchmark")
