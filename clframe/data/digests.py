"""Digests of the samples of a stream, by which the data of a run are recognized later.

A run records for each experience and each part (training, test and held-out samples) their number, a CRC-32 of their
labels in order, and a CRC-32 of what the labels belong to:

- of samples in memory, of type, shape and bytes of the stored inputs: before augmentation and normalization, and before
  the transforms of a domain-incremental stream, which the config determines;
- of image files that are read batch by batch, of their names below the common folder, and of the sizes of up to
  :data:`MOST_SIZES` of them at equal distances.

Not covered: the contents of image files that are read batch by batch, beyond their sizes, and the inputs of other data
sets that are read batch by batch, such as torch data sets with random transforms. A CRC shows accidental changes; data
can be forged to have a given one.
"""

from __future__ import annotations

import logging
import os
import platform
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import PIL
import torch
from torch import Tensor

from clframe.data.inputs import InputFormat
from clframe.data.lazy import DatasetSamples
from clframe.data.samples import TensorSamples
from clframe.data.source import Data
from clframe.errors import RunFolderError
from clframe.records import as_tree, read_record

MOST_SIZES = 8192
"""Files of one part of an experience whose sizes are read: asking for each of a million files takes seconds."""
_CHUNK_BYTES = 2**24
_log = logging.getLogger("clframe.data")

Part = Literal["train", "validation", "test"]
PARTS: Mapping[Part, str] = {"train": "training", "validation": "held-out", "test": "test"}
"""Parts of an experience, with their names in messages."""


@dataclass(frozen=True, kw_only=True)
class SampleDigest:
    """Identity of the samples of one part of an experience."""

    samples: int
    labels: int
    inputs: int | None = None
    """None for inputs that are not in memory."""
    files: int | None = None
    """None for inputs in memory, and where no files are known."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first difference between the data of a stream and those that a run has recorded."""

    experience: int
    """Index of the experience."""
    part: Part
    found: str
    """Start of the predicate of a message that ends with ``when ...``: how the data differ."""
    certain: bool
    """Whether the files differ: not if other software has decoded or computed their inputs, which may change some."""


@dataclass(frozen=True, kw_only=True)
class StreamDigest:
    """Identity of the samples of a stream: one entry per experience in each part."""

    train: tuple[SampleDigest, ...]
    validation: tuple[SampleDigest, ...]
    test: tuple[SampleDigest, ...]
    software: str = ""
    """Versions that inputs depend on, because they are decoded images or computed fractions."""

    def as_tree(self) -> dict[str, Any]:
        """Return plain values; :meth:`of` is the inverse."""
        tree: dict[str, Any] = as_tree(self)
        return tree

    @classmethod
    def of(cls, tree: Mapping[str, Any], *, where: str) -> StreamDigest:
        """Build from :meth:`as_tree`; ``where`` starts the message of the RunFolderError about another content."""
        if not isinstance(tree, Mapping):
            raise RunFolderError(f"{where}: digest: found {tree!r:.40}; restore the file or run again")
        return read_record(cls, tree, prefix=f"{where}: digest.")

    def differences(self, recorded: StreamDigest) -> list[Difference]:
        """Return the first difference of each part of the experiences that both have, by experience.

        Experiences without samples on one side, whose data are gone, are not compared.
        """
        versions = {self.software, recorded.software}
        same_software = len(versions) == 1 or "" in versions  # without one, nothing was decoded or computed
        found = []
        for i, (test, before) in enumerate(zip(self.test, recorded.test, strict=False)):
            if not (test.samples and before.samples):
                continue
            for part, name in PARTS.items():
                pairs = [*zip(getattr(self, part), getattr(recorded, part), strict=False)][i : i + 1]
                for now, then in pairs:
                    text, certain = _compare(now, then, name)
                    if text:
                        found.append(
                            Difference(experience=i, part=part, found=text, certain=certain or same_software)
                        )
        return found

    def fill_from(self, recorded: StreamDigest | None) -> StreamDigest:
        """Return this digest with what was recorded of experiences whose data are gone."""
        if recorded is None:
            return self
        gone = [i for i, (now, then) in enumerate(zip(self.test, recorded.test, strict=False))
                if not now.samples and then.samples]  # fmt: skip

        def fill(now: tuple[SampleDigest, ...], then: tuple[SampleDigest, ...]) -> tuple[SampleDigest, ...]:
            return tuple(then[i] if i in gone and i < len(then) else one for i, one in enumerate(now))

        return replace(
            self, train=fill(self.train, recorded.train), validation=fill(self.validation, recorded.validation),
            test=fill(self.test, recorded.test),
        )  # fmt: skip


