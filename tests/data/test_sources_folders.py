"""User image folders and CSV files, and ImageNet's folders."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from clframe.data import SOURCES
from clframe.data.lazy import DatasetSamples
from clframe.data.sources.paths import require_path
from clframe.errors import ConfigError, DataError

image_folder, csv, imagenet, imagenet_subset = (
    SOURCES.get(name) for name in ("image_folder", "csv", "imagenet", "imagenet_subset")
)
_drawn = iter(range(10**6))


def draw(path, size=(6, 6), color=True):
    """An image that no other call draws."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if color else (size[1], size[0])
    pixels = np.random.default_rng(next(_drawn)).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path, **({"quality": 95} if path.suffix == ".JPEG" else {}))
    return pixels


def test_where_a_folder_is_missing_only_folders_are_suggested(tmp_path):
    (tmp_path / "photo.zip").write_text("")
    for missing in ("photos", "photos/all"):
        with pytest.raises(DataError) as refused:
            require_path(str(tmp_path / missing), option="path", kind="folder")
        assert str(refused.value) == (
            f"{tmp_path / missing}: no such folder; {tmp_path} has no folder of that name"
        )
    with pytest.raises(DataError, match=r"no such file; did you mean .*photo\.zip\?$"):
        require_path(str(tmp_path / "photos"), option="path", kind="file")
    (tmp_path / "photos2").mkdir()
    with pytest.raises(DataError, match=r"no such folder; did you mean .*photos2\?$"):
        require_path(str(tmp_path / "photos"), option="path", kind="folder")
    with pytest.raises(DataError, match=r"no such file; did you mean .*photos2\?$"):
        require_path(str(tmp_path / "photos" / "a.csv"), option="path", kind="file")


@pytest.fixture
def halves(tmp_path):
    """train/ and test/ with the classes cat and dog."""
    root = tmp_path / "pets"
    for part, count in (("train", 3), ("test", 2)):
        for name in ("dog", "cat"):
            for i in range(count):
                draw(root / part / name / f"{i}.png")
    return root


def test_train_and_test_folders(halves):
    (halves / "train" / "cat" / "notes.txt").write_text("no image")
    (halves / "train" / "cat" / "._0.png").write_text("no image either")
    (halves / ".cache").mkdir()
    draw(halves / "train" / "cat" / "deep" / "er" / "9.PNG")
    source = image_folder(path=str(halves))
    assert source.name == "pets" and source.class_names == ("cat", "dog") and source.input_shape == (3, 6, 6)
    assert source.train.y.tolist() == [0] * 4 + [1] * 3 and source.test.y.tolist() == [0, 0, 1, 1]
    with Image.open(halves / "train" / "dog" / "2.png") as image:
        assert torch.equal(source.train.x[-1], torch.from_numpy(np.array(image)).permute(2, 0, 1))
    x = source.train.x.double()
    assert source.train.mean == source.test.mean == pytest.approx(x.mean((0, 2, 3)).tolist())
    assert source.train.std == pytest.approx(x.transpose(0, 1).flatten(1).std(1, unbiased=False).tolist())


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_other_names_of_the_test_folder(halves, name):
    (halves / "test").rename(halves / name)
    assert len(image_folder(path=str(halves)).test) == 4


def test_one_folder_is_split_by_class_and_the_split_does_not_depend_on_its_place(tmp_path):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
    for name in ("10", "9", "2"):
        for i in range(10):
            draw(tmp_path / "one" / name / f"{i}.png")
            os.makedirs(tmp_path / "two" / name, exist_ok=True)
            os.link(tmp_path / "one" / name / f"{i}.png", tmp_path / "two" / name / f"{i}.png")
    source, moved = (image_folder(path=str(tmp_path / p), test_fraction=0.3) for p in ("one", "two"))
    assert source.class_names == ("2", "9", "10")  # as numbers
    assert torch.bincount(source.train.y).tolist() == [7] * 3
    assert torch.bincount(source.test.y).tolist() == [3] * 3
    assert torch.equal(source.test.x, moved.test.x) and torch.equal(source.train.x, moved.train.x)


def test_sizes_and_channels_by_option(halves):
    draw(halves / "train" / "cat" / "wide.png", (9, 7))
    draw(halves / "test" / "cat" / "grey.png", color=False)
    with pytest.raises(DataError, match=r"wide\.png: has 9x7 pixels, but .* has 6x6; set benchmark.size"):
        image_folder(path=str(halves))
    with pytest.raises(DataError, match=r"grey\.png: is gray, but .* is color; set benchmark.channels"):
        image_folder(path=str(halves), size=5)
    assert image_folder(path=str(halves), size=5, channels=3).input_shape == (3, 5, 5)
    assert image_folder(path=str(halves), size=5, channels=1).input_shape == (1, 5, 5)


