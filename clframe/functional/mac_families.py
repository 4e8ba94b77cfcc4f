"""Operators that count nothing by convention, by family; whatever is in none of them and has no formula is a gap."""

from __future__ import annotations

from typing import Any, Final

import torch

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
    "native_channel_shuffle channel_shuffle reshape view lift is_pinned",
    "creation": "empty empty_strided new_empty new_empty_strided zeros ones full arange linspace logspace eye "
    "rand randn randint randperm normal uniform bernoulli multinomial exponential scalar_tensor zero "
    "fill zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros "
    "new_ones new_full random poisson log_normal geometric cauchy efficientzerotensor "
    "cudnn_init_dropout_state",
    "loss": "nll_loss nll_loss2d mse_loss l1_loss smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy",
}
"""Operators by family, without what decorates their names."""

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
"""Whole parts of names, such as the ``pool`` of ``max_pool2d``, that place an operator in a family."""

_DECORATIONS: Final = ("_backward", "_forward", "_data")
_FAMILY_OF: Final = {name: family for family, names in NAMES.items() for name in names.split()}


def family_of(operator: Any) -> str | None:
    """The family in which an operator (an overload, such as ``aten.relu.default``) counts nothing; None: in none.

    >>> family_of(torch.ops.aten.max_pool2d_with_indices.default)
    'pooling'
    >>> family_of(torch.ops.aten.linalg_inv_ex.default) is None
    True
    """
    if operator.namespace == "profiler":
        return "bookkeeping"
    if operator.namespace not in ("aten", "prim", "prims"):
        return None
    if operator.is_view:
        return "data movement"
    name = str(operator.overloadpacket.__name__).strip("_")
    for decoration in _DECORATIONS:
        name = name.replace(decoration, "")
    if name in _FAMILY_OF:
        return _FAMILY_OF[name]
    if torch.Tag.pointwise in operator.tags:
        return "element-wise"
    return next((family for part, family in PARTS.items() if f"_{part}" in f"_{name}"), None)
