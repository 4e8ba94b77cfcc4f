"""The names of hooks and slots, the checks of what components declare about them, and the order that follows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Final, Protocol

from clframe.errors import ComposeError

SLOTS: Final = ("batch", "classifier", "exit_weights", "task_loss", "loss_mix", "gradient", "logits", "prediction")
"""Resources that only one component of a strategy may own."""

HOOKS: Final = (
    "setup_network", "init_state", "training_experiences", "training_set", "add_classes", "before_experience",
    "before_epoch", "exit_loss_weights", "make_batch", "step_values", "task_loss", "losses", "combine_losses",
    "modify_gradients", "after_step", "after_experience", "adjust_logits", "adjust_exit_logits", "predict",
    "extra_cost",
)  # fmt: skip
"""The hooks, in the order in which a run reaches them."""

_SLOT_OF_HOOK = {
    "training_set": "batch", "make_batch": "batch", "exit_loss_weights": "exit_weights", "task_loss": "task_loss",
    "combine_losses": "loss_mix", "modify_gradients": "gradient", "adjust_logits": "logits",
    "adjust_exit_logits": "logits", "predict": "prediction",
}  # fmt: skip
"""The slot that a component must own to override a hook; other hooks need none."""


class Declared(Protocol):
    """The part of a :class:`~clframe.core.component.Component` that is read here."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]
    slots: ClassVar[frozenset[str]]
    terms: ClassVar[tuple[str, ...]]
    weight: ClassVar[str | None]
    keeps_memory: ClassVar[bool]
    changes_network: ClassVar[bool]

    def acts_at(self) -> tuple[str, ...]:
        """Return the hooks that the component overrides."""


def declaration_problem(kind: type[Declared]) -> str:
    """Return why a class attribute of a component cannot be used, or an empty text."""
    if not isinstance(kind.slots, (frozenset, set)):
        return f"slots is {kind.slots!r}; declare a set, such as slots = frozenset({{'batch'}})"
    if not isinstance(kind.terms, (tuple, list)):
        return f"terms is {kind.terms!r}; declare a tuple, such as terms = ('distill',)"
    if kind.weight is not None and kind.weight not in {field.name for field in fields(kind)}:
        return f"weight is {kind.weight!r}, which is not an option; name one of its fields, or None"
    return ""


def check_declaration(component: Declared) -> None:
    """Raise ComposeError for unusable class attributes, an unknown slot, or a hook overridden without its slot."""
    problem = declaration_problem(type(component))
    if problem:
        raise ComposeError(f"component '{component.name}': {problem}")
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


def check_owners(components: Iterable[Declared]) -> None:
    """Raise ComposeError for a slot with two owners, naming both."""
    owners: dict[str, str] = {}
    for component in components:
        for slot in sorted(component.slots):
            if slot in owners:
                raise ComposeError(
                    f"strategy: '{owners[slot]}' and '{component.name}' both own the slot '{slot}'; "
                    f"keep one of them"
                )
            owners[slot] = component.name


def consolidation_order(component: Declared) -> int:
    """Sort key of ``after_experience``: the network, the buffer, what reads them, the ensemble, the policy."""
    if component.changes_network:
        return 0
    if component.keeps_memory:
        return 1
    return 4 if "prediction" in component.slots else 3 if "exit_weights" in component.slots else 2


def options_without_effect(component: Any, *cases: tuple[bool, Sequence[str], str]) -> dict[str, str]:
    """Return the options of a component that differ from their defaults and that nothing reads, each with the reason.

    Args:
        component: The component.
        cases: Whether options are read, their names, and the reason why not.
    """
    defaults = {each.name: each.default for each in fields(component)}
    return {
        name: reason
        for used, names, reason in cases
        for name in names
        if not used and getattr(component, name) != defaults[name]
    }
