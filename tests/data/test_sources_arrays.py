"""User arrays in an .npz file."""

from __future__ import annotations

import io
import struct
import zipfile

import numpy as np
import pytest
import torch

from clframe.data import SOURCES, class_incremental
from clframe.errors import ConfigError, DataError

npz = SOURCES.get("npz")


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def images(n=8, shape=(5, 4), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


@pytest.fixture
def four(tmp_path):
    """Arguments of a good file, to be spoiled one by one."""
    return {"x_train": images(8), "y_train": np.arange(8) % 2, "x_test": images(4, seed=1), "y_test": np.arange(4) % 2}


@pytest.mark.parametrize(
    "shape, layout, expected",
    [
        ((5, 4), "auto", (1, 5, 4)),
        ((3, 5, 4), "auto", (3, 5, 4)),
        ((1, 5, 4), "auto", (1, 5, 4)),
        ((5, 4, 3), "auto", (3, 5, 4)),
        ((5, 4, 1), "auto", (1, 5, 4)),
        ((3, 5, 3), "hwc", (3, 3, 5)),
        ((3, 5, 3), "chw", (3, 5, 3)),
        ((7,), "auto", (7,)),
    ],
)
def test_shapes_become_channels_first(tmp_path, shape, layout, expected):
    x = images(6, shape)
    path = save(tmp_path / "a.npz", x_train=x, y_train=[0, 1] * 3, x_test=x[:2] ^ 255, y_test=[0, 1])
    source = npz(path=path, layout=layout)
    assert source.input_shape == expected and source.train.x.dtype == torch.uint8
    assert source.name == "a" and source.classes == 2 and source.class_names == ("0", "1")
    last = layout == "hwc" or (len(shape) == 3 and shape[2] in (1, 3) and layout == "auto")
    wanted = x.transpose(0, 3, 1, 2) if last else x
    assert np.array_equal(source.train.x.numpy().reshape(-1), wanted.reshape(-1))
    assert source.train.y.tolist() == [0, 1] * 3 and source.test.y.tolist() == [0, 1]


def test_channels_that_could_be_either_side_are_asked_for(tmp_path):
    for shape in ((3, 5, 3), (1, 5, 3), (4, 5, 4)):
        path = save(tmp_path / "a.npz", x=images(4, shape), y=[0, 0, 1, 1])
        with pytest.raises(DataError, match=r"a\.npz: x has shape .* set benchmark.layout to chw or hwc"):
            npz(path=path)


def test_whole_numbers_are_normalized_by_the_training_part_and_floats_are_not(tmp_path, four):
    source = npz(path=save(tmp_path / "a.npz", **four))
    x = four["x_train"].astype(float)
    assert source.train.mean == source.test.mean == pytest.approx((x.mean(),))
    assert source.train.std == source.test.std == pytest.approx((x.std(),))
    four["x_train"], four["x_test"] = four["x_train"] / 255, four["x_test"] / 255
    source = npz(path=save(tmp_path / "b.npz", **four))
    assert source.train.x.dtype == torch.float32 and source.train.mean == (0.0,) and source.train.std == (1.0,)
    assert torch.equal(source.train.prepare(source.train.x[:2]), source.train.x[:2])
    given = npz(path=str(tmp_path / "b.npz"), mean=(0.5,), std=(0.25,))
    assert given.train.prepare(given.train.x)[3, 0, 1, 2] == pytest.approx((four["x_train"][3, 1, 2] - 0.5) / 0.25)


@pytest.mark.parametrize(
    "dtype, expected",
    [(np.int64, torch.uint8), (bool, torch.uint8), (np.float64, torch.float32), (np.float16, torch.float32)],
)
def test_bytes_in_wider_types_are_kept_as_bytes(tmp_path, four, dtype, expected):
    four["x_train"], four["x_test"] = (four[key].astype(dtype) for key in ("x_train", "x_test"))
    assert npz(path=save(tmp_path / "a.npz", **four)).train.x.dtype == expected


def test_numbers_beyond_a_byte_become_normalized_floats(tmp_path, four):
    four["x_train"], four["x_test"] = (four[key].astype(np.int32) * 300 - 7 for key in ("x_train", "x_test"))
    source = npz(path=save(tmp_path / "a.npz", **four))
    assert source.train.x.dtype == torch.float32
    prepared = source.train.prepare(source.train.x).double()
    assert float(prepared.mean()) == pytest.approx(0, abs=1e-5)
    assert float(prepared.std(unbiased=False)) == pytest.approx(1, abs=1e-5)


def test_one_pair_of_arrays_is_split_by_class(tmp_path):
    x, y = images(30), np.repeat([4, 7, 9], 10)
    source = npz(path=save(tmp_path / "a.npz", x=x, y=y), test_fraction=0.3)
    assert source.class_names == ("4", "7", "9")
    assert torch.bincount(source.train.y).tolist() == [7] * 3 and torch.bincount(source.test.y).tolist() == [3] * 3
    label = {image.tobytes(): int(c) for image, c in zip(x, np.repeat([0, 1, 2], 10), strict=True)}
    both = [*zip(source.train.x, source.train.y, strict=True), *zip(source.test.x, source.test.y, strict=True)]
    assert all(label.pop(image.numpy().tobytes()) == int(c) for image, c in both) and not label
    again = npz(path=str(tmp_path / "a.npz"), test_fraction=0.3)
    assert torch.equal(source.test.x, again.test.x)


def test_class_names_come_from_labels_or_from_an_array(tmp_path, four):
    four["y_train"], four["y_test"] = np.array(["b", "a"] * 4), np.array(["a", "b"] * 2)
    source = npz(path=save(tmp_path / "a.npz", **four))
    assert source.class_names == ("a", "b") and source.train.y.tolist() == [1, 0] * 4
    four["y_train"], four["y_test"] = np.array([2, 0] * 4), np.array([0, 2] * 2)
    named = npz(path=save(tmp_path / "b.npz", **four, classes=np.array(["ant", "bee", "cow"])))
    assert named.class_names == ("ant", "cow") and named.train.y.tolist() == [1, 0] * 4
    with pytest.raises(DataError, match=r"c\.npz: classes has shape \(2,\)"):
        npz(path=save(tmp_path / "c.npz", **four, classes=np.array(["ant", "bee"])))


def test_the_names_of_keras_and_of_torch_files_both_do(tmp_path, four):
    other = {"_".join(reversed(key.split("_"))): value for key, value in four.items()}
    one, two = npz(path=save(tmp_path / "a.npz", **four)), npz(path=save(tmp_path / "b.npz", **other))
    assert torch.equal(one.train.x, two.train.x) and torch.equal(one.test.y, two.test.y)


def test_a_file_makes_a_benchmark(tmp_path):
    path = save(tmp_path / "a.npz", x=images(40), y=np.repeat(np.arange(10), 4))
    benchmark = class_incremental(npz(path=path), experiences=3)
    assert [len(c) for c in benchmark.classes] == [4, 3, 3] and benchmark.input_shape == (1, 5, 4)


def test_duplicates_are_warned_of(tmp_path, four, caplog):
    four["x_test"][1] = four["x_train"][5]
    npz(path=save(tmp_path / "a.npz", **four))
    assert [m for m in caplog.messages if "1 of 4 test samples" in m]


@pytest.mark.parametrize(
    "spoil, message",
    [
        ({"y_train": np.arange(7) % 2}, r"a\.npz: x_train has 8 inputs, y_train 7 labels; give one label per input"),
        ({"y_test": np.array([0, 1, 2, 1])}, r"a\.npz: class '2' has test samples but no training samples"),
        ({"y_test": np.array([0, 1, 1, -1])}, r"a\.npz: y_test: label -1 of sample 3 is out of range"),
        ({"y_train": np.arange(8) / 2}, r"a\.npz: y_train: label 0.5 of sample 1 is not an integer"),
        ({"y_train": np.eye(8)}, r"a\.npz: y_train: found labels of shape \(8, 8\)"),
        ({"x_test": images(4, (4, 4))}, r"a\.npz: x_train and x_test have inputs of shapes"),
        ({"x_train": np.full((8, 5, 4), np.nan)}, r"a\.npz: x_train has NaN or infinite values, first in sample 0"),
        ({"x_train": np.zeros((0, 5, 4)), "y_train": []}, r"a\.npz: x_train has shape \(0, 5, 4\)"),
        ({"x_train": np.zeros(8)}, r"a\.npz: x_train has shape \(8,\)"),
        ({"x_train": np.zeros((8, 2), complex)}, r"a\.npz: x_train has type complex128"),
        ({"x_train": np.full((8, 2), "a")}, r"a\.npz: x_train has type <U1"),
        ({"x_train": np.array([{}] * 8)}, r"a\.npz: x_train has Python objects, which could run code"),
    ],
)
def test_bad_arrays_are_named(tmp_path, four, spoil, message):
    with pytest.raises(DataError, match=message) as error:
        npz(path=save(tmp_path / "a.npz", **{**four, **spoil}))
    assert "\n" not in str(error.value)


def test_infinity_names_its_sample(tmp_path, four):
    x = four["x_test"].astype(np.float32)
    x[2, 0, 0] = np.inf
    with pytest.raises(DataError, match="x_test has NaN or infinite values, first in sample 2"):
        npz(path=save(tmp_path / "a.npz", **{**four, "x_test": x}))


def test_missing_arrays_are_named(tmp_path, four):
    del four["y_test"]
    with pytest.raises(DataError, match=r"a\.npz: found x_test, x_train, y_train; save x_train, y_train"):
        npz(path=save(tmp_path / "a.npz", **four))
    with zipfile.ZipFile(tmp_path / "empty.npz", "w"):
        pass
    with pytest.raises(DataError, match=r"empty\.npz: found no arrays"):
        npz(path=str(tmp_path / "empty.npz"))


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.7, -1])
def test_a_file_cut_short_is_one_line(tmp_path, four, keep):
    path = tmp_path / "a.npz"
    save(path, **four)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(DataError, match=r"a\.npz: cannot be read as .npz \(.+\); write it again") as error:
        npz(path=str(path))
    assert "\n" not in str(error.value)