def refuse_other_data(
    found: StreamDigest, recorded: StreamDigest | None, *, where: str, advice: str, begun: int | None = None
) -> None:
    """Refuse data that a run has not learned with.

    Inputs that may differ because of other software, and data of which nothing is recorded, are logged only.

    Args:
        found: Digest of the data as they are now.
        recorded: What the run has recorded; None for runs of earlier versions.
        where: Start of the messages.
        advice: End of the message of the error.
        begun: Number of experiences whose training has begun: other training and held-out samples of later ones are
            logged only, since a damaged file may have been replaced before it was needed. None: all have to be equal.

    Raises:
        RunFolderError: Other data; the message names the experience and what differs.
    """
    if recorded is None:
        _log.info("%s: has no digest of its data, which only newer runs record; they are assumed to be the same", where)
        return
    warned = set[str]()
    for one in found.differences(recorded):
        text = f"{where}: experience {one.experience + 1} {one.found} when the run read its data"
        if not one.certain:
            end = f"with {recorded.software} (now {found.software}); make sure that its files have not changed"
        elif begun is not None and one.experience >= begun and one.part != "test":
            end = "for the first time; it is trained on those of now"
        else:
            raise RunFolderError(f"{text}; {advice}")
        if end not in warned:  # once for all experiences
            warned.add(end)
            _log.warning("%s %s", text, end)


def _compare(now: SampleDigest, then: SampleDigest, name: str) -> tuple[str, bool]:
    """Name what differs, empty if nothing does, and say whether it cannot be due to other software."""
    if now.samples != then.samples:
        return f"has {now.samples:,} {name} samples, but had {then.samples:,}", True
    if now.labels != then.labels:
        return f"has other labels of its {now.samples:,} {name} samples than", True
    if None not in (now.inputs, then.inputs) and now.inputs != then.inputs:
        return f"has other {name} samples ({now.samples:,}, as many) than", False
    if None not in (now.files, then.files) and now.files != then.files:
        return f"has {name} files of other names or sizes ({now.samples:,}, as many) than", True
    return "", True


def digest_stream(
    train: Sequence[Data], validation: Sequence[Data], test: Sequence[Data], *, inputs: InputFormat
) -> StreamDigest:
    """Digest the samples of a stream.

    Args:
        train: Training samples of each experience, as in ``validation`` and ``test``.
        validation: Held-out samples; empty if there are none.
        test: Test samples.
        inputs: Conversion of files to inputs.
    """
    # The experiences of a domain-incremental stream are views of the same tensors.
    known: dict[int, int] = {}

    def digest(samples: Data) -> SampleDigest:
        count, labels = len(samples), _checksum(samples.y)
        if isinstance(samples, TensorSamples):
            key = id(samples.x)
            if key not in known:
                known[key] = _checksum(samples.x)
            return SampleDigest(samples=count, labels=labels, inputs=known[key])
        return SampleDigest(samples=count, labels=labels, files=_checksum_files(samples))

    return StreamDigest(
        train=tuple(map(digest, train)), validation=tuple(map(digest, validation)), test=tuple(map(digest, test)),
        software=_software(inputs, test[0]) if test else "",
    )  # fmt: skip


def _checksum(x: Tensor) -> int:
    """CRC-32 of type, shape and bytes; about 1 s per GB."""
    value = zlib.crc32(f"{x.dtype} {tuple(x.shape)}".encode())
    rows = max(1, _CHUNK_BYTES // max(1, x[:1].nbytes))
    for part in x.split(rows):
        value = zlib.crc32(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), value)
    return value


def _checksum_files(samples: DatasetSamples) -> int | None:
    """CRC-32 of names and sizes of files; a file that is gone has the size -1."""
    if not samples.paths:
        return None
    # Of sorted texts, the first and the last have the shortest common start; it is cut off at a separator.
    start = os.path.commonprefix([min(samples.paths), max(samples.paths)])  # noqa: RUF071
    skipped = start.rfind(os.sep) + 1
    paths = [samples.paths[i % len(samples.paths)] for i in samples.index.tolist()]  # each domain has further indices
    names = "\0".join(path[skipped:].replace(os.sep, "/") for path in paths)
    sizes = [_size(path) for path in paths[:: -(-len(paths) // MOST_SIZES) or 1]]
    return zlib.crc32(repr(sizes).encode(), zlib.crc32(names.encode(errors="surrogateescape")))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _software(inputs: InputFormat, samples: Data) -> str:
    """Versions that the stored inputs depend on."""
    versions = [f"Pillow {PIL.__version__}"] if inputs.kind == "image" else []
    if isinstance(samples, TensorSamples) and samples.x.is_floating_point():
        versions += [f"torch {torch.__version__}", f"numpy {np.__version__}", platform.machine()]
    return ", ".join(versions)
