"""Composition: components added up to a strategy.

Laws (tests/core/test_laws.py): composing is associative; ``naive`` is the identity; terms commute, bit
for bit, because a composition keeps its components in the order of their names; a component of weight
zero is dropped; two owners of one slot, or one name twice, are refused when composing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from clframe.core.component import SLOTS, Component
from clframe.errors import ComposeError


@dataclass(frozen=True)
class Composition:
    """A strategy: components in the order of their names. Build one with :func:`compose` or ``+``."""

    components: tuple[Component, ...] = ()

    def __add__(self, other: Component | Composition) -> Composition:
        """Compose with another component or composition."""
        return compose(self, other)

    def __iter__(self) -> Iterator[Component]:
        return iter(self.components)

    def __len__(self) -> int:
        return len(self.components)

    def __str__(self) -> str:
        return " + ".join(component.name for component in self.components) or "naive"

    def owner(self, slot: str) -> Component | None:
        """The component that owns ``slot``, if any."""
        return next((component for component in self.components if slot in component.slots), None)

    def check_needs(self) -> None:
        """Refuse a strategy in which a component lacks another that it needs (ComposeError)."""
        keeps = any(component.keeps_memory for component in self.components)
        for component in self.components:
            if component.needs_memory and not keeps:
                raise ComposeError(
                    f"strategy: '{component.name}' needs a memory; add one, as in '{component.name} + er'"
                )

    def acting_at(self, hook: str) -> tuple[Component, ...]:
        """The components that override ``hook``: the only ones the engine calls there."""
        return tuple(component for component in self.components if hook in component.acts_at())

    def replace(self, change: Callable[[Component], Component]) -> Composition:
        """The composition of ``change(component)`` for every component."""
        return compose(*(change(component) for component in self.components))


def compose(*parts: Component | Composition) -> Composition:
    """Compose components into a strategy.

    Raises:
        ComposeError: One slot claimed twice (naming both), one component twice, an unknown slot, or a
            hook overridden without owning its slot.

    >>> str(compose())
    'naive'
    """
    components: dict[str, Component] = {}
    for component in _flatten(parts):
        _check(component)
        if component.is_identity:
            continue
        if component.name in components:
            raise ComposeError(f"strategy: component '{component.name}' appears twice; give its options once")
        components[component.name] = component
    ordered = tuple(components[name] for name in sorted(components))
    _refuse_clashes(ordered)
    return Composition(ordered)


def _flatten(parts: tuple[Any, ...]) -> Iterator[Component]:
    for part in parts:
        if isinstance(part, Composition):
            yield from part.components
        elif isinstance(part, Component):
            yield part
        else:
            raise ComposeError(
                f"strategy: cannot compose {part!r} of type {type(part).__name__}; "
                f"compose Component instances or parse an expression with clframe.parse"
            )


_SLOT_OF_HOOK = {
    "pool": "batch", "batch": "batch", "weigh": "heads", "task": "task", "mix": "mix", "project": "gradient",
    "answers": "answers", "decide": "decision",
}  # fmt: skip


def _check(component: Component) -> None:
    unknown = component.slots - set(SLOTS)
    if unknown:
        raise ComposeError(
            f"component '{component.name}': claims unknown slots {sorted(unknown)}; slots are {list(SLOTS)}"
        )
    for hook, slot in _SLOT_OF_HOOK.items():
        if hook in component.acts_at() and slot not in component.slots:
            raise ComposeError(
                f"component '{component.name}': overrides {hook}() without owning the slot '{slot}'; "
                f"declare slots = frozenset({{'{slot}'}})"
            )


def _refuse_clashes(components: tuple[Component, ...]) -> None:
    owners: dict[str, str] = {}
    for component in components:
        for slot in sorted(component.slots):
            if slot in owners:
                raise ComposeError(
                    f"strategy: '{owners[slot]}' and '{component.name}' both own the slot '{slot}'; "
                    f"keep one of them"
                )
            owners[slot] = component.name