def test_flipped_bits_are_noticed(tmp_path, four):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **four)
    data = bytearray(path.read_bytes())
    data[120:130] = bytes(10)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.npz: cannot be read as .npz"):
        npz(path=str(path))


def test_one_bare_array_is_no_npz(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"a\.npy: cannot be read as .npz"):
        npz(path=str(tmp_path / "a.npy"))


def test_a_size_that_is_declared_is_checked_before_anything_is_read(tmp_path, four):
    path = save(tmp_path / "a.npz", **four)
    with pytest.raises(DataError, match=r"a\.npz: its inputs take 2.4e-07 GB, above benchmark.memory_gb=1e-07"):
        npz(path=path, memory_gb=1e-7)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 9)})
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header.getvalue() + bytes(100))
        archive.writestr("y.npy", header.getvalue())
    with pytest.raises(DataError, match=r"bomb\.npz: .*x declares shape \(1000000000, 9\), which is more than"):
        npz(path=str(tmp_path / "bomb.npz"))


def test_a_member_that_points_elsewhere_is_not_written_anywhere(tmp_path, four):
    path = tmp_path / "in" / "a.npz"
    path.parent.mkdir()
    save(path, **four)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../evil.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", 0))
    with pytest.raises(DataError, match=r"a\.npz: cannot be read as .npz"):
        npz(path=str(path))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.npz", "in"]


