"""FLOPs of single operators from the shapes of their tensors, for those that torch's counter lacks or gets wrong.

A formula receives the operator's arguments, each tensor as its shape, and ``out_shape``. It returns FLOPs, two per
multiply-add, as torch's own formulas do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

Formula = Callable[..., int]
Shape = Sequence[int]


def product_formulas() -> dict[Any, Formula]:
    """Return formulas by operator: products of matrices and vectors, convolution, attention and recurrent layers.

    torch's own counter has no formula for recurrent layers, products with vectors and in-place products, counts the
    backward pass of a convolution in g groups g times, and lacks some of the kernels of attention.
    """
    named: dict[str, Formula] = {
        "mv": _matrix_vector,
        "addmv": lambda bias, *factors, **rest: _matrix_vector(*factors, **rest),
        "dot": _matrix_vector,
        "vdot": _matrix_vector,
        "addmv_": lambda bias, *factors, **rest: _matrix_vector(*factors, **rest),
        "addmm_": lambda bias, left, right, **_: 2 * prod(left) * right[-1],
        "baddbmm_": lambda bias, left, right, **_: 2 * prod(left) * right[-1],
        "addbmm_": lambda bias, left, right, **_: 2 * prod(left) * right[-1],
        "addbmm": lambda bias, left, right, **_: 2 * prod(left) * right[-1],
        "_int_mm": lambda left, right, **_: 2 * prod(left) * right[-1],
        "mkldnn_linear": lambda x, weight, *_, **__: 2 * prod(x) * weight[0],
        "_grouped_mm": _grouped_product,
        "_trilinear": _trilinear,
        "convolution_backward": _convolution_backward,
        "mkldnn_rnn_layer": _recurrent_layer,
        "mkldnn_rnn_layer_backward": lambda *shapes, **rest: 2 * _recurrent_layer(*shapes, **rest),
        "_cudnn_rnn": _recurrent_stack,
        "_cudnn_rnn_backward": _recurrent_stack_backward,
        "miopen_rnn": _recurrent_stack,
        "miopen_rnn_backward": _recurrent_stack_backward,
        "_scaled_dot_product_attention_math_for_mps": _attention,
        "_native_multi_head_attention": _fused_attention,
        "_transformer_encoder_layer_fwd": _fused_layer,
    }
    for name in ("flash", "flash_for_cpu", "efficient", "cudnn", "fused_overrideable"):
        kind, _, place = name.partition("_")
        operator = f"_scaled_dot_product_{kind}_attention" + (f"_{place}" if place else "")
        named[operator], named[f"{operator}_backward"] = _attention, _attention_backward
    return {getattr(torch.ops.aten, name): formula for name, formula in named.items() if hasattr(torch.ops.aten, name)}


def elementwise_formulas() -> dict[Any, Formula]:
    """Return the formulas that the convention ``fvcore`` adds, doubled because the counter halves FLOPs."""
    normalized = {
        "native_batch_norm": 2,
        "cudnn_batch_norm": 2,
        "miopen_batch_norm": 2,
        "_native_batch_norm_legit_no_training": 2,
        "native_layer_norm": 5,
        "native_group_norm": 5,
    }
    scales = {"native_layer_norm": 2}  # the argument that holds the scale; 1 elsewhere
    summed = {"add": 1, "add_": 1, "mul": 1, "mul_": 1, "lerp": 3, "lerp_": 3}
    return {
        **{
            getattr(torch.ops.aten, name): _normalization(count, scale=scales.get(name, 1))
            for name, count in normalized.items()
        },
        **{
            getattr(torch.ops.aten, name): _elementwise(count, bias_free=name.startswith("add"))
            for name, count in summed.items()
        },
    }


def _matrix_vector(matrix: Shape, vector: Shape, **_: Any) -> int:
    return 2 * prod(matrix)


def _grouped_product(left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    """Product per group; groups divide the rows, the columns or the terms of the sums between them."""
    shared = len(left) == 3 and len(right) == 2  # each group has its own columns
    return 2 * prod(left[1:] if shared else left) * right[-1]


def _trilinear(left: Shape, weight: Shape, right: Shape, *expanded: Any, out_shape: Shape, **_: Any) -> int:
    """``sum(left * weight * right)``: one multiply-add per term; the other product is element-wise."""
    axes = [list(shape) for shape in (left, weight, right)]
    for shape, missing in zip(axes, expanded[:3], strict=True):
        for axis in sorted(missing):
            shape.insert(axis, 1)
    terms: int = prod(0 if 0 in sizes else max(sizes) for sizes in zip(*axes, strict=True))
    return 2 * terms


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """softmax(Q K^T) V on shapes (..., heads, length, width): two products; groups of heads may share K and V."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Five products: the scores again, and the gradients of V, of the weights, of Q and of K."""
    return 2 * prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, qkv: Tensor, qkv_bias: Tensor, out: Tensor,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Self-attention with its projections, from tensors: a batch may be nested, and then has no shape."""
    if query.is_nested:
        lengths = query._nested_tensor_size()[:, 0]
        tokens, pairs = int(lengths.sum()), int(lengths.square().sum())
    else:
        tokens, pairs = prod(query.shape[:2]), query.shape[0] * query.shape[1] ** 2
    flops: int = 2 * (tokens * (qkv.numel() + out.numel()) + 2 * pairs * width)
    return flops


def _fused_layer(x: Tensor, width: int, heads: int, *weights: Any, **_: Any) -> int:
    """A whole encoder layer: self-attention and two linear layers."""
    first, second = weights[11], weights[13]
    hidden: int = x.numel() // width * (first.numel() + second.numel())
    return _fused_attention(x, x, x, width, heads, *weights[:3]) + 2 * hidden


# torch's counter then passes tensors rather than shapes.
_fused_attention._get_raw = _fused_layer._get_raw = True  # type: ignore[attr-defined]


def _convolution_backward(
    grad: Shape, x: Shape, weight: Shape, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, wanted: Sequence[bool], **_: Any,
) -> int:  # fmt: skip
    """Gradients of input and weights, each with the cost of the forward pass, in every group."""
    positions = x[2:] if transposed else grad[2:]
    return 2 * (int(wanted[0]) + int(wanted[1])) * x[0] * prod(positions) * prod(weight)


def _recurrent_layer(x: Shape, input_weight: Shape, hidden_weight: Shape, *_: Any, **__: Any) -> int:
    """One direction of one layer over x of (length, batch, width): both weight matrices at every position."""
    return 2 * prod(x[:-1]) * (prod(input_weight) + prod(hidden_weight))


def _recurrent_stack(x: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    """All layers and directions: every matrix at every position; x is (positions, width) if packed."""
    return 2 * prod(x[:-1]) * sum(prod(weight) for weight in weights if len(weight) == 2)


def _recurrent_stack_backward(x: Shape, weights: Sequence[Shape], *shapes: Any, **_: Any) -> int:
    """Gradient of the input and, if requested, of the weights."""
    wanted: Sequence[bool] = next(value for value in shapes if _is_mask(value))
    return _recurrent_stack(x, weights) * (1 + bool(wanted[3]))


def _is_mask(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 4 and all(isinstance(part, bool) for part in value)


def _normalization(count: int, *, scale: int) -> Formula:
    def flops(*shapes: Any, **_: Any) -> int:
        values: int = prod(shapes[0])
        return 2 * values * (count - (shapes[scale] is None))

    return flops


def _elementwise(count: int, *, bias_free: bool) -> Formula:
    def flops(left: Any, right: Any, *_: Any, out_shape: Sequence[int], **__: Any) -> int:
        if bias_free and isinstance(right, Sequence) and len(right) == 1 < len(out_shape):
            return 0  # the bias of a linear layer, which torch adds separately if the input is not contiguous
        return 2 * count * prod(out_shape)

    return flops
