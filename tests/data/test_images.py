"""The one conversion of images: every mode as users see it, any size, in every reader."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from clframe.data.images import count_channels, to_pixels
from clframe.data.lazy import DatasetSamples
from clframe.data.sources.image_files import ImageFiles, read_image
from clframe.errors import DataError

COLORS = np.random.default_rng(1).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def chw(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def test_alpha_is_dropped_and_premultiplied_colors_are_restored():
    opaque = Image.fromarray(COLORS)
    clear = opaque.copy()
    clear.putalpha(0)
    assert torch.equal(to_pixels(clear, channels=3), chw(COLORS))  # also where nothing is opaque
    opaque.putalpha(255)
    assert torch.equal(to_pixels(opaque.convert("RGBa"), channels=3), chw(COLORS))


def test_a_palette_gives_its_colors_and_never_its_indices():
    image = Image.new("P", (3, 1))
    image.putpalette([200, 0, 0, 0, 150, 0, 0, 0, 100])
    image.putdata([2, 0, 1])
    expected = torch.tensor([[0, 0, 100], [200, 0, 0], [0, 150, 0]], dtype=torch.uint8).T[:, None]
    assert count_channels(image, "a") == 3 and torch.equal(to_pixels(image, channels=3), expected)
    lazy = DatasetSamples.of([(image, 0)], torch.tensor([0]), num_workers=0)  # a data set that returns PIL images
    assert torch.equal(lazy.raw(torch.tensor([0]))[0], expected)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_are_reduced_to_the_upper_eight(tmp_path, ending):
    values = np.array([[0, 255, 256, 1000], [32767, 32768, 65280, 65535]], dtype=np.uint16)
    path = tmp_path / f"a.{ending}"
    Image.fromarray(values).save(path)
    expected = torch.from_numpy((values >> 8).astype(np.uint8))
    files = ImageFiles([str(path)], torch.tensor([0]))
    assert files.shape == (1, 2, 4) and torch.equal(files[0][0], expected)
    assert torch.equal(ImageFiles([str(path)], torch.tensor([0]), channels=3)[0], expected.expand(3, 2, 4))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_known_range_are_refused(tmp_path, mode):
    path = tmp_path / "a.tif"
    Image.fromarray(np.zeros((2, 2), {"I": np.int32, "F": np.float32}[mode])).save(path)
    with pytest.raises(DataError, match=rf"a\.tif: has pixels of mode {mode}; convert the images to 8 or 16 bits"):
        ImageFiles([str(path)], torch.tensor([0]))
    with pytest.raises(DataError, match=rf"a\.tif: has pixels of mode {mode}; convert"):
        read_image(str(path), shape=(1, 2, 2))


def test_cmyk_becomes_the_color_that_it_prints(tmp_path):
    for ending in ("tif", "jpg"):
        Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / f"a.{ending}", quality=100)
        pixels = ImageFiles([str(tmp_path / f"a.{ending}")], torch.tensor([0]))[0]
        assert pixels.shape == (3, 16, 16)
        torch.testing.assert_close(pixels[:, 8, 8].int(), torch.tensor([255, 0, 0]).int(), atol=4, rtol=0)


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (33, 33), (12, 16), (5, 100), (4, 3)])
@pytest.mark.parametrize("target", [(12, 16), (16, 12), (7, 7)])
def test_any_size_is_scaled_to_cover_the_target_and_cropped(size, target):
    width, height = size
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    scale = max(target[0] / height, target[1] / width)
    by_width = target[1] / width >= target[0] / height
    scaled = (target[1], int(target[1] * height / width)) if by_width else (int(target[0] * width / height), target[0])
    assert max(abs(scaled[0] - scale * width), abs(scaled[1] - scale * height)) < 1
    whole = np.array(image.resize(scaled, Image.Resampling.BILINEAR))
    top, left = round((scaled[1] - target[0]) / 2), round((scaled[0] - target[1]) / 2)
    expected = chw(whole[top : top + target[0], left : left + target[1]])
    assert torch.equal(to_pixels(image, channels=3, size=target), expected)
    if target[0] == target[1]:
        assert torch.equal(to_pixels(image, channels=3, size=target[0]), expected)


def test_an_image_read_for_a_model_is_the_one_of_training(tmp_path):
    image = Image.fromarray(COLORS)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    path = str(tmp_path / "a.png")
    trained = ImageFiles([path], torch.tensor([0]))
    assert trained.shape == (3, 9, 6)
    pixels, resized = read_image(path, shape=trained.shape)
    assert torch.equal(pixels, trained[0]) and not resized
    pixels, resized = read_image(path, shape=(1, 4, 4))
    assert torch.equal(pixels, ImageFiles([path], torch.tensor([0]), size=4, channels=1)[0]) and resized
