"""The ledger: costs of a run in MACs (one multiply-add counts 1; FLOPs = 2 x MACs), samples, seconds, bytes, joules.

Entries are appended, never changed. Each has an experience, a phase, a component and an exit; queries are sums over
entries. Dense and effective counts are separate: products with zeros lower only the latter. Operators that could not be
counted are listed by :meth:`Ledger.uncounted`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from clframe.accounting.entries import (
    CONVENTION,
    PHASES,
    SCHEMA,
    Count,
    Entry,
    Figure,
    Joules,
    Phase,
    Size,
    Time,
    as_rows,
    read_row,
)
from clframe.accounting.measurement import Energy
from clframe.accounting.predictions import Predictions
from clframe.errors import ConfigError, RunFolderError, UnknownNameError, reason_of, unknown_name

Key = TypeVar("Key")


class Ledger:
    """Costs of a run.

    Attributes:
        predictions: Costs of one prediction, which are not part of the costs of the run.

    >>> ledger = Ledger()
    >>> ledger.add("forward", macs=100, experience=0, samples=4, steps=2)
    >>> ledger.add("teachers", macs=40, experience=1, component="lwf")
    >>> ledger.by_phase(), ledger.by_component(), ledger.macs
    ({'forward': 100, 'teachers': 40}, {'': 100, 'lwf': 40}, 140)
    """

    def __init__(self) -> None:
        self.predictions = Predictions()
        self._entries: list[Entry] = []
        self._times: list[Time] = []
        self._sizes: list[Size] = []
        self._energy: list[Joules] = []
        self._figures: list[Figure] = []
        self._uncounted: Counter[str] = Counter()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries, in order."""
        return tuple(self._entries)

    # --- entries ----------------------------------------------------------------------------------

    def add(
        self,
        phase: Phase,
        *,
        macs: int,
        experience: int | None = None,
        component: str = "",
        exit: str = "",
        samples: int = 0,
        steps: int = 0,
        effective_macs: int | None = None,
    ) -> None:
        """Append one entry; see :class:`Entry`.

        Raises:
            UnknownNameError: Unknown phase.
            ConfigError: A negative count, or more effective than dense MACs.
        """
        if phase not in PHASES:
            raise UnknownNameError(unknown_name("phase", phase, PHASES))
        if min(macs, samples, steps, effective_macs or 0) < 0 or (effective_macs or 0) > macs:
            raise ConfigError(
                f"ledger: found macs {macs}, effective {effective_macs}, samples {samples}, steps {steps}; use counts "
                f"of at least 0, and effective ones of at most macs"
            )
        entry = Entry(phase=phase, macs=macs, experience=experience, component=component, exit=exit, samples=samples,
                      steps=steps, effective_macs=effective_macs)  # fmt: skip
        self._entries.append(entry)

    def add_time(self, phase: str, *, seconds: float, experience: int | None = None) -> None:
        """Append wall time of a phase, such as ``training``, ``evaluation`` or ``accounting``."""
        self._times.append(Time(phase=phase, seconds=seconds, experience=experience))

    def add_bytes(self, kind: str, *, bytes: int, component: str = "", experience: int | None = None) -> None:
        """Append the bytes that a kind of object uses from now on."""
        self._sizes.append(Size(kind=kind, bytes=bytes, component=component, experience=experience))

    def add_energy(self, energy: Energy, *, experience: int | None = None) -> None:
        """Append the reading of a counter, or that there was none."""
        self._energy.append(Joules(joules=energy.joules, energy_source=energy.energy_source, experience=experience))

    def add_figure(self, name: str, *, value: int, component: str = "", experience: int | None = None) -> None:
        """Append a number that a component declares."""
        self._figures.append(Figure(name=name, value=value, component=component, experience=experience))

    def add_uncounted(self, calls: Mapping[str, int]) -> None:
        """Add calls of operators or plugins that were not counted, by name."""
        self._uncounted.update(calls)

    # --- queries ----------------------------------------------------------------------------------

    @property
    def macs(self) -> int:
        """All multiply-adds of the run, dense."""
        return sum(entry.macs for entry in self._entries)

    @property
    def training_macs(self) -> int:
        """Multiply-adds of the run without evaluations, dense."""
        return sum(entry.macs for entry in self._entries if entry.phase != "evaluation")

    def by_phase(self, *, experience: int | None = None, count: Count = "dense") -> dict[str, int]:
        """Return MACs by phase, in the order of :data:`PHASES`; of one experience if given."""
        found = self._sum(lambda entry: entry.phase, experience, count)
        return {phase: found[phase] for phase in PHASES if phase in found}

    def by_component(self, *, experience: int | None = None, count: Count = "dense") -> dict[str, int]:
        """Return MACs by component, with an empty name for the network; of one experience if given."""
        return self._sum(lambda entry: entry.component, experience, count)

    def by_exit(self, *, experience: int | None = None, count: Count = "dense") -> dict[str, int]:
        """Return MACs by the exit at which samples stopped, with an empty name for those that passed all."""
        return self._sum(lambda entry: entry.exit, experience, count)

    def by_experience(self, *, count: Count = "dense") -> dict[int | None, int]:
        """Return MACs by experience."""
        return self._sum(lambda entry: entry.experience, None, count)

    def samples(self, phase: Phase = "forward", *, experience: int | None = None) -> int:
        """Count the samples of a phase, repeated ones each time."""
        return sum(e.samples for e in self._entries if e.phase == phase and experience in (None, e.experience))

    def steps(self, *, experience: int | None = None) -> int:
        """Count optimizer steps."""
        return sum(e.steps for e in self._entries if experience in (None, e.experience))

    def seconds(self, *, experience: int | None = None) -> dict[str, float]:
        """Return wall time by phase."""
        found: dict[str, float] = {}
        for time in self._times:
            if experience in (None, time.experience):
                found[time.phase] = found.get(time.phase, 0.0) + time.seconds
        return found

    def bytes(self) -> dict[str, int]:
        """Return the latest bytes by kind, summed over components; for peaks the largest."""
        newest = {(size.kind, size.component): size.bytes for size in self._sizes}
        found: dict[str, int] = {}
        for (kind, _), count in newest.items():
            found[kind] = found.get(kind, 0) + count
        for size in self._sizes:
            if size.kind.endswith("peak"):
                found[size.kind] = max(found[size.kind], size.bytes)
        return found

    def energy(self) -> Energy:
        """Return the energy of all metered blocks; None unless every block has a reading of the same source."""
        sources = {part.energy_source for part in self._energy}
        figures = [part.joules for part in self._energy if part.joules is not None]
        if len(sources) != 1:
            return Energy(None, "none")
        whole = len(figures) == len(self._energy)
        return Energy(sum(figures) if whole else None, sources.pop())  # type: ignore[arg-type]  # read back as text

    def figures(self) -> dict[tuple[str, str], int]:
        """Return the latest declared numbers, by component and name."""
        return {(figure.component, figure.name): figure.value for figure in self._figures}

    def uncounted(self) -> dict[str, int]:
        """Return calls of what was not counted, by name; empty if everything was."""
        return dict(sorted(self._uncounted.items()))

    # --- storing ----------------------------------------------------------------------------------

    def as_tree(self) -> dict[str, Any]:
        """Return the ledger as plain values; :meth:`of` is the inverse."""
        return {
            "schema_version": SCHEMA,
            "convention": CONVENTION,
            "entries": as_rows(self._entries),
            "times": as_rows(self._times),
            "bytes": as_rows(self._sizes),
            "energy": as_rows(self._energy),
            "figures": as_rows(self._figures),
            "uncounted": self.uncounted(),
            "predictions": self.predictions.as_tree(),
        }

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Ledger:
        """Build a ledger from :meth:`as_tree`; unknown fields, of later versions, are ignored.

        Raises:
            RunFolderError: The tree has another schema version, or is damaged.
        """
        found = tree.get("schema_version")
        if found != SCHEMA:
            raise RunFolderError(
                f"ledger: has schema {found}, this version reads {SCHEMA}; use the version that wrote it"
            )
        ledger = cls()
        try:
            for row in tree["entries"]:
                ledger.add(**vars(read_row(Entry, row)))
            ledger._times = [read_row(Time, row) for row in tree["times"]]
            ledger._sizes = [read_row(Size, row) for row in tree["bytes"]]
            ledger._energy = [read_row(Joules, row) for row in tree["energy"]]
            ledger._figures = [read_row(Figure, row) for row in tree.get("figures", ())]
            ledger.add_uncounted({str(name): int(calls) for name, calls in tree["uncounted"].items()})
            ledger.predictions = Predictions.of(tree.get("predictions", {}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = reason_of(error, most=120)
            raise RunFolderError(f"ledger: is damaged ({reason}); resume the run to write it again") from error
        return ledger

    def to_json(self) -> str:
        """Return strict JSON."""
        return json.dumps(self.as_tree(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """Build a ledger from :meth:`to_json`.

        Raises:
            RunFolderError: The text is not JSON, has another schema version, or is damaged.
        """
        try:
            tree = json.loads(text)
        except ValueError as error:
            raise RunFolderError(f"ledger: is not JSON ({error}); resume the run to write it again") from None
        return cls.of(tree if isinstance(tree, dict) else {})

    def _sum(self, key: Callable[[Entry], Key], experience: int | None, count: Count) -> dict[Key, int]:
        found: dict[Key, int] = {}
        for entry in self._entries:
            if experience in (None, entry.experience):
                zeros_left_out = count == "effective" and entry.effective_macs is not None
                macs = entry.effective_macs if zeros_left_out else entry.macs
                found[key(entry)] = found.get(key(entry), 0) + (macs or 0)
        return found