def test_images_beyond_the_limit_are_read_when_they_are_wanted(halves):
    kept, read = (image_folder(path=str(halves), memory_gb=limit) for limit in (1.0, 0.0))
    assert isinstance(read.train, DatasetSamples)
    index = torch.tensor([4, 0])
    assert torch.equal(read.train.prepare(read.train.raw(index)), kept.train.prepare(kept.train.raw(index)))


def test_duplicates_are_warned_of(halves, caplog):
    for i in range(2):
        (halves / "test" / "dog" / f"{i}.png").write_bytes((halves / "train" / "dog" / f"{i}.png").read_bytes())
    image_folder(path=str(halves))
    assert [m for m in caplog.messages if "pets: 2 of 4 test samples are also in the training data" in m]


def test_folders_that_cannot_be_used(halves, tmp_path):
    with pytest.raises(ConfigError, match="benchmark.path: found nothing; give the path of a folder"):
        image_folder()
    with pytest.raises(DataError, match=r"/pet: no such folder; did you mean .*/pets\?"):
        image_folder(path=str(tmp_path / "pet"))
    with pytest.raises(DataError, match=r"/pet/train: no such folder; did you mean .*/pets\?"):
        image_folder(path=str(tmp_path / "pet" / "train"))
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none: holds no folders; put the images of each class"):
        image_folder(path=str(tmp_path / "none"))
    (halves / "train" / "fox").mkdir()
    with pytest.raises(DataError, match="train/fox: holds no images; add some or remove the folder"):
        image_folder(path=str(halves))
    draw(halves / "train" / "fox" / "0.png")
    with pytest.raises(DataError, match="pets: class 'fox' has no test samples"):
        image_folder(path=str(halves))
    (halves / "train" / "fox").rename(halves / "test" / "fox")
    with pytest.raises(DataError, match="pets: class 'fox' has test samples but no training samples"):
        image_folder(path=str(halves))


def test_training_images_without_test_images(halves):
    (halves / "test").rename(halves / "tests")
    with pytest.raises(DataError, match=r"pets: has train/ but no test/; add it, give the path .*/train to split"):
        image_folder(path=str(halves))
    assert len(image_folder(path=str(halves / "train"), test_fraction=0.4).test) == 2


def test_one_image(tmp_path):
    draw(tmp_path / "one" / "cat" / "0.png")
    with pytest.raises(DataError, match="one: class 'cat' has one sample, too few to split"):
        image_folder(path=str(tmp_path / "one"))


def test_one_class_is_a_data_set(tmp_path):
    for i in range(2):
        draw(tmp_path / "one" / "cat" / f"{i}.png")
    source = image_folder(path=str(tmp_path / "one"))
    assert source.classes == 1 and len(source.train) == len(source.test) == 1


def test_a_folder_without_rights(halves, monkeypatch):
    real = os.scandir

    def locked(path="."):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(DataError, match=r"train/dog: cannot be read \(Permission denied\); check"):
        image_folder(path=str(halves))


# --- CSV ---


@pytest.fixture
def table(tmp_path):
    for i in range(6):
        draw(tmp_path / "images" / f"{i}.png")
    lines = [f"images/{i}.png,{'cat' if i % 2 else 'dog'},{'test' if i > 3 else 'train'}" for i in range(6)]
    return tmp_path / "pets.csv", ["path,label,split", *lines]


def write(table, change=None):
    path, lines = table
    lines = change(list(lines)) if change else lines
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_a_table_with_a_split(table, tmp_path):
    source = csv(path=write(table))
    assert source.name == "pets" and source.class_names == ("cat", "dog")
    assert source.train.y.tolist() == [1, 0, 1, 0] and source.test.y.tolist() == [1, 0]
    with Image.open(tmp_path / "images" / "5.png") as image:
        assert torch.equal(source.test.x[1], torch.from_numpy(np.array(image)).permute(2, 0, 1))


