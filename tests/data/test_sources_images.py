"""Image files: read as torchvision reads them, and refused by name where they cannot be."""

from __future__ import annotations

import io
import os
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from clframe.data.lazy import DatasetSamples
from clframe.data.sources.image_files import ImageFiles, consecutive_indices, image_source, open_image
from clframe.errors import ConfigError, DataError


def draw(path, size=(6, 5), mode="RGB", seed=0):
    width, height = size
    channels = {"RGB": 3, "RGBA": 4, "L": 1, "LA": 2, "CMYK": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    image = (
        Image.fromarray(pixels.squeeze(), mode=None)
        if mode != "CMYK"
        else Image.fromarray(pixels[..., :3]).convert(mode)
    )
    if mode == "LA":
        image = Image.merge("LA", [Image.fromarray(pixels[..., i]) for i in range(2)])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return str(path)


def png_that_declares(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (33, 33), (31, 97), (7, 200), (16, 16), (5, 3)])
@pytest.mark.parametrize("side", [16, 1, 7])
def test_resize_and_crop_are_those_of_torchvision(tmp_path, size, side):
    from torchvision.transforms import v2

    path = draw(tmp_path / "a.png", size)
    files = ImageFiles([path], torch.tensor([0]), size=side)
    steps = v2.Compose([v2.Resize(side), v2.CenterCrop(side), v2.PILToTensor()])
    with Image.open(path) as image:
        assert torch.equal(files[0], steps(image.convert("RGB")))
    assert files[0].dtype == torch.uint8 and files.shape == (3, side, side)


def test_an_image_of_the_right_size_is_untouched(tmp_path):
    path = draw(tmp_path / "a.png", (4, 4))
    expected = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    for size in (None, 4):
        files = ImageFiles([path], torch.tensor([0]), size=size)
        assert torch.equal(files[0], expected) and files[0].is_contiguous()


@pytest.mark.parametrize("mode, kind", [("L", 1), ("LA", 1), ("RGB", 3), ("RGBA", 3), ("CMYK", 3)])
def test_channels_follow_the_file_or_the_option(tmp_path, mode, kind):
    path = draw(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), mode=mode)
    assert ImageFiles([path], torch.tensor([0])).shape == (kind, 5, 6)
    for channels in (1, 3):
        files = ImageFiles([path], torch.tensor([0]), channels=channels)
        assert files.shape == files[0].shape == (channels, 5, 6)


def test_one_bit_and_palette_images(tmp_path):
    bits = np.eye(4, dtype=bool)
    Image.fromarray(bits).save(tmp_path / "bits.png")
    files = ImageFiles([str(tmp_path / "bits.png")], torch.tensor([0]))
    assert torch.equal(files[0][0], torch.eye(4, dtype=torch.uint8) * 255)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    palette.save(tmp_path / "palette.png", transparency=b"\x00\x80")
    files = ImageFiles([str(tmp_path / "palette.png")], torch.tensor([0]))
    assert files[0].flatten(1).T.tolist() == [[10, 20, 30], [40, 50, 60]]


def test_stacked_subset_and_a_copy_hold_the_same_images(tmp_path):
    paths = [draw(tmp_path / f"{i}.png", seed=i) for i in range(300)]  # more than one chunk
    files = ImageFiles(paths, torch.arange(300))
    everything = files.read_all(title="t")
    assert everything.shape == (300, 3, 5, 6) and everything.dtype == torch.uint8
    assert files.nbytes == everything.nbytes
    assert all(torch.equal(everything[i], files[i]) for i in (0, 127, 128, 299))
    part = files.subset(torch.tensor([299, 3]))
    assert part.labels.tolist() == [299, 3] and torch.equal(part.read_all(title="t"), everything[[299, 3]])
    copy = pickle.loads(pickle.dumps(files))
    assert torch.equal(copy[128], everything[128]) and copy.shape == files.shape


