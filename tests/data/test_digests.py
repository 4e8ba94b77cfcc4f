"""Digests of data: what they are made of, what they notice, and what they leave out."""

from __future__ import annotations

import logging
import shutil
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from clframe.data import SOURCES, Source, TensorSamples, class_incremental, digests
from clframe.data.chain import Stored, append_missing, extend_benchmark
from clframe.data.digests import SampleDigest, StreamDigest, refuse_other_data
from clframe.data.streams import online_stream, permuted_stream
from clframe.errors import RunFolderError

LABELS = torch.tensor([0, 1, 0, 2, 1, 2, 0, 1])


def source(x=None, *, test=None, y=LABELS):
    """Eight samples of three classes with 2 x 3 bytes each."""
    x = torch.arange(48, dtype=torch.uint8).reshape(8, 2, 3) if x is None else x
    return Source("eight", TensorSamples(x, y), TensorSamples(x if test is None else test, y), 3)


def stream(*args, **kwargs):
    return class_incremental(source(*args, **kwargs), experiences=3, order="sorted")


def test_a_checksum_is_that_of_type_shape_and_bytes(monkeypatch):
    x = torch.arange(12, dtype=torch.int16).reshape(3, 2, 2)
    expected = zlib.crc32(b"torch.int16 (3, 2, 2)" + struct.pack("=12h", *range(12)))
    assert digests._checksum(x) == expected
    apart = torch.stack([x, x], 3)[..., 0]
    assert not apart.is_contiguous() and digests._checksum(apart) == expected
    monkeypatch.setattr(digests, "_CHUNK_BYTES", 10)  # one row at a time
    assert digests._checksum(x) == expected
    others = (x.reshape(3, 4), x.view(torch.float16), x.int(), x.flip(0), x + torch.eye(2, dtype=torch.int16), x[:2])
    assert len({expected, *map(digests._checksum, others)}) == 7
    assert digests._checksum(x[:0].bfloat16()) == zlib.crc32(b"torch.bfloat16 (0, 2, 2)")


def test_each_part_of_each_experience_has_its_own():
    found = stream(test=torch.zeros(8, 2, 3, dtype=torch.uint8)).digest
    assert [one.samples for one in found.train] == [one.samples for one in found.test] == [3, 3, 2]
    first = torch.tensor([0, 2, 6])
    x = torch.arange(48, dtype=torch.uint8).reshape(8, 2, 3)[first]
    assert found.train[0] == SampleDigest(
        samples=3, labels=zlib.crc32(b"torch.int64 (3,)" + bytes(24)),
        inputs=zlib.crc32(b"torch.uint8 (3, 2, 3)" + x.numpy().tobytes()),
    )  # fmt: skip
    assert len({one.inputs for one in found.train}) == 3
    assert found.validation == () and found.software == ""  # bytes of arrays
    assert stream(torch.zeros(8, 2, 3)).digest.software.startswith(f"torch {torch.__version__}, numpy")
    images = replace(source(), inputs=replace(source().inputs, kind="image"))
    assert class_incremental(images, experiences=1).digest.software.startswith("Pillow ")
    held = class_incremental(source(), experiences=1, validation=0.5).digest
    assert held.validation[0].samples + held.train[0].samples == 8


def test_plain_values_give_the_same_digest():
    found = class_incremental(source(), experiences=2, validation=0.5).digest
    assert StreamDigest.of(found.as_tree(), where="run") == found
    for wrong in (3, {}, {**found.as_tree(), "train": [3]}, {**found.as_tree(), "test": [{"samples": "3", "labels": 1}]}):
        with pytest.raises(RunFolderError, match=r"^run: digest[:.]"):
            StreamDigest.of(wrong, where="run")


def test_views_and_small_experiences_are_those_of_the_same_samples():
    permuted = permuted_stream(source(), experiences=3).digest
    assert permuted.train == (permuted.train[0],) * 3 and permuted.test == (permuted.test[0],) * 3
    assert permuted.train[0].inputs == class_incremental(source(), experiences=1).digest.train[0].inputs
    one = online_stream(class_incremental(source(), experiences=2, order="sorted"), size=2, seed=1)
    other = online_stream(class_incremental(source(), experiences=2, order="sorted"), size=3, seed=1)
    assert len(one.train) == 4 and [part.samples for part in one.digest.train] == [6, 2]
    assert one.digest == other.digest  # of the original experiences, in the order of the stream


def changed(**parts):
    """The stream with one changed value in the inputs of a sample of a class."""
    x = {part: torch.arange(48, dtype=torch.uint8).reshape(8, 2, 3) for part in ("train", "test")}
    for part, row in parts.items():
        x[part][row, 1, 2] += 1
    return stream(x["train"], test=x["test"]).digest


def test_differences_name_experience_part_and_kind():
    base = stream().digest
    assert base.differences(stream().digest) == []
    (one,) = changed(train=4).differences(base)
    assert (one.experience, one.part, one.certain) == (1, "train", True)
    assert one.found == "has other training samples (3, as many) than"
    assert [(d.experience, d.part) for d in changed(train=3, test=0).differences(base)] == [(0, "test"), (2, "train")]
    more = torch.cat([LABELS, torch.tensor([2])])
    larger = stream(torch.arange(54, dtype=torch.uint8).reshape(9, 2, 3), y=more).digest
    assert [d.found for d in larger.differences(base)] == [
        "has 3 training samples, but had 2", "has 3 test samples, but had 2"
    ]  # fmt: skip
    relabeled = class_incremental(source(y=torch.tensor([1, 1, 0, 2, 0, 2, 0, 1])), experiences=1).digest
    (label, _) = relabeled.differences(class_incremental(source(), experiences=1).digest)
    assert label.found == "has other labels of its 8 training samples than"


