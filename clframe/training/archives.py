"""Files of ``torch.save`` from a stranger: no code of theirs runs, and the sizes that they declare are not believed."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor


def load_archive(path: Path, *, device: torch.device) -> Any:
    """Load a file of ``torch.save`` without running code, and without allocating more than its size.

    Tensors saved on an accelerator are moved to ``device``.

    Raises:
        ValueError: Parts that are damaged or compressed, or a content whose declared size is not that of the file.
        Exception: Anything else that ``zipfile`` and ``torch.load`` raise for damaged files.
    """
    accelerators = [*(f"cuda:{i}" for i in range(64)), "mps", "mps:0"]
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        # torch.save compresses nothing: compressed or overlapping parts would expand to any size.
        stored = all(p.compress_type == zipfile.ZIP_STORED and p.file_size == p.compress_size for p in parts)
        if not stored or sum(part.file_size for part in parts) > size:
            raise ValueError("its parts are larger than the file")
        # torch.load checks no CRC: without this, most flipped bits load as other weights.
        if archive.testzip() is not None:
            raise ValueError("the CRC of a part is wrong")
        _check_storages(archive)
    content = torch.load(path, map_location=dict.fromkeys(accelerators, str(device)), weights_only=True)
    _check_extent(content, size=size)
    return content


class _Anything:
    """Any object of a pickle that is read for its storages only."""

    def __init__(self, *_: Any) -> None:
        """Take the arguments of any class."""

    def __setstate__(self, _: Any) -> None:
        """Ignore a state."""

    def __setitem__(self, *_: Any) -> None:
        """Ignore an item of a mapping."""


class _StorageReader(pickle.Unpickler):
    """Reads which storages a pickle names. Classes are neither imported nor called."""

    sizes: ClassVar[dict[str, int]] = {
        f"{name}Storage": size
        for size, names in {
            1: ("Untyped", "Byte", "Char", "Bool"), 2: ("Half", "BFloat16", "Short"), 4: ("Float", "Int"),
            8: ("Double", "Long", "ComplexFloat"), 16: ("ComplexDouble",),
        }.items()
        for name in names
    }  # fmt: skip
    """Bytes of an element by the name of the storage's class."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.bytes: list[tuple[str, int]] = []
        """Name of the record and its bytes, for every mention of a storage."""

    def find_class(self, module: str, name: str) -> type:
        """Return a class that does nothing."""
        return type(name, (_Anything,), {})

    def persistent_load(self, pid: Any) -> _Anything:
        """Note a storage."""
        _, kind, record, _, elements = pid
        self.bytes.append((record, elements * self.sizes[kind.__name__]))
        return _Anything()


def _check_storages(archive: zipfile.ZipFile) -> None:
    """Refuse storages that are not of the size of their records: torch 2.6 reads beyond a record that is shorter.

    Raises:
        ValueError: A storage of another size.
    """
    name = next((name for name in archive.namelist() if name.endswith("/data.pkl")), "")
    with archive.open(name) as file:
        reader = _StorageReader(file)
        reader.load()
    root = name.removesuffix("data.pkl")
    if any(archive.getinfo(f"{root}data/{record}").file_size != size for record, size in reader.bytes):
        raise ValueError("a storage is not of the size of its record")


_MOST_VALUES = 10**7
"""Values of a checkpoint, counting those of a list once for every reference to it."""


def _check_extent(content: Any, *, size: int) -> None:
    """Refuse a content that grows when it is copied: shared lists nested in lists, and tensors of repeated elements.

    Raises:
        ValueError: More values than a checkpoint has, or a tensor larger than the file.
    """
    counts: dict[int, int] = {}

    def count(value: Any) -> int:
        if isinstance(value, Tensor):
            # Sparse and quantized tensors have no storage of their declared size; clframe writes neither.
            if value.layout != torch.strided or value.is_quantized or value.nbytes > max(size, 2**20):
                raise ValueError("a tensor is larger than the file")
            return 1
        if not isinstance(value, (dict, list, tuple, set)):
            return 1
        if id(value) not in counts:
            counts[id(value)] = _MOST_VALUES + 1  # of a list that contains itself
            items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            total = 1
            for item in items:
                total += count(item)
                if total > _MOST_VALUES:
                    raise ValueError("more values than a checkpoint has")
            counts[id(value)] = total
        elif counts[id(value)] > _MOST_VALUES:
            raise ValueError("a value that contains itself")
        return counts[id(value)]

    count(content)
