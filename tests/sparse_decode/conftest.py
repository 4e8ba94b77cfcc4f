"""Feed-forward networks of odd sizes."""

from __future__ import annotations

import pytest
import torch

from clframe.moe.dense import DenseFFN
from clframe.sparse_decode import SparseFFN


@pytest.fixture
def make_layer():
    """Function that makes a sparse layer of 37 inputs, 71 neurons and 29 outputs."""

    def make(rules, *, gated=True, biased=True, activation=torch.nn.functional.silu, dtype=torch.float32):
        generator = torch.Generator().manual_seed(len(str(rules)))

        def linear(inputs, outputs):
            weight = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
            return weight.to(dtype), torch.randn(outputs, generator=generator).to(dtype) if biased else None

        up, gate, down = linear(37, 71), linear(37, 71), linear(71, 29)
        ffn = DenseFFN(
            name="ffn", up=up, gate=gate if gated else None, down=down, activation=activation, install=lambda part: None
        )
        return SparseFFN(ffn, rules).eval(), ffn

    return make