def test_data_that_are_gone_are_not_compared_and_stay_recorded():
    stored = Stored.of(stream())
    gone = append_missing(None, "eight", experiences=((0,), (1,), (2,)), class_names=(), stored=stored)
    new = replace(source(torch.ones(8, 2, 3, dtype=torch.uint8)), class_names=("a", "b", "c"))
    both = [extend_benchmark(start, new, stored=stored) for start in (stream(), gone)]
    assert both[1].digest.differences(changed(train=0, test=3)) == []
    assert both[1].digest.fill_from(both[0].digest) == both[0].digest != both[1].digest
    assert both[1].digest.fill_from(stream().digest) == both[0].digest
    assert both[0].digest.fill_from(changed(train=0)) == both[0].digest  # what is there is not replaced
    assert both[0].digest.fill_from(None) is both[0].digest


@pytest.mark.parametrize(
    ("found", "begun", "refusal", "warning"),
    [
        (changed(test=0), None, "run: experience 1 has other test samples (3, as many) than when the run read its data; do", ""),
        (changed(train=4), 2, "run: experience 2 has other training samples (3, as many) than when the run read", ""),
        (changed(train=4), 1, "", "run: experience 2 has other training samples (3, as many) than when the run read its data "
         "for the first time; it is trained on those of now"),
        (changed(test=4), 1, "run: experience 2 has other test samples", ""),
        (replace(changed(test=0, train=4), software="Pillow 2"), None, "", "run: experience 1 has other test samples (3, as many) than "
         "when the run read its data with Pillow 1 (now Pillow 2); make sure that its files have not changed"),
        (replace(changed(test=0), software="Pillow 1"), None, "run: experience 1 has other test samples", ""),
        (replace(changed(test=0), software=""), None, "run: experience 1 has other test samples", ""),
    ],
)  # fmt: skip
def test_what_is_refused_and_what_is_logged(found, begun, refusal, warning, caplog):
    caplog.set_level(logging.INFO)
    base = replace(stream().digest, software="Pillow 1")
    if refusal:
        with pytest.raises(RunFolderError) as error:
            refuse_other_data(found, base, where="run", advice="do this", begun=begun)
        assert str(error.value).startswith(refusal) and str(error.value).endswith("; do this")
    else:
        refuse_other_data(found, base, where="run", advice="", begun=begun)
    assert caplog.messages == ([warning] if warning else [])


def test_runs_of_earlier_versions_have_none(caplog):
    caplog.set_level(logging.INFO)
    refuse_other_data(stream().digest, None, where="run", advice="")
    assert caplog.messages == [
        "run: has no digest of its data, which only newer runs record; they are assumed to be the same"
    ]


# --- image files ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes with three training and two test images of noise."""
    root, draw = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    for part, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (5, 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def digest_of(root, **options):
    made = SOURCES.get("image_folder")(path=str(root), **options)
    return class_incremental(made, experiences=2, order="sorted").digest


def test_files_that_are_read_in_batches_are_recognized_by_name_and_size(photos, tmp_path, monkeypatch):
    found = digest_of(photos, memory_gb=0)
    sizes = [(photos / "test" / "dog" / f"{i}.png").stat().st_size for i in range(2)]
    names = b"test/dog/0.png\0test/dog/1.png"
    assert found.test[1].files == zlib.crc32(repr(sizes).encode(), zlib.crc32(names)) and found.test[1].inputs is None
    copy = shutil.copytree(photos, tmp_path / "elsewhere" / "copy")
    assert digest_of(copy, memory_gb=0) == found
    assert digest_of(copy, memory_gb=0, cache=tmp_path / "cache") == found
    file = copy / "train" / "cat" / "1.png"
    file.write_bytes(file.read_bytes() + b"\0")
    (size,) = digest_of(copy, memory_gb=0).differences(found)
    assert (size.experience, size.part) == (0, "train")
    assert size.found == "has training files of other names or sizes (3, as many) than"
    monkeypatch.setattr(digests, "MOST_SIZES", 2)  # of the files 0, 1 and 2 those of 0 and 2
    assert digest_of(copy, memory_gb=0) == digest_of(photos, memory_gb=0)
    file.rename(file.with_name("1b.png"))
    (name,) = digest_of(copy, memory_gb=0).differences(digest_of(photos, memory_gb=0))
    assert name == size


def test_a_file_that_is_gone_has_no_size(tmp_path):
    assert digests._size(str(tmp_path / "gone.png")) == -1


def test_files_in_memory_are_recognized_by_their_pixels(photos, tmp_path):
    found = digest_of(photos)
    assert found.test[1].inputs is not None and found.test[1].files is None and found.software.startswith("Pillow ")
    copy = shutil.copytree(photos, tmp_path / "copy")
    file = copy / "test" / "dog" / "0.png"
    file.write_bytes(file.read_bytes() + b"\0")  # the same pixels
    assert digest_of(copy) == found
    pixels = np.asarray(Image.open(file)).copy()
    pixels[2, 3, 1] ^= 1
    Image.fromarray(pixels).save(file)
    (one,) = digest_of(copy).differences(found)
    assert (one.experience, one.part, one.certain) == (1, "test", True)
