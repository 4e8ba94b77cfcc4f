"""The MAC counter: a context manager that counts the operators which run in it.

Operators with a formula count multiply-adds. Others either belong to a family that counts 0 by convention, such as
normalization, or are reported by :meth:`MacCounter.uncounted`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache
from types import TracebackType
from typing import Any, Final, Literal

import torch

from clframe.accounting.mac_formulas import elementwise_formulas, product_formulas
from clframe.lazy_imports import use_stand_in

# Torch's counter compares the targets of formulas with this class, and importing triton takes half a second.
with use_stand_in("triton.runtime.jit", ("JITFunction",), home="triton"):
    from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode

NAMES: Final = {
    "normalization": "linalg_vector_norm norm renorm",
    "reduction": "sum mean var std var_mean std_mean amax amin aminmax max min prod any all argmax argmin "
    "logsumexp cumsum cumprod logcumsumexp cummax cummin trace count_nonzero bincount histc median "
    "nanmedian mode kthvalue topk sort argsort equal isin searchsorted bucketize",
    "data movement": "clone cat stack gather take put select slice masked_fill squeeze unsqueeze t transpose swapaxes "
    "roll flip rot90 repeat repeat_interleave embedding embedding_dense masked_select nonzero tril "
    "triu diag diag_embed diagonal unfold im2col col2im where resize set local_scalar_dense item "
    "split split_with_sizes chunk pixel_shuffle pixel_unshuffle unsafe_view unsafe_split alias "
    "reshape_alias mkldnn_reshape to_mkldnn to_dense one_hot assert_async assert_scalar "
    "linalg_check_errors assert_tensor_metadata pin_memory pack_padded_sequence pad_packed_sequence "
    "native_channel_shuffle channel_shuffle reshape view lift is_pinned as_strided",
    "creation": "empty empty_strided new_empty new_empty_strided zeros ones full arange linspace logspace eye "
    "rand randn randint randperm normal uniform bernoulli multinomial exponential scalar_tensor zero "
    "fill zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros "
    "new_ones new_full random poisson log_normal geometric cauchy efficientzerotensor "
    "cudnn_init_dropout_state",
    "activation": "hardtanh hardsigmoid hardswish mish silu elu celu selu",  # their gradients are not tagged either
    "loss": "nll_loss nll_loss2d mse_loss l1_loss smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy",
}
"""Operators by family, by the stem of their names."""

PARTS: Final = {
    "cell": "activation", "softmax": "activation", "glu": "activation", "dropout": "activation", "relu": "activation",
    "batch_norm": "normalization", "layer_norm": "normalization", "group_norm": "normalization",
    "rms_norm": "normalization", "weight_norm": "normalization", "embedding_renorm": "normalization",
    "pool": "pooling", "margin_loss": "loss", "ctc_loss": "loss", "binary_cross_entropy": "loss",
    "foreach": "update", "fused_sgd": "update", "fused_adam": "update", "fused_adagrad": "update", "amp": "update",
    "upsample": "interpolation", "grid_sampler": "interpolation", "affine_grid": "interpolation",
    "index": "data movement", "scatter": "data movement", "pad": "data movement", "copy": "data movement",
    "reflection_pad": "data movement", "replication_pad": "data movement", "unique": "reduction",
}  # fmt: skip
"""Families by parts of names, such as the ``pool`` of ``max_pool2d``."""

_DECORATIONS: Final = ("_backward", "_forward", "_data")
_FAMILY_OF: Final = {name: family for family, names in NAMES.items() for name in names.split()}


def family_of(operator: Any) -> str | None:
    """Return the family in which an operator (an overload, as ``aten.relu.default``) counts 0; None if in none.

    >>> family_of(torch.ops.aten.max_pool2d_with_indices.default)
    'pooling'
    >>> family_of(torch.ops.aten.linalg_inv_ex.default) is None
    True
    """
    if operator.namespace == "profiler":
        return "bookkeeping"
    if operator.namespace in ("c10d", "_c10d_functional"):  # gradients that processes exchange during backward
        return "communication"
    if operator.namespace not in ("aten", "prim", "prims"):
        return None
    if operator.is_view:
        return "data movement"
    name = str(operator.overloadpacket.__name__).strip("_")
    for decoration in _DECORATIONS:
        name = name.replace(decoration, "")
    if name in _FAMILY_OF:
        return _FAMILY_OF[name]
    # Versions of torch differ in which operators in place have the tag of the operator that is not in place.
    stem = str(operator.overloadpacket.__name__).removesuffix("_")
    plain = getattr(getattr(torch.ops.aten, stem, None), operator._overloadname, operator)
    if torch.Tag.pointwise in {*operator.tags, *plain.tags}:
        return "element-wise"
    return next((family for part, family in PARTS.items() if f"_{part}" in f"_{name}"), None)


Convention = Literal["macs", "fvcore"]
"""Operations that count: multiply-adds, or in addition those element-wise ones that fvcore counts."""


class MacCounter:
    """Context manager that counts every operator which runs in it, on any device, backward passes included.

    Args:
        convention: Operations that count.
        modules: Whether to count by module as well; tensors that need gradients then carry hooks.
        keep_kernels: Whether to leave the fused inference kernels of ``nn.MultiheadAttention`` enabled, so that the
            counted code computes the same bits as without the counter.

    >>> with MacCounter() as counter:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 5)
    >>> counter.macs
    30
    """

    def __init__(
        self, *, convention: Convention = "macs", modules: bool = False, keep_kernels: bool = False
    ) -> None:
        self._flops = _torch_counter(convention)
        if not modules:
            self._flops.mod_tracker = _Whole()
        self._mode: Any = _Mode(self._flops)
        self._keep_kernels, self._fast_path = keep_kernels, True
        self._stack = ExitStack()

    def __enter__(self) -> MacCounter:
        # A fused layer is one operator: its parts could not be counted by module, nor its element-wise operations.
        self._fast_path = torch.backends.mha.get_fastpath_enabled()
        if not self._keep_kernels:
            torch.backends.mha.set_fastpath_enabled(False)
        self._flops.flop_counts.clear()
        self._stack.enter_context(_without_compiled_code())
        self._flops.mod_tracker.__enter__()
        self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._mode.__exit__(kind, error, trace)
            self._flops.mod_tracker.__exit__()
        finally:
            self._stack.close()
            torch.backends.mha.set_fastpath_enabled(self._fast_path)

    @property
    def macs(self) -> int:
        """Multiply-adds so far."""
        return int(self._flops.get_total_flops()) // 2

    def by_module(self) -> dict[str, int]:
        """Return the multiply-adds so far by the full name of each module called, submodules included.

        Names start with the class of the root. Empty without ``modules``.
        """
        return {
            name: sum(counts.values()) // 2
            for name, counts in self._flops.get_flop_counts().items()
            if name != "Global"
        }

    def uncounted(self) -> dict[str, int]:
        """Return the calls of operators that neither a formula nor a convention covers, by name."""
        return self._sorted(None)

    def by_convention(self) -> dict[str, dict[str, int]]:
        """Return the calls of operators that count 0 by convention, by family and name."""
        families = sorted({family for operator in self._mode.calls if (family := self._family(operator)) is not None})
        return {family: self._sorted(family) for family in families if family}

    def _sorted(self, family: str | None) -> dict[str, int]:
        calls: Counter[str] = Counter()
        for operator, count in self._mode.calls.items():
            if self._family(operator) == family:
                calls[str(getattr(operator, "overloadpacket", operator))] += count
        return dict(sorted(calls.items()))

    def _family(self, operator: Any) -> str | None:
        """Return the family of an operator; empty if a formula counts it."""
        if getattr(operator, "overloadpacket", operator) in self._formulas:
            return ""
        return family_of(operator) if isinstance(operator, torch._ops.OpOverload) else None

    @property
    def _formulas(self) -> Mapping[Any, Any]:
        formulas: Mapping[Any, Any] = self._flops.flop_registry
        return formulas


def _without_compiled_code() -> AbstractContextManager[Any]:
    """Context in which functions compiled by ``torch.compile`` run as they were written.

    They do so under every mode that intercepts operators; but in torch 2.6, not in 2.15, a call in it leaves the
    function uncompiled for the rest of the process.
    """
    if "torch._dynamo.convert_frame" not in sys.modules:  # nothing has been compiled, and the import takes a second
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _torch_counter(convention: Convention) -> Any:
    counter: Any = FlopCounterMode(display=False)
    counter.flop_registry = {**counter.flop_registry, **_formulas_for_torch(convention)}
    return counter


@cache
def _formulas_for_torch(convention: Convention) -> dict[Any, Any]:
    """Formulas as torch's counter wraps them, which at every construction would take longer than counting itself."""
    own = product_formulas() | (elementwise_formulas() if convention == "fvcore" else {})
    wrapped = FlopCounterMode(display=False, custom_mapping=own).flop_registry
    return {operator: wrapped[operator] for operator in own}


