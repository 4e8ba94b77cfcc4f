"""What a run cost, entry by entry: MACs (one multiply-add counts 1; FLOPs = 2 x MACs), samples, seconds, bytes, joules.

Entries are only ever added. Each says when (experience), in which phase, for whom (component) and up to which exit;
questions are sums over them. Dense and effective counts are kept apart: zeros lower only the latter. What could not
be counted is named by :meth:`Ledger.uncounted`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
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
    read_row,
)
from clframe.accounting.measurement import Energy
from clframe.accounting.predictions import Predictions
from clframe.errors import ConfigError, RunFolderError, UnknownNameError, unknown_name

Key = TypeVar("Key")


class Ledger:
    """Costs of a run.

    Attributes:
        predictions: What one prediction costs, which is no part of what the run cost.

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
        """Everything added, in order."""
        return tuple(self._entries)

    # --- adding -----------------------------------------------------------------------------------

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
        """Add one entry; see :class:`Entry`.

        Raises:
            UnknownNameError: No such phase.
            ConfigError: A count below zero, or more effective than dense products.
        """
        if phase not in PHASES:
            raise UnknownNameError(unknown_name("phase", phase, PHASES))
        if min(macs, samples, steps, effective_macs or 0) < 0 or (effective_macs or 0) > macs:
            raise ConfigError(
                f"ledger: found macs {macs}, effective {effective_macs}, samples {samples}, steps {steps}; give counts "
                f"of 0 or more, effective ones up to macs"
            )
        entry = Entry(phase=phase, macs=macs, experience=experience, component=component, exit=exit, samples=samples,
                      steps=steps, effective_macs=effective_macs)  # fmt: skip
        self._entries.append(entry)

    def add_time(self, phase: str, *, seconds: float, experience: int | None = None) -> None:
        """Add wall time to a phase, such as ``training``, ``evaluation`` or ``accounting``."""
        self._times.append(Time(phase=phase, seconds=seconds, experience=experience))

    def add_bytes(self, kind: str, *, bytes: int, component: str = "", experience: int | None = None) -> None:
        """Note what is kept from now on."""
        self._sizes.append(Size(kind=kind, bytes=bytes, component=component, experience=experience))

    def add_energy(self, energy: Energy, *, experience: int | None = None) -> None:
        """Add what a counter said, or that none did."""
        self._energy.append(Joules(joules=energy.joules, energy_source=energy.energy_source, experience=experience))

    def add_figure(self, name: str, *, value: int, component: str = "", experience: int | None = None) -> None:
        """Note what a component says of itself."""
        self._figures.append(Figure(name=name, value=value, component=component, experience=experience))

    def add_uncounted(self, calls: Mapping[str, int]) -> None:
        """Note operators, or whatever else, that were not counted and how often they ran."""
        self._uncounted.update(calls)

    # --- asking -----------------------------------------------------------------------------------

    @property
    def macs(self) -> int:
        """All multiply-adds of the run, dense."""
        return sum(entry.macs for entry in self._entries)

    @property
    def training_macs(self) -> int:
        """All but the evaluations'."""
        return sum(entry.macs for entry in self._entries if entry.phase != "evaluation")

    def by_phase(self, *, experience: int | None = None, count: Count = "dense") -> dict[str, int]:
        """MACs of every phase that has any, in the order of :data:`PHASES`; of one experience if given."""
        found = self._sum(lambda entry: entry.phase, experience, count)
        return {phase: found[phase] for phase in PHASES if phase in found}

    def by_component(self, *, experience: int | None = None, count: Count = "dense") -> dict[str, int]:
        """MACs by component, the network itself under the empty name; of one experience if given."""
        return self._sum(lambda entry: entry.component, experience, count)

    def by_exit(self, *, experience: int | None = None, count: Count = "dense") -> dict[str, int]:
        """MACs by the exit at which samples stopped, the empty name where they passed all."""
        return self._sum(lambda entry: entry.exit, experience, count)

    def by_experience(self, *, count: Count = "dense") -> dict[int | None, int]:
        """MACs by experience."""
        return self._sum(lambda entry: entry.experience, None, count)

    def samples(self, phase: Phase = "forward", *, experience: int | None = None) -> int:
        """Samples that went through a phase, each as often as it did."""
        return sum(e.samples for e in self._entries if e.phase == phase and experience in (None, e.experience))

    def steps(self, *, experience: int | None = None) -> int:
        """Optimizer steps."""
        return sum(e.steps for e in self._entries if experience in (None, e.experience))

    def seconds(self, *, experience: int | None = None) -> dict[str, float]:
        """Wall time by phase."""
        found: dict[str, float] = {}
        for time in self._times:
            if experience in (None, time.experience):
                found[time.phase] = found.get(time.phase, 0.0) + time.seconds
        return found

    def bytes(self) -> dict[str, int]:
        """What was kept last, by kind, over all components; peaks are the largest seen."""
        newest = {(size.kind, size.component): size.bytes for size in self._sizes}
        found: dict[str, int] = {}
        for (kind, _), count in newest.items():
            found[kind] = found.get(kind, 0) + count
        for size in self._sizes:
            if size.kind.endswith("peak"):
                found[size.kind] = max(found[size.kind], size.bytes)
        return found

    def energy(self) -> Energy:
        """Energy of all blocks that were metered: a sum only where each has a figure of one and the same source."""
        sources = {part.energy_source for part in self._energy}
        figures = [part.joules for part in self._energy if part.joules is not None]
        if len(sources) != 1:
            return Energy(None, "none")
        whole = len(figures) == len(self._energy)
        return Energy(sum(figures) if whole else None, sources.pop())  # type: ignore[arg-type]  # read back as text

    def figures(self) -> dict[tuple[str, str], int]:
        """What components said last, by component and name."""
        return {(figure.component, figure.name): figure.value for figure in self._figures}

    def uncounted(self) -> dict[str, int]:
        """What was not counted, and how often it ran; empty: nothing."""
        return dict(sorted(self._uncounted.items()))

    # --- storing ----------------------------------------------------------------------------------

    def as_tree(self) -> dict[str, Any]:
        """Plain values; :meth:`of` is the inverse."""
        return {
            "schema_version": SCHEMA,
            "convention": CONVENTION,
            "entries": [asdict(entry) for entry in self._entries],
            "times": [asdict(time) for time in self._times],
            "bytes": [asdict(size) for size in self._sizes],
            "energy": [asdict(part) for part in self._energy],
            "figures": [asdict(figure) for figure in self._figures],
            "uncounted": self.uncounted(),
            "predictions": self.predictions.as_tree(),
        }

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Ledger:
        """The ledger that :meth:`as_tree` was taken of; fields that this version does not know are left out.

        Raises:
            RunFolderError: It is of another schema, or damaged.
        """
        found = tree.get("schema_version")
        if found != SCHEMA:
            raise RunFolderError(f"ledger: has schema {found}, this version reads {SCHEMA}; use the one that wrote it")
        ledger = cls()
        try:
            for row in tree["entries"]:
                ledger.add(**asdict(read_row(Entry, row)))
            ledger._times = [read_row(Time, row) for row in tree["times"]]
            ledger._sizes = [read_row(Size, row) for row in tree["bytes"]]
            ledger._energy = [read_row(Joules, row) for row in tree["energy"]]
            ledger._figures = [read_row(Figure, row) for row in tree.get("figures", ())]
            ledger.add_uncounted({str(name): int(calls) for name, calls in tree["uncounted"].items()})
            ledger.predictions = Predictions.of(tree.get("predictions", {}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise RunFolderError(f"ledger: is damaged ({reason}); write it anew by resuming the run") from error
        return ledger

    def to_json(self) -> str:
        """Strict JSON."""
        return json.dumps(self.as_tree(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """The inverse of :meth:`to_json`.

        Raises:
            RunFolderError: It is no JSON, of another schema, or damaged.
        """
        try:
            tree = json.loads(text)
        except ValueError as error:
            raise RunFolderError(f"ledger: is no JSON ({error}); write it anew by resuming the run") from None
        return cls.of(tree if isinstance(tree, dict) else {})

    def _sum(self, key: Callable[[Entry], Key], experience: int | None, count: Count) -> dict[Key, int]:
        found: dict[Key, int] = {}
        for entry in self._entries:
            if experience in (None, entry.experience):
                zeros_left_out = count == "effective" and entry.effective_macs is not None
                macs = entry.effective_macs if zeros_left_out else entry.macs
                found[key(entry)] = found.get(key(entry), 0) + (macs or 0)
        return found

