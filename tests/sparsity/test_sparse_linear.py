"""The linear layer that skips inputs: equal to masking and multiplying."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clframe.errors import ConfigError, UnsupportedError
from clframe.sparsity import SparseLinear, break_even
from clframe.sparsity.functional import keep


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(5)


@pytest.fixture
def bags(monkeypatch):
    """How often the bag was used."""
    calls, plain = [], F.embedding_bag
    monkeypatch.setattr(F, "embedding_bag", lambda *a, **k: calls.append(1) or plain(*a, **k))
    return calls


@pytest.mark.parametrize("rule, value", [("max_p", 0.3), ("threshold", 0.7), ("max_p", 1.0), ("threshold", 99.0)])
@pytest.mark.parametrize("shape", [(13,), (1, 13), (1, 1, 13), (3, 13)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_equals_the_masked_dense_layer(rule, value, shape, bias, bags):
    linear = nn.Linear(13, 7, bias=bias, dtype=torch.float64)
    sparse = SparseLinear(linear, value=value, rule=rule, dense_above=1.0, tokens=3)
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        expected = linear(x * keep(x, value, kind=rule))
        assert torch.allclose(sparse(x), expected, rtol=1e-12, atol=1e-14)
    assert sparse(x).shape == (*shape[:-1], 7) and len(bags) == 2


def test_dense_above_the_density_and_for_many_tokens(bags):
    linear = nn.Linear(10, 4)
    x = torch.tensor([[9.0] * 3 + [0.1] * 7])  # density 0.3
    for dense_above, used in ((0.3, 1), (0.29, 0), (0.0, 0)):
        bags.clear()
        y = SparseLinear(linear, value=0.5, dense_above=dense_above)(x)
        assert len(bags) == used and torch.allclose(y, linear(x * (x > 1)), atol=1e-6)
    bags.clear()
    many = x.expand(5, 10)
    assert torch.allclose(SparseLinear(linear, value=0.5)(many), linear(many * (many > 1)), atol=1e-6) and not bags


@pytest.mark.parametrize("shape", [(0, 10), (2, 0, 10)])
def test_empty_batches_keep_their_shape(shape):
    assert SparseLinear(nn.Linear(10, 4), value=0.5)(torch.zeros(shape)).shape == (*shape[:-1], 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    linear = nn.Linear(64, 9).to(dtype)
    x = torch.randn(1, 64).to(dtype)
    y = SparseLinear(linear, value=0.6, dense_above=1.0)(x)
    expected = linear(x * keep(x, 0.6, kind="max_p"))
    assert y.dtype == dtype and torch.allclose(y.float(), expected.float(), atol=2e-2, rtol=2e-2)


def test_it_keeps_a_copy_that_is_no_state():
    linear = nn.Linear(5, 3)
    sparse = SparseLinear(linear, value=0.5)
    assert not sparse.state_dict() and not list(sparse.parameters())
    before = sparse(torch.ones(1, 5))
    nn.init.zeros_(linear.weight)
    assert torch.equal(sparse(torch.ones(1, 5)), before)


def test_break_even_is_a_density():
    assert 0 <= break_even(nn.Linear(64, 32), points=3, repeats=3) < 1


def test_what_it_refuses():
    with pytest.raises(UnsupportedError, match="found Conv2d; give a linear layer"):
        SparseLinear(nn.Conv2d(1, 1, 1), value=0.5)
    with pytest.raises(UnsupportedError, match="meta device"):
        SparseLinear(nn.Linear(2, 2, device="meta"), value=0.5)
    with pytest.raises(ConfigError, match=r"sparsity\.max_p: found 2"):
        SparseLinear(nn.Linear(2, 2), value=2)
    with pytest.raises(ConfigError, match="dense_above: found 1.5"):
        SparseLinear(nn.Linear(2, 2), value=0.5, dense_above=1.5)