def test_paths_that_lead_nowhere(tmp_path, four):
    save(tmp_path / "flowers.npz", **four)
    with pytest.raises(ConfigError, match="benchmark.path: found nothing; give the path of a file"):
        npz()
    with pytest.raises(DataError, match=r"flower\.npz: no such file; did you mean .*/flowers\.npz\?"):
        npz(path=str(tmp_path / "flower.npz"))
    with pytest.raises(DataError, match=r"no such file; .* has no folder of that name"):
        npz(path=str(tmp_path / "zzz" / "a.npz"))
    with pytest.raises(DataError, match="is a folder; give the path of a file"):
        npz(path=str(tmp_path))


def test_normalization_that_cannot_be(tmp_path, four):
    path = save(tmp_path / "a.npz", **four)
    for mean, std in (((1.0,), ()), ((1.0,), (0.0,)), ((1.0, 2.0), (1.0,))):
        with pytest.raises(ConfigError, match="benchmark.std"):
            npz(path=path, mean=mean, std=std)
    with pytest.raises(ConfigError, match=r"benchmark.mean: found 2 values for inputs of shape \(1, 5, 4\)"):
        npz(path=path, mean=(1.0, 2.0), std=(1.0, 2.0))


def test_medmnist_files_are_read_as_published(tmp_path):
    """Labels of shape [N, 1], and validation arrays, which are not used."""
    arrays = {}
    for seed, (split, n) in enumerate((("train", 8), ("val", 4), ("test", 6))):
        arrays |= {f"{split}_images": images(n, (28, 28, 3), seed), f"{split}_labels": np.arange(n)[:, None] % 2}
    source = npz(path=save(tmp_path / "pathmnist.npz", **arrays))
    assert (source.name, source.input_shape, source.classes) == ("pathmnist", (3, 28, 28), 2)
    assert torch.equal(source.train.x, torch.from_numpy(arrays["train_images"].transpose(0, 3, 1, 2).copy()))
    assert torch.equal(source.test.x, torch.from_numpy(arrays["test_images"].transpose(0, 3, 1, 2).copy()))
    assert source.test.y.tolist() == [0, 1] * 3


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.uint16])
def test_token_ids_are_not_normalized(tmp_path, dtype):
    ids = images(8, (5,)).astype(dtype)
    path = save(tmp_path / "a.npz", x_train=ids, y_train=[0, 1] * 4, x_test=ids[:2] + 1, y_test=[0, 1])
    source = npz(path=path, kind="tokens")
    prepared = source.train.prepare(source.train.raw(torch.arange(8)))
    assert prepared.dtype == torch.int64 and torch.equal(prepared, torch.from_numpy(ids.astype(np.int64)))
    assert source.are_token_ids() and not npz(path=path).are_token_ids()
    with pytest.raises(ConfigError, match="^benchmark.mean: found values for token ids"):
        npz(path=path, kind="tokens", mean=(1.0,), std=(1.0,))


