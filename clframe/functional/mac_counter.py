"""Counts the multiply-adds of whatever runs while it is on, and names what it could not count.

torch's dispatcher-level counter, with the formulas that it lacks or has wrong. It sees the operators that are
really called, forward and backward, so early exit, routing and frozen parts count as they run. It slows down what
it watches and belongs outside of hot paths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from clframe.functional.mac_families import family_of
from clframe.functional.mac_formulas import elementwise_formulas, product_formulas

Convention = Literal["macs", "fvcore"]
"""What is counted: multiply-adds alone, or what published figures hold besides."""


class MacCounter:
    """A context in which every operator is counted.

    Args:
        convention: What is counted.
        modules: Whether to keep counts by module; gradients of what runs then carry hooks.

    >>> with MacCounter() as counter:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 5)
    >>> counter.macs
    30
    """

    def __init__(self, *, convention: Convention = "macs", modules: bool = False) -> None:
        formulas = product_formulas() | (elementwise_formulas() if convention == "fvcore" else {})
        self._flops = _torch_counter(formulas)
        if not modules:
            self._flops.mod_tracker = _Whole()
        self._seen: Any = _Seen()
        self._fast_path = True

    def __enter__(self) -> MacCounter:
        # The fused layers of nn.MultiheadAttention in eval mode are single operators that no formula covers.
        self._fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        self._seen.__enter__()
        self._flops.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._flops.__exit__(kind, error, trace)
            self._seen.__exit__(kind, error, trace)
        finally:
            torch.backends.mha.set_fastpath_enabled(self._fast_path)

    @property
    def macs(self) -> int:
        """Multiply-adds so far."""
        return int(self._flops.get_total_flops()) // 2

    def by_module(self) -> dict[str, int]:
        """Multiply-adds so far by the full name of each module called, its class first, parts included.

        Empty without ``modules``.
        """
        return {
            name: sum(counts.values()) // 2
            for name, counts in self._flops.get_flop_counts().items()
            if name != "Global"
        }

    def uncounted(self) -> dict[str, int]:
        """Calls of operators that neither a formula nor a convention covers, by name."""
        return self._sorted(None)

    def by_convention(self) -> dict[str, dict[str, int]]:
        """Calls of operators that count nothing by convention, by family and name."""
        families = sorted({family for operator in self._seen.calls if (family := self._family(operator)) is not None})
        return {family: self._sorted(family) for family in families if family}

    def _sorted(self, family: str | None) -> dict[str, int]:
        calls: Counter[str] = Counter()
        for operator, count in self._seen.calls.items():
            if self._family(operator) == family:
                calls[str(getattr(operator, "overloadpacket", operator))] += count
        return dict(sorted(calls.items()))

    def _family(self, operator: Any) -> str | None:
        """Empty where a formula counts it."""
        if getattr(operator, "overloadpacket", operator) in self._formulas:
            return ""
        return family_of(operator) if isinstance(operator, torch._ops.OpOverload) else None

    @property
    def _formulas(self) -> Mapping[Any, Any]:
        formulas: Mapping[Any, Any] = self._flops.flop_registry
        return formulas


def _torch_counter(formulas: Mapping[Any, Any]) -> Any:
    return FlopCounterMode(display=False, custom_mapping=dict(formulas))


class _Whole:
    """Stands for torch's tracker of modules where nobody asks which module runs."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class _Seen(TorchDispatchMode):
    """Counts the calls of every operator that comes through the counter above it, after decomposition."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has not typed it
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))