def test_grey_among_color_names_the_file(tmp_path):
    paths = [draw(tmp_path / "a.png"), draw(tmp_path / "b.png", mode="L")]
    files = ImageFiles(paths, torch.tensor([0, 0]))
    with pytest.raises(DataError, match=r"b\.png: is gray, but .*a\.png is color; set benchmark.channels to 1 or 3"):
        files.read_all(title="t")
    with pytest.raises(DataError, match=r"a\.png: is color, but .*b\.png is gray"):
        ImageFiles(paths[::-1], torch.tensor([0, 0]))[1]
    assert ImageFiles(paths, torch.tensor([0, 0]), channels=3)[1].shape == (3, 5, 6)


def test_another_size_names_the_file(tmp_path):
    paths = [draw(tmp_path / "a.png"), draw(tmp_path / "b.png", (5, 6))]
    files = ImageFiles(paths, torch.tensor([0, 0]))
    with pytest.raises(DataError, match=r"b\.png: has 5x6 pixels, but .*a\.png has 6x5; set benchmark.size"):
        files.read_all(title="t")
    assert ImageFiles(paths, torch.tensor([0, 0]), size=4).read_all(title="t").shape == (2, 3, 4, 4)


def truncated(data):
    return data[: len(data) // 2]


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "webp"])
@pytest.mark.parametrize(
    "damage", [truncated, lambda data: b"", lambda data: b"no image at all", lambda data: data[:20] + b"\xff" * 200]
)  # fmt: skip
def test_a_damaged_image_is_one_line_with_its_name(tmp_path, ending, damage):
    good, bad = draw(tmp_path / f"good.{ending}", (64, 64)), tmp_path / f"bad.{ending}"
    bad.write_bytes(damage((tmp_path / f"good.{ending}").read_bytes()))
    files = ImageFiles([good, str(bad)], torch.tensor([0, 1]))
    with pytest.raises(
        DataError, match=rf"bad\.{ending}: cannot be read as an image \(.+\); replace or remove"
    ) as error:
        files.read_all(title="t")
    assert "\n" not in str(error.value)


def test_an_image_of_absurd_size_is_not_decoded(tmp_path):
    bomb = tmp_path / "bomb.png"
    for side in (9_500, 30_000):  # Pillow only warns of the first
        bomb.write_bytes(png_that_declares(side, side))
        with pytest.raises(DataError, match=r"bomb\.png: declares more than 89,478,485 pixels"):
            ImageFiles([str(bomb)], torch.tensor([0]))
    bomb.write_bytes(png_that_declares(9_500, 9_500))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in a run, where Pillow's warning is not an error
        with pytest.raises(DataError, match="declares more than"), open_image(str(bomb)):
            pass


def test_a_tiny_file_cannot_claim_a_large_image(tmp_path):
    (tmp_path / "a.png").write_bytes(png_that_declares(5_000, 5_000))
    with pytest.raises(DataError, match=r"a\.png: cannot be read as an image"):
        ImageFiles([str(tmp_path / "a.png")], torch.tensor([0]))


