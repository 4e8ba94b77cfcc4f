"""Files that claim absurd sizes or nest absurdly end in one line, without allocating what they claim."""

from __future__ import annotations

import json
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch

from clframe.config.typed import same_config
from clframe.data import SOURCES
from clframe.errors import DataError
from clframe.files import parse_json, read_text
from clframe.training.event_files import merge_events

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 20))
"""2 * 10^19 values in 20 lines."""
DEEP = "[" * 100_000


def newest(run):
    return run / "checkpoints" / "experience_002.ckpt"


def change(path, edit):
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


def shared(depth=30):
    values = [0]
    for _ in range(depth):
        values = [values] * 10
    return values


def looped():
    values: list = []
    values.append(values)
    return values


# --- checkpoints ---

CONTENTS = {
    "a tensor of repeated elements": lambda c: c["components"].update(er=torch.zeros(1).expand(10**12)),
    "lists that share lists": lambda c: c.update(loss_terms=shared()),
    "a list in itself": lambda c: c.update(loss_terms=looped()),
    "a sparse tensor": lambda c: c.update(x=torch.sparse_coo_tensor(torch.tensor([[0]]), [1.0], (10**12,))),
}


@pytest.mark.parametrize("verb", [pytest.param("resume", marks=pytest.mark.slow), "predict"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_the_content_of_a_checkpoint(kind, verb, run, refused, readers):
    (run / "checkpoints" / "experience_001.ckpt").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sparse tensors
        change(newest(run), CONTENTS[kind])
    refused(readers[verb], "experience_002.ckpt: is damaged or no checkpoint of clframe, and no intact one is left")


@pytest.mark.parametrize("elements", [10**12, 5, 3])
def test_the_size_of_a_storage(elements, run, refused, readers):
    """The header of the pickle says more elements, or fewer, than the record has: torch 2.6 does not check that."""
    path = newest(run)
    change(path, lambda c: c.clear() or c.update(format=3, finished=2, w=torch.arange(4.0), v=torch.ones(elements % 7)))

    def claim(data):
        old = b"X\x03\x00\x00\x00cpuq\x08K\x04"
        assert old in data
        return data.replace(old, old[:-2] + b"\x8a\x08" + struct.pack("<q", elements))

    rewrite(path, claim)
    (run / "checkpoints" / "experience_001.ckpt").unlink()
    refused(readers["predict"], "experience_002.ckpt: is damaged")


def test_compressed_parts(run, refused, readers):
    """A gigabyte of zeros in a megabyte."""
    path = newest(run)
    rewrite(path, lambda data: data, method=zipfile.ZIP_DEFLATED, more=("x/data/999", bytes(2**24)))
    (run / "checkpoints" / "experience_001.ckpt").unlink()
    refused(readers["predict"], "experience_002.ckpt: is damaged")


@pytest.mark.parametrize("shape", [(10**6, 10**6, 3), (0,), (-1, 8, 8), ("x",), (), None])
def test_the_shape_of_the_inputs(shape, run, refused, readers):
    change(newest(run), lambda c: c["data"].update(input_shape=shape))
    refused(readers["predict"], "run: the newest checkpoint does not fit its config (")


@pytest.mark.parametrize("key", ["data", "network", "components", "past"])
def test_a_missing_part(key, run, refused, readers):
    change(newest(run), lambda c: c.pop(key))
    refused(readers["predict"], "the newest checkpoint does not fit its config (")


@pytest.mark.parametrize("text", [BOMB, *(pytest.param(t, marks=pytest.mark.slow) for t in (DEEP, "a: [", "\x00"))])
def test_the_config_in_a_checkpoint(text, run, refused, readers):
    assert not same_config(text, (run / "config.yaml").read_text())
    change(newest(run), lambda c: c.update(config=text))
    refused(readers["resume"], "was written by another config; resume with the run's own config.yaml")


def rewrite(path, edit, *, method=zipfile.ZIP_STORED, more=None):
    """Write the archive again with another pickle."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in parts.items():
            archive.writestr(name, edit(data) if name.endswith("data.pkl") else data)
        if more is not None:
            archive.writestr(*more)


# --- weights in safetensors ---


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 90_000_000) + b"{}",
        (lambda header: struct.pack("<Q", len(header)) + header)(
            json.dumps({"network/w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
        ),
        (lambda header: struct.pack("<Q", len(header)) + header)(
            json.dumps({"__metadata__": {"clframe": DEEP}}).encode()
        ),
    ],
    ids=["length", "header", "tensor", "depth"],
)
def test_safetensors(data, run, refused, readers):
    pytest.importorskip("safetensors")
    for path in [*(run / "checkpoints").iterdir()]:
        path.unlink()
    (run / "checkpoints").rmdir()
    (run / "model.safetensors").write_bytes(data)
    refused(readers["predict"], "run/model.safetensors: cannot be read as a model of clframe (")


# --- arrays and images ---


def npz(path, *, shape="(1000000000000,)", length=None, name="x.npy", version=b"\x01\x00"):
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(118).encode() + b"\n"
    size = struct.pack("<H" if version == b"\x01\x00" else "<I", len(header) if length is None else length)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"\x93NUMPY" + version + size + header + bytes(8))


@pytest.mark.parametrize(
    "options, text",
    [
        ({}, "x declares shape (1000000000000,), which is more than the file has"),
        ({"shape": "(-1,)"}, "x declares shape (-1,), which is more"),
        ({"version": b"\x02\x00", "length": 2**32 - 1}, "x has a header of 4,294,967,295 bytes"),
    ],
)
def test_arrays(options, text, run, refused, readers):
    npz(run.parent / "inputs.npz", **options)
    refused(readers["predict"], f"inputs.npz: cannot be read as .npz ({text}")
    for name in ("x", "y"):
        npz(run.parent / f"{name}.npz", name=f"{name}.npy", **options)
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        SOURCES.get("npz")(path=str(run.parent / "inputs.npz"))


def test_a_compressed_array_that_claims_too_much(run, refused, readers):
    path = run.parent / "inputs.npz"
    np.savez_compressed(path, x=np.zeros((4000, 1, 8, 8), dtype=np.uint8))
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 2**32 - 2)  # uncompressed size in the directory
    path.write_bytes(data)
    refused(readers["predict"], "inputs.npz: cannot be read as .npz (x declares 4,294,967,294 bytes, which is more")


def png(width, height, *, text=b""):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    extra = chunk(b"zTXt", b"a\0\0" + text) if text else b""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(b"\0" * 9 * 8)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data", [png(2**31 - 1, 2**31 - 1), png(60_000, 60_000), png(8, 8, text=zlib.compress(bytes(2**27)))],
    ids=["widest", "large", "text"],
)  # fmt: skip
def test_an_image(data, run, refused):
    (run.parent / "a.png").write_bytes(data)
    refused(["predict", "run", "a.png"], "predict: none of 1 inputs could be read; give other files")


# --- texts ---


def sparse(path):
    """A terabyte that takes no space on the disk."""
    with open(path, "wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize("make", [sparse, lambda path: path.write_text(DEEP)], ids=["size", "depth"])
@pytest.mark.parametrize("name", ["results.json", "environment.json", "ledger.json", "latency.json"])
def test_json(name, make, run, refused, readers):
    make(run / name)
    refused(readers["report"], f"run/{name}: ")


def test_metrics(run, refused, readers):
    sparse(run / "metrics.csv")
    refused(readers["report"], "run/metrics.csv: is damaged")


@pytest.mark.parametrize("make", [sparse, lambda path: path.write_text(DEEP), lambda path: path.write_text(BOMB)],
                         ids=["size", "depth", "aliases"])  # fmt: skip
@pytest.mark.parametrize("verb", ["report", *(pytest.param(v, marks=pytest.mark.slow) for v in ("resume", "predict"))])
def test_the_config(verb, make, run, refused, readers):
    make(run / "config.yaml")
    refused(readers[verb], "run/config.yaml: invalid YAML (")


def test_a_config_of_aliases_as_an_argument(here, refused):
    (here / "my.yaml").write_text(BOMB)
    refused(["run", "my.yaml"], "my.yaml: invalid YAML (its aliases expand to more than 200,000 values); fix the file")


@pytest.mark.parametrize("field", ["parameters", "macs", "steps", "train_seconds", "seed"])
def test_numbers_of_thousands_of_digits(field, run, refused, readers):
    file = run / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: 10**4000}))
    refused(readers["report"], f"run/results.json: {field}: found a number of more than 30 digits; restore the file")


def test_text_of_up_to_a_size(tmp_path):
    (tmp_path / "a").write_text("äb")
    assert read_text(tmp_path / "a", most=3) == "äb"
    with pytest.raises(ValueError, match="has more than 2 bytes"):
        read_text(tmp_path / "a", most=2)
    with pytest.raises(IsADirectoryError):
        read_text(tmp_path)
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(DEEP)


def test_an_event_file(tmp_path):
    """A record that claims 2^60 bytes, with a valid checksum, ends the file as a cut record does."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    length = struct.pack("<Q", 2**60)
    (tmp_path / "events.out.tfevents.1.host").write_bytes(length + struct.pack("<I", masked_crc32c(length)) + b"x")
    assert merge_events(tmp_path, lambda tag, step: True) == ()
