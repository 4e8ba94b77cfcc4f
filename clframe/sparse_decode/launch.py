"""Launches of the kernels of :mod:`clframe.sparse_decode.kernels`, which are imported when launched: that needs Triton.

No launch waits for the device, and shapes do not depend on the number of zeros, so that a CUDA graph can record them.

Shape suffixes: N entries of a vector, I inputs, O outputs, F neurons, S parts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from clframe.moe.kernel_check import TOLERANCE
from clframe.moe.triton_experts import activation_code
from clframe.nn.kernels import device_of, kernel_agrees, power_of_2, relative_error, triton_installed
from clframe.sparse_decode.projection import Parts, Projection, masked_hidden
from clframe.sparse_decode.rules import Rule


class Tile(NamedTuple):
    """Rows and columns of a weight that a program multiplies in one step, its warps, and programs to aim for."""

    rows: int
    columns: int
    warps: int = 4
    programs: int = 528


BY_OUTPUT: Final = Tile(8, 512)
BY_INPUT: Final = Tile(32, 128)
UNDECIDED: Final = 0.02
"""Share of neurons that may be on either side of a threshold, for rounding."""


def kernels_work(parts: Parts, x_1D: Tensor) -> bool:
    """Whether the kernels compute this network, and agree with the dense product.

    Compared at the first call for shapes, type, device and rules, which waits for the device; not while a CUDA graph is
    recorded, which follows eager calls.
    """
    known = x_1D.dtype == parts.first.weight.dtype and x_1D.dtype in TOLERANCE and triton_installed()
    codes = (_code(parts.act_first), _code(parts.act_second))
    if not known or None in codes:
        return False
    second = None if parts.second is None else parts.second.shape
    kinds = tuple((place, rule.kind) for place, rule in parts.rules.items())
    kind = parts.first.shape, second, parts.down.shape, codes, x_1D.dtype, x_1D.device, kinds

    def find_fault(error: float) -> str:
        agrees = error <= TOLERANCE[x_1D.dtype]
        return "" if agrees else f"differs from plain products by {error:.2g} of the largest value"

    return kernel_agrees(
        "sparse decode: one of the kernels", kind, x_1D, run=lambda: largest_error(parts, x_1D),
        find_fault=find_fault, fallback="plain products are used",
    )  # fmt: skip


def largest_error(parts: Parts, x_1D: Tensor) -> float:
    """Largest difference of hidden neurons and of outputs from plain products, as a share of their largest value.

    Rounding decides on which side of a threshold a neuron next to it is. So neurons are compared where both or neither
    are 0, outputs with those of the same neurons; infinite if more neurons differ in that than :data:`UNDECIDED` of all
    and two.
    """
    own_1F, plain_1F = run_hidden(parts, x_1D)[None], masked_hidden(parts, x_1D)
    same_1F = (own_1F == 0) == (plain_1F == 0)
    if int((~same_1F).sum()) > 2 + UNDECIDED * same_1F.shape[1]:
        return float("inf")
    hidden = relative_error(own_1F.where(same_1F, 0), plain_1F.where(same_1F, 0))
    return max(hidden, relative_error(run(parts, x_1D), parts.down(own_1F)))


def run(parts: Parts, x_1D: Tensor, *, by_output: Tile = BY_OUTPUT, by_input: Tile = BY_INPUT) -> Tensor:
    """Compute y_1O of one token.

    Args:
        parts: The network.
        x_1D: The token.
        by_output: Tile of products with weights that are stored by output.
        by_input: Tile of the others.
    """
    hidden_F = run_hidden(parts, x_1D, by_output=by_output, by_input=by_input)
    return _sum(hidden_F, 0.0, parts.down, None, codes=(-1, -1), least=0.0, tile=by_input)[None]


def run_hidden(parts: Parts, x_1D: Tensor, *, by_output: Tile = BY_OUTPUT, by_input: Tile = BY_INPUT) -> Tensor:
    """Compute hidden_F of one token, the input of the last layer; see :func:`run`."""
    first, second = parts.first, parts.second
    codes = (_code(parts.act_first), _code(parts.act_second))
    x_I, least_input = _before(parts.rules.get("input"), x_1D[0].contiguous())
    rule = parts.hidden_rule
    least = 0.0 if rule is None or rule.kind != "threshold" else _rounded(rule.value, x_I.dtype)
    fused = rule is None or rule.kind == "threshold"
    if first.by_input:
        other = None if parts.skips_second else second
        value_F = _sum(x_I, least_input, first, other, codes=codes, least=least, tile=by_input)
    elif parts.skips_second and not fused:
        value_F = _hidden(x_I, least_input, first, None, codes=codes, tile=by_output)
    else:
        value_F = _hidden(
            x_I, least_input, first, second, codes=codes, least=least, skip=parts.skips_second, tile=by_output
        )
    if rule is not None and not fused:
        value_F = rule.apply(value_F[None])[0]
    if parts.skips_second and (first.by_input or not fused):
        value_F = _hidden(x_I, least_input, value_F, second, codes=codes, least=least, skip=True, tile=by_output)
    return value_F


def _before(rule: Rule | None, x_I: Tensor) -> tuple[Tensor, float]:
    """Return x, and the magnitude below which its entries count as 0."""
    if rule is None:
        return x_I, 0.0
    if rule.kind == "threshold":
        return x_I, _rounded(rule.value, x_I.dtype)
    return rule.apply(x_I[None])[0], 0.0


def _hidden(
    x_I: Tensor,
    least_input: float,
    first: Projection | Tensor,
    second: Projection | None,
    *,
    codes: tuple[int | None, int | None],
    least: float = 0.0,
    skip: bool = False,
    tile: Tile,
) -> Tensor:
    """f(first x) * g(second x), or without second factor; ``first`` may be the values of the first factor."""
    from clframe.sparse_decode.kernels import hidden_by_output

    given = isinstance(first, Tensor)
    neurons = len(first) if isinstance(first, Tensor) else first.shape[1]
    weight, bias = (first, None) if isinstance(first, Tensor) else (first.weight, first.bias)
    other, other_bias = (x_I, None) if second is None else (second.weight, second.bias)
    out_F = x_I.new_empty(neurons)
    with device_of(x_I):
        hidden_by_output[(-(-neurons // tile.rows),)](
            x_I, weight, x_I if bias is None else bias, other, x_I if other_bias is None else other_bias, out_F,
            least_input, least, neurons, len(x_I), given=given, two=second is not None, skip=skip,
            first_biased=bias is not None, second_biased=other_bias is not None, first_code=codes[0],
            second_code=codes[1], ROWS=tile.rows, INNER=min(tile.columns, power_of_2(len(x_I))), num_warps=tile.warps,
        )  # fmt: skip
    return out_F


def _sum(
    x_N: Tensor,
    least_input: float,
    first: Projection,
    second: Projection | None,
    *,
    codes: tuple[int | None, int | None],
    least: float,
    tile: Tile,
) -> Tensor:
    """The same with weights that are stored by input; rows of zeros of x are not read."""
    from clframe.sparse_decode.kernels import finish_sums, sum_by_input

    entries, outputs = first.shape
    columns = min(tile.columns, power_of_2(outputs))
    blocks = -(-outputs // columns)
    chunk = -(-entries // max(1, tile.programs // blocks))
    chunk = -(-chunk // tile.rows) * tile.rows
    splits, two = -(-entries // chunk), second is not None
    part_SO = torch.empty(1 + two, splits, outputs, dtype=torch.float32, device=x_N.device)
    out_O = x_N.new_empty(outputs)
    other, other_bias = (first.weight, None) if second is None else (second.weight, second.bias)
    with device_of(x_N):
        sum_by_input[(blocks, splits)](
            x_N, first.weight, other, part_SO, least_input, entries, outputs, two=two, CHUNK=chunk, ROWS=tile.rows,
            COLUMNS=columns, num_warps=tile.warps,
        )  # fmt: skip
        finish_sums[(-(-outputs // 64),)](
            part_SO, out_O if first.bias is None else first.bias, out_O if other_bias is None else other_bias, out_O,
            least, splits, outputs, two=two, biased=first.bias is not None, other_biased=other_bias is not None,
            code=codes[0], other_code=codes[1], STEP=16, COLUMNS=64, num_warps=2,
        )  # fmt: skip
    return out_O


def _code(activation: Callable[[Tensor], Tensor] | None) -> int | None:
    """Code of an activation for the kernels; -1 for the identity, None for unknown ones."""
    return -1 if activation is None else activation_code(activation)


@cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    """A threshold as PyTorch compares it with a tensor of this type."""
    return float(torch.tensor(value, dtype=dtype))