def test_a_file_that_vanished_or_is_locked(tmp_path, monkeypatch):
    files = ImageFiles([draw(tmp_path / "a.png")], torch.tensor([0]))
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png: no such file"):
        files[0]

    def locked(*_, **__):
        raise PermissionError(13, "Permission denied")

    draw(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", locked)
    with pytest.raises(DataError, match=r"a\.png: cannot be read \(Permission denied\); check its permissions"):
        files[0]


def test_options_that_cannot_be(tmp_path):
    path = draw(tmp_path / "a.png")
    for size in (0, -3):
        with pytest.raises(ConfigError, match=f"benchmark.size: found {size}"):
            ImageFiles([path], torch.tensor([0]), size=size)
    with pytest.raises(ConfigError, match="benchmark.channels: found 2"):
        ImageFiles([path], torch.tensor([0]), channels=2)
    with pytest.raises(DataError, match="1 files and 2 labels"):
        ImageFiles([path], torch.tensor([0, 1]))
    with pytest.raises(DataError, match="found no files"):
        ImageFiles([], torch.tensor([]))


def test_both_ways_of_keeping_images_serve_the_same(tmp_path, caplog):
    caplog.set_level("INFO", "clframe.data")
    paths = [draw(tmp_path / f"{i}.png", (8, 6), seed=i) for i in range(9)]
    files = ImageFiles(paths, torch.tensor([0, 1, 2] * 3), size=5)
    options = {"parts": consecutive_indices(6, 3), "class_names": ("a", "b", "c")}
    kept = image_source("mine", files, memory_gb=9 * 3 * 25 / 1e9, **options)
    read = image_source("mine", files, memory_gb=(9 * 3 * 25 - 1) / 1e9, **options)
    assert [m.split(": ")[-1] for m in caplog.messages] == ["stored in memory", "read batch by batch"]
    assert kept.train.mean == read.train.mean and kept.train.std == read.train.std
    assert isinstance(read.train, DatasetSamples) and isinstance(read.test, DatasetSamples)
    assert read.train.reader is read.test.reader  # one set of workers
    index = torch.tensor([2, 0])
    for one, other in ((kept.train, read.train), (kept.test, read.test)):
        assert torch.equal(one.y, other.y)
        assert torch.equal(one.raw(index), other.raw(index))
        assert torch.equal(one.prepare(one.raw(index)), other.prepare(other.raw(index)))
    with pytest.raises(ConfigError, match="benchmark.memory_gb: found -1"):
        image_source("mine", files, memory_gb=-1.0, **options)


def test_images_are_measured_on_training_images_alone(tmp_path):
    for i, value in enumerate((10, 30, 250)):
        Image.new("L", (2, 2), value).save(tmp_path / f"{i}.png")
    files = ImageFiles([str(tmp_path / f"{i}.png") for i in range(3)], torch.tensor([0, 0, 0]))
    source = image_source("m", files, consecutive_indices(2, 1), class_names=("a",), memory_gb=1.0)
    assert source.train.mean == source.test.mean == (20.0,) and source.train.std == source.test.std == (10.0,)


def test_an_image_is_read_from_its_own_bytes(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (1, 2, 3)).save(buffer, "PNG")
    (tmp_path / "wrong_ending.jpg").write_bytes(buffer.getvalue())
    files = ImageFiles([str(tmp_path / "wrong_ending.jpg")], torch.tensor([0]))
    assert files[0].flatten(1).T.tolist() == [[1, 2, 3]] * 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tiff", "jpg", "webp"])
def test_images_are_upright_whatever_their_orientation(tmp_path, orientation, ending):
    """An image that is stored with any orientation is read upright."""
    undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
            7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
    pixels = np.zeros((16, 24), np.uint8)
    pixels[:8, :8] = 255  # only the corner at the top left is white
    stored = Image.fromarray(pixels)
    if orientation in undo:
        stored = stored.transpose(Image.Transpose[undo[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    stored.save(path, exif=exif, **({"lossless": True} if ending == "webp" else {}))
    files = ImageFiles([str(path)], torch.tensor([0]), channels=1)
    assert files.shape == files[0].shape == (1, 16, 24)
    torch.testing.assert_close(files[0][0].float(), torch.from_numpy(pixels).float(), atol=30, rtol=0)
    small = ImageFiles([str(path)], torch.tensor([0]), channels=1, size=8)
    assert small.shape == small[0].shape == (1, 8, 8)


def test_damaged_metadata_leaves_the_pixels(tmp_path):
    path = tmp_path / "a.jpg"
    image = Image.fromarray(np.full((4, 6, 3), 200, np.uint8))
    image.save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ImageFiles([str(path)], torch.tensor([0]))[0].shape == (3, 4, 6)


def test_formats_that_nobody_trains_on_reach_no_decoder(tmp_path):
    """An EPS file by the name of a PNG would start Ghostscript."""
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path, "EPS")
    with pytest.raises(DataError, match=r"a\.png: cannot be read as an image \(cannot identify image file"):
        ImageFiles([str(path)], torch.tensor([0]))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of POSIX systems")
def test_a_named_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: is not a regular file; replace or remove it$"):
        ImageFiles([str(tmp_path / "a.png")], torch.tensor([0]))
