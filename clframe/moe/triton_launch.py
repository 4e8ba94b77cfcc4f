"""Launches of the Triton kernels of experts. Kernels are imported when launched: that needs Triton.

All shapes depend on the number of tokens only, so that a CUDA graph can record them.

Shape suffixes as in ``executors.py``; P is the largest possible number of pairs, N * E.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from clframe.moe.executors import Weights
from clframe.nn.kernels import device_of, power_of_2


class Tiles(NamedTuple):
    """Tile of one kernel program: pairs, columns, depth of an inner product; warps and pipeline stages."""

    rows: int
    columns: int
    inner: int
    warps: int = 4
    stages: int = 3

    def options(self) -> dict[str, int]:
        """Arguments that every product takes."""
        return {"ROWS": self.rows, "INNER": self.inner, "num_warps": self.warps, "num_stages": self.stages}


FUSED_NEURONS = 128
"""Neurons of an expert up to which one kernel computes both layers."""

Kernel = Literal["fused", "split", "gradient"]
"""Both layers in one kernel, one layer, gradients of weights."""

HALF: Mapping[Kernel, Tiles] = {
    "fused": Tiles(128, 64, 64, 8, 3), "split": Tiles(128, 128, 64, 8, 3), "gradient": Tiles(128, 64, 64, 4, 5),
}  # fmt: skip
"""Tiles of half precision; ``fused`` is the fastest of twelve on an H200 (``perf/expert_race_cuda.py --sweep``)."""

FULL: Mapping[Kernel, Tiles] = dict.fromkeys(("fused", "split", "gradient"), Tiles(64, 64, 32, 4, 3))
"""Tiles of float32."""


def tiles(dtype: torch.dtype, kernel: Kernel) -> Tiles:
    """Tile sizes of a kernel."""
    return (FULL if dtype is torch.float32 else HALF)[kernel]


class Pairs(NamedTuple):
    """Pairs of tokens and active experts, numbered expert by expert, and token by token within an expert.

    Attributes:
        token_P: Token of each pair; undefined behind the last one.
        pair_NE: Pairs of each token at the front of its row; undefined behind the last one.
        count_N: Number of pairs of each token.
        end_E: Number of pairs up to and including each expert's.
    """

    token_P: Tensor
    pair_NE: Tensor
    count_N: Tensor
    end_E: Tensor


def list_pairs(keep_NE: Tensor) -> Pairs:
    """Number the pairs of a mask."""
    from clframe.moe.triton_routing import count_pairs, place_pairs

    (tokens, experts), width = keep_NE.shape, power_of_2(keep_NE.shape[1])
    keep_NE = keep_NE.contiguous().view(torch.int8)
    rows = max(16, min(128, 4096 // width))
    blocks = -(-tokens // rows)
    count_BE, token_P, pair_NE, count_N, end_E = (
        torch.empty(shape, dtype=torch.int32, device=keep_NE.device)
        for shape in ((blocks, experts), (tokens * experts,), (tokens, experts), (tokens,), (experts,))
    )
    with device_of(keep_NE):
        count_pairs[(blocks,)](keep_NE, count_BE, tokens, experts, ROWS=rows, EXPERTS=width)
        place_pairs[(blocks,)](
            keep_NE, count_BE, token_P, pair_NE, count_N, end_E, tokens, blocks, experts,
            ROWS=rows, EXPERTS=width, STEP=rows,
        )  # fmt: skip
    return Pairs(token_P, pair_NE, count_N, end_E)


def precision() -> str:
    """Precision of products of float32, by PyTorch's setting."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


class Layer(NamedTuple):
    """Weights of experts with contiguous tensors, the code of their activation, and tiles other than the default."""

    weights: Weights
    code: int
    override: Tiles | None = None

    @classmethod
    def of(cls, weights: Weights, code: int, *, tile: Tiles | None = None) -> Layer:
        """Prepare weights; copies those that are not contiguous."""
        parts = (None if part is None else part.contiguous() for part in weights.tensors())
        up, down, up_bias, gate, gate_bias, bias = parts
        assert up is not None and down is not None
        weights = Weights(up, down, weights.activation, up_bias, gate, gate_bias, bias)
        return cls(weights, code, tile)

    def tile(self, kernel: Kernel) -> Tiles:
        """Tile sizes of a kernel."""
        return self.override or tiles(self.weights.up_EHD.dtype, kernel)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """E, H, D and O."""
        return (*self.weights.up_EHD.shape, self.weights.down_EHO.shape[2])

    def flags(self, weight_NE: Tensor | None) -> dict[str, Any]:
        """Constants of the kernels of the first layer."""
        w = self.weights
        return {
            "biased": w.up_bias_EH is not None, "gated": w.gate_EHD is not None,
            "gate_biased": w.gate_bias_EH is not None, "weighted": weight_NE is not None,
            "code": self.code, "precision": precision(), "EXPERTS": power_of_2(len(w.up_EHD)),
        }  # fmt: skip

    def first(self) -> tuple[Tensor, ...]:
        """Tensors of the first layer; the input weights stand for tensors that the kernel does not read."""
        w = self.weights
        return tuple(
            w.up_EHD if part is None else part for part in (w.up_EHD, w.up_bias_EH, w.gate_EHD, w.gate_bias_EH)
        )


