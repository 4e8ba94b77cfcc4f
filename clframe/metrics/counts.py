"""Integers by test experience and class, most of them 0: an experience has few of the classes of a stream.

Shape suffixes: E experiences (rows), C classes (columns), N counts that are not 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np

from clframe.errors import ClframeError

Row = tuple[int, ...]


@final
class Counts(Sequence[Row]):
    """An immutable matrix of integers from 0 that reads like a tuple of rows and stores what is not 0.

    A run keeps one per evaluation: as tuples, the evaluations of a stream of 500 experiences of one class each would
    take 3 GB; this takes 8 bytes per count that is not 0.

    >>> counts = Counts.of([[3, 0], [0, 2]])
    >>> counts[0], counts.sum_by_column(), counts == ((3, 0), (0, 2))
    ((3, 0), (3, 2), True)
    """

    __slots__ = ("_at_N", "_count_N", "shape")

    def __init__(self, shape: tuple[int, int], at_N: Any, count_N: Any) -> None:
        self.shape = shape
        self._at_N = np.asarray(at_N, dtype=np.int64)
        self._count_N = np.asarray(count_N, dtype=np.int64)
        if self._at_N.shape != self._count_N.shape or self._at_N.ndim != 1:
            raise ClframeError("tally: positions and counts differ in number; restore the file")
        size = shape[0] * shape[1]
        if (self._at_N < 0).any() or (self._at_N >= size).any() or (np.diff(self._at_N) <= 0).any():
            raise ClframeError(f"tally: positions are not rising from 0 to below {size}; restore the file")
        if size < 2**31 and (self._count_N < 2**31).all():  # half the memory
            self._at_N, self._count_N = self._at_N.astype(np.int32), self._count_N.astype(np.int32)

    @classmethod
    def of(cls, rows: Counts | Mapping[str, Any] | Iterable[Iterable[int]]) -> Counts:
        """Return counts of rows, or of what :meth:`as_tree` returned.

        Raises:
            ClframeError: Rows of different lengths, or a tree that contradicts itself.
        """
        if isinstance(rows, Counts):
            return rows
        if isinstance(rows, Mapping):
            experiences, classes = rows["shape"]
            return cls((int(experiences), int(classes)), rows["at"], rows["count"])
        dense: Any = rows if isinstance(rows, np.ndarray) else [[int(count) for count in row] for row in rows]
        if len({len(row) for row in dense}) > 1:
            raise ClframeError("tally: rows differ in shape; give experiences x classes")
        count_EC = np.asarray(dense, dtype=np.int64).reshape(len(dense), len(dense[0]) if len(dense) else 0)
        flat = count_EC.ravel()
        (at_N,) = flat.nonzero()
        return cls((count_EC.shape[0], count_EC.shape[1]), at_N, flat[at_N])

    def as_tree(self) -> dict[str, Any]:
        """Return shape, positions and counts as plain values."""
        return {"shape": list(self.shape), "at": self._at_N.tolist(), "count": self._count_N.tolist()}

    def sum_by_row(self) -> Row:
        """Return the sum over classes of each experience."""
        return self._sum(self._at_N // max(self.shape[1], 1), self.shape[0])

    def sum_by_column(self) -> Row:
        """Return the sum over experiences of each class."""
        return self._sum(self._at_N % max(self.shape[1], 1), self.shape[1])

    def excess(self, most: Counts) -> Iterator[tuple[int, int]]:
        """Yield each count that is below 0 or above that of ``most``, of the same shape, with the latter."""
        most_N = np.zeros_like(self._count_N)
        at = np.searchsorted(most._at_N, self._at_N)
        found = at < len(most._at_N)
        found[found] = most._at_N[at[found]] == self._at_N[found]
        most_N[found] = most._count_N[at[found]]
        for i in ((self._count_N < 0) | (self._count_N > most_N)).nonzero()[0]:
            yield int(self._count_N[i]), int(most_N[i])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[e] for e in range(*index.indices(len(self))))
        experience, classes = range(len(self))[index], self.shape[1]
        start, stop = np.searchsorted(self._at_N, (experience * classes, (experience + 1) * classes))
        row = [0] * classes
        for at, count in zip(self._at_N[start:stop].tolist(), self._count_N[start:stop].tolist(), strict=True):
            row[at - experience * classes] = count
        return tuple(row)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Counts):
            same = np.array_equal(self._at_N, other._at_N) and np.array_equal(self._count_N, other._count_N)
            return same and self.shape == other.shape
        return tuple(self) == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.shape, self._at_N.tobytes(), self._count_N.tobytes()))

    def __repr__(self) -> str:
        return repr(tuple(self))

    def _sum(self, of_N: Any, size: int) -> Row:
        sums = np.zeros(size, dtype=np.int64)
        np.add.at(sums, of_N, self._count_N)
        return tuple(sums.tolist())