def test_a_table_without_a_split_in_any_order_of_columns(table, tmp_path):
    path = table[0]
    rows = [f'{i % 2 + 5}, "images/{i}.png", x' for i in range(6)]
    path.write_text("\ufefflabel,path,note\r\n" + "\r\n".join(rows), encoding="utf-8")
    source = csv(path=str(path), test_fraction=0.4)
    assert source.class_names == ("5", "6")
    assert torch.bincount(source.train.y).tolist() == [2, 2] and torch.bincount(source.test.y).tolist() == [1, 1]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t[1:], r"pets\.csv: its first line is 'images/0.png,dog,train'; start with the header path,label"),
        (lambda t: [], r"pets\.csv: its first line is ''; start with the header"),
        (lambda t: t[:1], r"pets\.csv: lists no images"),
        (lambda t: [*t, "images/9.png,cat,test"], r"pets\.csv: line 8 names .*images/9\.png, which is not a file"),
        (lambda t: [*t, "images,cat,test"], r"pets\.csv: line 8 names .*images, which is not a file"),
        (lambda t: [*t, "images/1.png,,test"], r"pets\.csv: line 8 has no label"),
        (lambda t: [*t, ",cat,test"], r"pets\.csv: line 8 has no path"),
        (lambda t: [*t, "images/1.png"], r"pets\.csv: line 8 has no label"),
        (lambda t: [*t, "images/1.png,cat,valid"], r"pets\.csv: line 8 has the split 'valid'; use train or test"),
        (lambda t: [*t, "images/1.png,cat"], r"pets\.csv: line 8 has the split ''; use train or test"),
        (lambda t: [*t, '"images/1.png,cat,test'], r"pets\.csv: is not valid CSV \(unexpected end of data\)"),
        (lambda t: [x for x in t if "cat,test" not in x], r"pets\.csv: class 'cat' has no test samples"),
        (lambda t: [x for x in t if "test" not in x], r"pets\.csv: found no test samples"),
    ],
)
def test_tables_that_cannot_be_used(table, change, message):
    with pytest.raises(DataError, match=message) as error:
        csv(path=write(table, change))
    assert "\n" not in str(error.value)


def test_a_table_that_is_no_text(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"path,label\n\xff\xfe\x00")
    with pytest.raises(DataError, match=r"a\.csv: byte 11 is not UTF-8 text"):
        csv(path=str(tmp_path / "a.csv"))
    with pytest.raises(DataError, match=r"a\.cvs: no such file; did you mean .*a\.csv\?"):
        csv(path=str(tmp_path / "a.cvs"))