class _Whole:
    """Replaces torch's tracker of modules, whose hooks cost time, if counts by module are not needed."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class _Mode(_FlopCounterMode):
    """Torch's counter, which in addition counts calls; composite operators count as those that they consist of.

    Torch looks for the parts of every operator at every call, which takes longer than a small operator itself.
    """

    supports_higher_order_operators = True

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__(counter)
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if isinstance(func, torch._ops.OpOverload):
            has_formula = func.overloadpacket in self.counter.flop_registry
            if has_formula or not _is_left_to_torch(func):
                self.calls[func] += 1
                out = func(*args, **given)
                return self.counter._count_flops(func.overloadpacket, out, args, given) if has_formula else out
        elif func is not torch.ops.higher_order.cond:  # of which the branches are counted
            self.calls[func] += 1
        return super().__torch_dispatch__(func, types, args, given)  # type: ignore[no-untyped-call]  # torch has not typed it


_ATTRIBUTES: Final = (
    "sym_is_contiguous", "is_contiguous", "is_strides_like_format", "is_non_overlapping_and_dense", "size", "sym_size",
    "stride", "sym_stride", "storage_offset", "sym_storage_offset", "numel", "sym_numel", "dim", "layout",
)  # fmt: skip
"""Operators by which torch asks subclasses of tensors for their shape; its counter answers none of them."""


@cache
def _is_left_to_torch(operator: torch._ops.OpOverload) -> bool:
    """Whether torch's counter decomposes an operator without a formula, or does not answer it."""
    if operator is torch.ops.prim.device.default:
        return False
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return (
        operator.overloadpacket.__name__ in _ATTRIBUTES
        or composite in operator.py_kernels
        or torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), composite)
    )