def run_fused(layer: Layer, x_ND: Tensor, pairs: Pairs, weight_NE: Tensor | None) -> Tensor:
    """y_PO of experts of at most :data:`FUSED_NEURONS` neurons."""
    from clframe.moe.triton_kernels import expert_outputs

    experts, neurons, width, outputs = layer.sizes
    y_PO, tile = x_ND.new_empty(len(pairs.token_P), outputs), layer.tile("fused")
    with device_of(x_ND):
        expert_outputs[(tile_count(pairs, tile.rows),)](
            x_ND, pairs.token_P, pairs.end_E, *layer.first(), layer.weights.down_EHO,
            x_ND if weight_NE is None else weight_NE, y_PO, experts, neurons, width, outputs,
            **layer.flags(weight_NE), **tile.options(), NEURONS=power_of_2(neurons), COLUMNS=tile.columns,
        )  # fmt: skip
    return y_PO


def run_input_layer(
    layer: Layer, x_ND: Tensor, pairs: Pairs, weight_NE: Tensor | None, *, save: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """hidden_PH, and with ``save`` the pre-activations of the input layer and of the gate."""
    from clframe.moe.triton_kernels import hidden_rows

    experts, neurons, width, _ = layer.sizes
    hidden_PH = x_ND.new_empty(len(pairs.token_P), neurons)
    up_PH = torch.empty_like(hidden_PH) if save else None
    gate_PH = torch.empty_like(hidden_PH) if save and layer.weights.gate_EHD is not None else None
    tile = layer.tile("split")
    columns = min(tile.columns, power_of_2(neurons))
    with device_of(x_ND):
        hidden_rows[(-(-neurons // columns), tile_count(pairs, tile.rows))](
            x_ND, pairs.token_P, pairs.end_E, *layer.first(), x_ND if weight_NE is None else weight_NE, hidden_PH,
            hidden_PH if up_PH is None else up_PH, hidden_PH if gate_PH is None else gate_PH,
            experts, neurons, width, saved=save, **layer.flags(weight_NE), **tile.options(), COLUMNS=columns,
        )  # fmt: skip
    return hidden_PH, up_PH, gate_PH


def multiply_rows(
    hidden_PH: Tensor,
    down_EHO: Tensor,
    pairs: Pairs,
    *,
    tile: Tiles,
    other: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Product of the rows of pairs with the weights of their experts; of ``other`` rows and weights, added to it."""
    from clframe.moe.triton_kernels import output_rows

    experts, neurons, outputs = down_EHO.shape
    y_PO = hidden_PH.new_empty(len(hidden_PH), outputs)
    other_PH, other_EHO = (hidden_PH, down_EHO) if other is None else other
    options = {**tile.options(), "INNER": min(tile.inner, power_of_2(neurons))}
    with device_of(hidden_PH):
        output_rows[(-(-outputs // tile.columns), tile_count(pairs, tile.rows))](
            hidden_PH, other_PH, pairs.end_E, down_EHO, other_EHO, y_PO, experts, neurons, outputs,
            both=other is not None, precision=precision(), EXPERTS=power_of_2(experts), COLUMNS=tile.columns, **options,
        )  # fmt: skip
    return y_PO


def add_up(y_PO: Tensor, pairs: Pairs, bias_O: Tensor | None) -> Tensor:
    """y_NO: the sum of each token's rows, plus the bias."""
    from clframe.moe.triton_kernels import sum_pairs

    (tokens, experts), outputs = pairs.pair_NE.shape, y_PO.shape[1]
    y_NO, columns = y_PO.new_empty(tokens, outputs), min(1024, power_of_2(outputs, least=128))
    with device_of(y_PO):
        sum_pairs[(tokens, -(-outputs // columns))](
            y_PO, pairs.pair_NE, pairs.count_N, y_PO if bias_O is None else bias_O, y_NO, experts, outputs,
            biased=bias_O is not None, STEP=4, COLUMNS=columns, num_warps=columns // 256 or 1,
        )  # fmt: skip
    return y_NO


def hidden_gradients(
    layer: Layer, gradient_NO: Tensor, pairs: Pairs, weight_NE: Tensor | None, up_PH: Tensor, gate_PH: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of both pre-activations, hidden_PH, and the gradient of the factors."""
    from clframe.moe import triton_gradients

    experts, neurons, _, outputs = layer.sizes
    up_grad_PH, hidden_PH = torch.empty_like(up_PH), torch.empty_like(up_PH)
    gate_grad_PH = None if gate_PH is None else torch.empty_like(gate_PH)
    # Of all neurons of a pair: added with atomics where an expert has more than one tile of columns.
    weight_grad_NE = None if weight_NE is None else torch.zeros_like(weight_NE, dtype=torch.float32)
    tile = layer.tile("split")
    columns = min(tile.columns, power_of_2(neurons))
    with device_of(gradient_NO):
        triton_gradients.hidden_gradients[(-(-neurons // columns), tile_count(pairs, tile.rows))](
            gradient_NO, pairs.token_P, pairs.end_E, layer.weights.down_EHO,
            gradient_NO if weight_NE is None else weight_NE, up_PH, up_PH if gate_PH is None else gate_PH,
            up_grad_PH, up_grad_PH if gate_grad_PH is None else gate_grad_PH, hidden_PH,
            up_grad_PH if weight_grad_NE is None else weight_grad_NE, experts, neurons, outputs,
            gated=gate_PH is not None, weighted=weight_NE is not None, code=layer.code, precision=precision(),
            EXPERTS=power_of_2(experts), COLUMNS=columns, **tile.options(),
        )  # fmt: skip
    return up_grad_PH, gate_grad_PH, hidden_PH, weight_grad_NE


def weight_gradients(
    rows_PH: Tensor, x_ND: Tensor, pairs: Pairs, *, tile: Tiles, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``sum over pairs of an expert of rows_PH.t() @ x_ND[token]``, [E, H, D], and the sums of the rows, [E, H]."""
    from clframe.moe import triton_gradients

    experts, neurons, width = pairs.pair_NE.shape[1], rows_PH.shape[1], x_ND.shape[1]
    out_EHD = rows_PH.new_empty(experts, neurons, width)
    sum_EH = rows_PH.new_empty(experts, neurons) if sums else None
    rows = min(tile.rows, power_of_2(neurons))
    with device_of(x_ND):
        triton_gradients.weight_gradients[(-(-width // tile.columns), -(-neurons // rows), experts)](
            rows_PH, x_ND, pairs.token_P, pairs.end_E, out_EHD, out_EHD if sum_EH is None else sum_EH, neurons, width,
            summed=sums, precision=precision(), COLUMNS=tile.columns, **{**tile.options(), "ROWS": rows},
        )  # fmt: skip
    return out_EHD, sum_EH


def mask_rows(layer: Layer, up_NF: Tensor, gate_NF: Tensor | None, keep_NE: Tensor, weight_NE: Tensor | None) -> None:
    """Replace pre-activations of all experts, in place, by the hidden neurons of the active ones and zeros."""
    from clframe.moe.triton_kernels import mask_hidden

    (tokens, neurons), columns = up_NF.shape, min(1024, power_of_2(up_NF.shape[1], least=128))
    experts = keep_NE.shape[1]
    with device_of(up_NF):
        mask_hidden[(tokens, -(-neurons // columns))](
            up_NF, up_NF if gate_NF is None else gate_NF, keep_NE.contiguous().view(torch.int8),
            up_NF if weight_NE is None else weight_NE.contiguous(), experts, neurons // experts,
            gated=gate_NF is not None, weighted=weight_NE is not None, code=layer.code, COLUMNS=columns,
        )  # fmt: skip


def tile_count(pairs: Pairs, rows: int) -> int:
    """Largest number of tiles, with a last one of every expert that is not full.

    >>> pairs = Pairs(torch.empty(6), torch.empty(3, 2), torch.empty(3), torch.empty(2))
    >>> tile_count(pairs, 2), tile_count(pairs, 16)
    (4, 2)
    """
    tokens, experts = pairs.pair_NE.shape
    return experts * -(-tokens // rows)