def test_a_table_with_a_broken_image_names_it(table, tmp_path):
    (tmp_path / "images" / "4.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"images/4\.png: cannot be read as an image"):
        csv(path=write(table))


# --- ImageNet ---


@pytest.fixture
def wordnet(tmp_path):
    """Twelve classes of ImageNet's shape; one image is gray, as some of the real ones are."""
    for c in range(12):
        for part, count in (("train", 2), ("val", 1)):
            for i in range(count):
                draw(tmp_path / part / f"n{c:08d}" / f"{i}.JPEG", (10 + c, 9), color=c != 3)
    return tmp_path


def test_imagenet_from_its_folders(wordnet):
    source = imagenet(data_dir=str(wordnet), size=8)
    assert source.classes == 12 and source.input_shape == (3, 8, 8)
    assert len(source.train) == 24 and len(source.test) == 12
    assert source.train.mean == (123.675, 116.28, 103.53) and source.train.std == (58.395, 57.12, 57.375)


def test_the_subset_is_the_one_that_hou_et_al_drew(wordnet):
    source = imagenet_subset(data_dir=str(wordnet), size=8, n_classes=5)
    np.random.seed(1993)
    drawn = np.random.choice([f"n{c:08d}" for c in range(12)], 5, replace=False)
    assert set(source.class_names) == set(drawn) and list(source.class_names) == sorted(drawn)
    assert len(source.train) == 10 and len(source.test) == 5
    named = imagenet_subset(data_dir=str(wordnet), size=8, class_names=("n00000007", "n00000002"))
    assert named.class_names == ("n00000002", "n00000007")
    assert imagenet_subset(data_dir=str(wordnet), size=8, n_classes=12).classes == 12


def test_imagenet_that_is_not_there(wordnet, tmp_path):
    with pytest.raises(DataError, match=r"nowhere: holds no ImageNet \(train/ is missing\); get it from image-net"):
        imagenet(data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"benchmark.n_classes: found 100 for 12 folders in .*train; give 1 to 12"):
        imagenet_subset(data_dir=str(wordnet))
    with pytest.raises(ConfigError, match=r"benchmark.class_names: no folder .*train/n5; use names of its folders"):
        imagenet_subset(data_dir=str(wordnet), class_names=("n5",))
    for path in list((wordnet / "val").rglob("*.JPEG")):
        path.rename(wordnet / "val" / f"{path.parent.name}.JPEG")
        path.parent.rmdir()
    with pytest.raises(DataError, match="val: holds no folders; put the images of each class"):
        imagenet(data_dir=str(wordnet))


# --- folders of other tools: case of names, junk files, named pipes, long names ---


@pytest.mark.parametrize(
    "train, test",
    [("Train", "Test"), ("training", "testing"), ("TRAINING", "Val"), ("train", "Validation"), ("Training", "test")],
)
def test_folders_of_the_splits_in_any_case(halves, train, test):
    (halves / "train").rename(halves / "t")
    (halves / "t").rename(halves / train)
    (halves / "test").rename(halves / "u")
    (halves / "u").rename(halves / test)
    source = image_folder(path=str(halves))
    assert source.class_names == ("cat", "dog") and (len(source.train), len(source.test)) == (6, 4)


def test_test_images_come_before_validation_images(halves):
    for i in range(5):
        draw(halves / "Val" / "cat" / f"{i}.png")
    assert len(image_folder(path=str(halves)).test) == 4


def test_two_folders_of_one_meaning_are_refused(halves):
    draw(halves / "Testing" / "cat" / "0.png")
    with pytest.raises(DataError, match=r"pets: has both Testing/ and test/; merge them, or rename one$"):
        image_folder(path=str(halves))


def test_folders_that_all_hold_the_same_folders_are_refused(tmp_path):
    for year in ("2019", "2020"):
        for name in ("cat", "dog"):
            for i in range(2):
                draw(tmp_path / year / name / f"{i}.png")
    with pytest.raises(DataError, match=r"2019/ and all other folders hold the same folders \(cat, dog\), so either"):
        image_folder(path=str(tmp_path))
    (tmp_path / "2020" / "Thumbs.db").write_bytes(b"not an image")
    with pytest.raises(DataError, match="hold the same folders"):
        image_folder(path=str(tmp_path))
    draw(tmp_path / "2020" / "cover.png")  # an image next to the subfolders makes 2020 a class
    assert image_folder(path=str(tmp_path)).class_names == ("2019", "2020")


def test_one_common_subfolder_is_a_layout_of_tools(tmp_path):
    """Tiny ImageNet's CLASS/images: read as classes of one folder each, since a single class makes no sense."""
    for name in ("n1", "n2"):
        for i in range(2):
            draw(tmp_path / name / "images" / f"{i}.JPEG")
    assert image_folder(path=str(tmp_path)).class_names == ("n1", "n2")


def test_what_archivers_and_systems_leave_behind_is_no_class_and_no_image(halves):
    for junk in ("__MACOSX", "@eaDir", "lost+found", ".Trash"):
        for part in ("train", "test"):
            draw(halves / part / junk / "cat" / "0.png")
            draw(halves / part / "cat" / junk / "0.png")
    for part in ("train", "test"):
        (halves / part / ".DS_Store").write_bytes(b"\0")
        (halves / part / "cat" / "Thumbs.db").write_bytes(b"\0")
    (halves / "__MACOSX").mkdir()
    source = image_folder(path=str(halves))
    assert source.class_names == ("cat", "dog") and (len(source.train), len(source.test)) == (6, 4)


def test_jfif_is_an_image(halves):
    image = Image.fromarray(np.zeros((6, 6, 3), np.uint8))
    image.save(halves / "train" / "cat" / "saved.jfif", "JPEG")
    assert len(image_folder(path=str(halves)).train) == 7


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of POSIX systems")
def test_named_pipes_are_passed_over_or_named(halves, tmp_path):
    """Opening one would block until another process writes to it."""
    os.mkfifo(halves / "train" / "cat" / "pipe.png")
    assert len(image_folder(path=str(halves)).train) == 6
    os.mkfifo(tmp_path / "data.npz")
    for source in (csv, SOURCES.get("npz")):
        with pytest.raises(DataError, match=r"data\.npz: is not a regular file; give the path of a file$"):
            source(path=str(tmp_path / "data.npz"))
    (tmp_path / "list.csv").write_text("path,label\npets/train/cat/pipe.png,cat\n")
    with pytest.raises(DataError, match="line 2 names .*pipe.png, which is not a file"):
        csv(path=str(tmp_path / "list.csv"))


@pytest.mark.parametrize("length", [256, 5000])
def test_names_longer_than_any_file_are_one_line(tmp_path, length):
    name = "a" * length
    (tmp_path / "list.csv").write_text(f"path,label\n{name}.png,cat\n")
    with pytest.raises(DataError, match=r"list\.csv: line 2 names .*a\.\.\. \(\d+ characters\), which is not a file"):
        csv(path=str(tmp_path / "list.csv"))
    for source in (image_folder, csv):
        with pytest.raises(DataError, match=rf"^a*\.\.\. \({length} characters\): no such") as error:
            source(path=name)
        assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_home_of_nobody_is_a_missing_folder():
    with pytest.raises(DataError, match=r"^~nobody-of-this-name/data: no such folder"):
        image_folder(path="~nobody-of-this-name/data")


@pytest.mark.parametrize("header", ["path,label,label", "path,path,label", "path,label,split,split"])
def test_a_column_that_comes_twice_is_refused(tmp_path, header):
    (tmp_path / "a.csv").write_text(f"{header}\n0.png,x,y,z\n")
    with pytest.raises(DataError, match=r"a\.csv: its header has the column \w+ more than once; remove or rename one$"):
        csv(path=str(tmp_path / "a.csv"))