@pytest.mark.parametrize(
    "x, message",
    [
        (np.ones((4, 3)), r"x is float64 of shape \(4, 3\); give integer token ids \[N, T\]$"),
        (np.ones((4, 3, 3), int), r"x is int64 of shape \(4, 3, 3\); give integer token ids"),
        (np.array([[1, -1]] * 4), "x has values from -1 to 1; give token ids from 0, padded with 0$"),
        (np.array([[1, 2**40]] * 4), "x has values from 1 to 1099511627776; give token ids"),
    ],
)
def test_other_arrays_are_no_token_ids(tmp_path, x, message):
    with pytest.raises(DataError, match=message):
        npz(path=save(tmp_path / "a.npz", x=x, y=[0, 0, 1, 1]), kind="tokens")


def test_training_and_test_arrays_have_one_scale(tmp_path, four):
    four["x_test"] = four["x_test"] / 255
    path = save(tmp_path / "a.npz", **four)
    with pytest.raises(DataError) as refused:
        npz(path=path)
    assert str(refused.value) == (
        f"{path}: x_train has type uint8 and x_test has type float64; give both as whole numbers or both as fractions, in "
        f"the same scale"
    )


def test_whole_numbers_of_which_one_part_fits_into_bytes_are_one_type(tmp_path, four):
    four["x_train"] = four["x_train"].astype(np.int32) * 2
    source = npz(path=save(tmp_path / "a.npz", **four))
    assert source.train.x.dtype == source.test.x.dtype == torch.float32
    assert np.array_equal(source.test.x[:, 0].numpy(), four["x_test"])


def test_fractions_beyond_float32_are_named(tmp_path, four):
    x = four["x_train"].astype(np.float64)
    x[3, 0, 0] = 1e300
    path = save(tmp_path / "a.npz", **{**four, "x_train": x, "x_test": four["x_test"] / 1.0})
    with pytest.raises(DataError) as refused:
        npz(path=path)
    assert str(refused.value) == f"{path}: x_train has NaN or infinite values, first in sample 3; clean them"
