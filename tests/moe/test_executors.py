"""Every executor against the definition, forwards and backwards."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from clframe.errors import UnsupportedError
from clframe.moe import dispatch as execute
from clframe.moe import executors, split_products
from clframe.moe.dispatch import EXECUTORS, Choice, Costs, Plan, choose, count_computed_pairs, run
from clframe.moe.executors import Weights, grouped_mm_works, merged_groups, reference
from clframe.moe.split_products import parts_of

FAST = ("dense", "per_token", "grouped", "grouped_mm")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2}


def make(e=4, h=8, d=16, o=12, *, gated=False, biased=True, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64).mul(0.3).to(dtype).requires_grad_()

    return Weights(
        up_EHD=leaf(e, h, d),
        down_EHO=leaf(e, h, o),
        activation=F.gelu if gated else F.relu,
        up_bias_EH=leaf(e, h) if biased else None,
        gate_EHD=leaf(e, h, d) if gated else None,
        gate_bias_EH=leaf(e, h) if gated and biased else None,
        bias_O=leaf(o) if biased else None,
    )


def routing(n, e, kind="random"):
    keep = torch.rand(n, e) < 0.4
    if kind == "empty experts":
        keep[:, ::2] = False
        keep[:, -1] = True
    elif kind == "none":
        keep[:] = False
    elif kind == "all":
        keep[:] = True
    return keep


def longhand(weights, x, keep, weight=None):
    """The sum over (token, expert) pairs, one by one."""
    rows = []
    for n in range(len(x)):
        y = torch.zeros(weights.down_EHO.shape[2], dtype=x.dtype) if weights.bias_O is None else weights.bias_O
        for e in range(len(weights.up_EHD)):
            if keep[n, e]:
                up = weights.up_EHD[e] @ x[n] + (0 if weights.up_bias_EH is None else weights.up_bias_EH[e])
                if weights.gate_EHD is None:
                    hidden = weights.activation(up)
                else:
                    bias = 0 if weights.gate_bias_EH is None else weights.gate_bias_EH[e]
                    hidden = up * weights.activation(weights.gate_EHD[e] @ x[n] + bias)
                y = y + (hidden @ weights.down_EHO[e]) * (1 if weight is None else weight[n, e])
        rows.append(y)
    return torch.stack(rows)


def close(a, b, tolerance):
    assert (a is None) == (b is None)
    if a is not None:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def gradients(executor, weights, x, keep, weight, direction):
    leaves = [x, weight, *weights.tensors()]
    leaves = [leaf for leaf in leaves if leaf is not None]
    y = executor(weights, x, keep, weight)
    return y, torch.autograd.grad((y * direction).sum(), leaves, allow_unused=True, materialize_grads=True)


def usable(name, weights, x):
    return name != "grouped_mm" or grouped_mm_works(weights, x)


@pytest.mark.parametrize(("gated", "biased", "scaled"), list(itertools.product((False, True), repeat=3)))
def test_reference_is_the_sum_over_pairs(gated, biased, scaled):
    weights = make(3, 5, 7, 2, gated=gated, biased=biased)
    x, keep = torch.randn(6, 7, dtype=torch.float64), routing(6, 3)
    scale = torch.rand(6, 3, dtype=torch.float64) if scaled else None
    close(reference(weights, x, keep, scale), longhand(weights, x, keep, scale), 1e-12)


@pytest.mark.parametrize("kind", ["random", "empty experts", "none", "all"])
@pytest.mark.parametrize(("gated", "biased"), [(False, True), (True, True), (False, False), (True, False)])
@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_agree_with_the_reference_and_its_gradients(name, gated, biased, kind, dtype):
    for seed, (n, e, h, d, o, scaled) in enumerate(
        [(1, 4, 8, 16, 8, False), (9, 5, 8, 24, 16, True), (7, 1, 8, 8, 8, False), (3, 6, 3, 5, 7, True)]
    ):
        weights = make(e, h, d, o, gated=gated, biased=biased, dtype=dtype, seed=seed)
        x = torch.randn(n, d, dtype=torch.float64).to(dtype).requires_grad_()
        keep = routing(n, e, kind)
        scale = torch.rand(n, e, dtype=torch.float64).to(dtype).requires_grad_() if scaled else None
        direction = torch.randn(n, o, dtype=torch.float64).to(dtype)
        if not usable(name, weights, x):
            continue
        # In half precision both are compared with the same computed in double precision.
        exact = Weights(
            activation=weights.activation,
            **{
                key: None if part is None else part.detach().double().requires_grad_()
                for key, part in zip(
                    ("up_EHD", "down_EHO", "up_bias_EH", "gate_EHD", "gate_bias_EH", "bias_O"), weights.tensors(), strict=True
                )
            },
        )
        scale64 = None if scale is None else scale.detach().double().requires_grad_()
        y, grads = gradients(EXECUTORS[name], weights, x, keep, scale, direction)
        expected, wanted = gradients(
            reference, exact, x.detach().double().requires_grad_(), keep, scale64, direction.double()
        )
        assert y.dtype == dtype
        close(y.double(), expected, TOLERANCE[dtype])
        for own, other in zip(grads, wanted, strict=True):
            close(own.double(), other, TOLERANCE[dtype] * max(1.0, float(other.abs().max())))
        with torch.no_grad():  # other code may run without gradients
            close(EXECUTORS[name](weights, x, keep, scale).double(), expected, TOLERANCE[dtype])


def test_grouped_mm_takes_the_sizes_it_can_and_no_others():
    x = torch.randn(2, 16)
    float32 = make(2, 8, 16, 12, dtype=torch.float32)
    odd = make(2, 7, 16, 12, dtype=torch.float32)
    assert not grouped_mm_works(odd, x) and not grouped_mm_works(make(2, 8, 16, 12), x.double())
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this torch has no grouped product on the CPU")
    assert grouped_mm_works(float32, x)


def test_a_torch_without_the_grouped_product_is_one_line(monkeypatch):
    monkeypatch.setattr(executors, "_grouped_product", lambda: None)
    with pytest.raises(UnsupportedError, match=r"^grouped_mm: torch .* has no grouped product; use 'grouped'$"):
        executors.grouped_mm(make(2, 8, 16, 12, dtype=torch.float32), torch.randn(2, 16), torch.ones(2, 2, dtype=torch.bool))


def test_double_precision_gradients_by_finite_differences():
    weights = make(3, 2, 4, 3, gated=True)
    keep = torch.tensor([[True, False, True], [False, True, False]])
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    for name in ("dense", "per_token", "grouped"):
        assert torch.autograd.gradcheck(lambda x, name=name: EXECUTORS[name](weights, x, keep, None), (x,))


@pytest.mark.parametrize(("n", "fraction"), [(1, 0.2), (1, 1.0), (5, 0.3), (5, 0.95), (40, 0.3)])
@pytest.mark.parametrize("plan", [Plan(), Plan(few=2, read=0, read_all=0, grouped=Costs(0, 0, 0), product=Costs(0, 0, 2), merge=0)])
def test_the_choice_changes_nothing(n, fraction, plan):
    weights = make(6, 8, 16, 8, dtype=torch.float32)
    x, keep = torch.randn(n, 16), torch.rand(n, 6) < fraction
    close(run(weights, x, keep, plan=plan), reference(weights, x, keep), 2e-5)


NEVER = Costs(1e12, 0, 0)


@pytest.mark.parametrize("grouped_product", [False, True])
def test_the_cheapest_is_chosen(monkeypatch, grouped_product):
    """Costs longhand: 4 experts of 8 neurons, 24 MACs a neuron; on one thread."""
    monkeypatch.setattr(execute, "grouped_mm_works", lambda weights, x: grouped_product)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    weights = make(4, 8, 16, 8, dtype=torch.float32)
    one = torch.tensor([[False, False, True, False]])

    def chosen(keep, tokens, *, grouped=NEVER, product=NEVER, **options):
        keep = keep.expand(tokens, 4)
        plan = Plan(grouped=grouped, product=product, **{"read": 0.0, "read_all": 0.0, "merge": 0, "margin": 1.0, **options})
        return choose(weights, torch.randn(tokens, 16), keep, plan=plan).name

    assert chosen(one, 1, token=8.0) == "per_token" and chosen(~one, 1, token=8.0) == "dense"  # 3 of 4 is above 8 / 16
    # 9 tokens: 9 * 32 * 24 MACs dense, 9 * 8 * 24 of one expert; whatever is added must stay below the difference.
    for call, start, pair, name in (
        (0, 0, 0, "grouped"), (5183, 0, 0, "grouped"), (5185, 0, 0, "dense"), (0, 5183, 0, "grouped"), (0, 5185, 0, "dense"),
        (0, 0, 23.9, "grouped"), (0, 0, 24.1, "dense"),
    ):  # fmt: skip
        assert chosen(one, 9, grouped=Costs(call, start, pair)) == name
    # Three experts: 9 * 24 * 24 MACs, three starts, 27 pairs. Difference 9 * 8 * 24.
    assert chosen(~one, 9, grouped=Costs(0, 575, 0)) == "grouped" and chosen(~one, 9, grouped=Costs(0, 577, 0)) == "dense"
    # Weights that are read cost 2 more tokens: 11 * 32 * 24 dense, of one expert 11 * 8 * 24.
    assert chosen(one, 9, grouped=Costs(6335, 0, 0), read=2.0, read_all=2.0) == "grouped"
    assert chosen(one, 9, grouped=Costs(6337, 0, 0), read=2.0, read_all=2.0) == "dense"
    # A share of dense's 9 * 32 * 24.
    assert chosen(one, 9, grouped=Costs(1727, 0, 0), margin=0.5) == "grouped"
    assert chosen(one, 9, grouped=Costs(1729, 0, 0), margin=0.5) == "dense"
    best = "grouped_mm" if grouped_product else "grouped"
    assert chosen(one, 9, grouped=Costs(9, 0, 0), product=Costs(8, 0, 0)) == best
    assert chosen(one, 9, grouped=Costs(0, 0, 1), product=Costs(0, 0, 1.1)) == "grouped"
    assert chosen(torch.zeros(1, 4, dtype=torch.bool), 9, grouped=Costs(0, 0, 0)) == "dense"
    assert chosen(one, 0, grouped=Costs(0, 0, 0)) == "dense"


def test_threads_make_products_cheaper_and_starts_not(monkeypatch):
    monkeypatch.setattr(execute, "grouped_mm_works", lambda weights, x: False)
    weights, keep = make(4, 8, 16, 8, dtype=torch.float32), torch.tensor([[True, False, False, False]]).expand(9, 4)
    plan = Plan(read=0, read_all=0, grouped=Costs(0, 4000.0, 0), merge=0, margin=1.0)
    names = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        names.append(choose(weights, torch.randn(9, 16), keep, plan=plan).name)
    assert names == ["grouped", "dense"]  # 5184 MACs saved, then 2592


def test_two_threads_gain_nothing_on_reading_small_experts_and_half_on_moving_rows(monkeypatch):
    """Costs longhand: 9 tokens of one of 4 experts of 8 neurons, 24 MACs a neuron, 12 on each of two threads."""
    monkeypatch.setattr(execute, "grouped_mm_works", lambda weights, x: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    weights, keep = make(4, 8, 16, 8, dtype=torch.float32), torch.tensor([[True, False, False, False]]).expand(9, 4)

    def chosen(**options):
        plan = Plan(**{"read": 0.0, "read_all": 0.0, "merge": 0, "margin": 1.0, **options})
        return choose(weights, torch.randn(9, 16), keep, plan=plan).name

    # Dense 9 * 32 * 12 = 3456. Reading 2 tokens' worth on one thread: (2 * 2 * 8 + 9 * 8) * 12 = 1248.
    assert chosen(read=2.0, grouped=Costs(2207, 0, 0)) == "grouped" and chosen(read=2.0, grouped=Costs(2209, 0, 0)) == "dense"
    # A pair's rows at 4 / 3 of the cost of products: 9 * (8 + 18 * 4 / 3) * 12 = 3456.
    assert chosen(grouped=Costs(0, 0, 17.9)) == "grouped" and chosen(grouped=Costs(0, 0, 18.1)) == "dense"
    monkeypatch.setattr(execute, "WIDE", 8)  # (2 * 8 + 9 * 8) * 12 = 1056
    assert chosen(read=2.0, grouped=Costs(2399, 0, 0)) == "grouped" and chosen(read=2.0, grouped=Costs(2401, 0, 0)) == "dense"


def test_one_token_with_the_other_experts_zeroed():
    for gated in (False, True):
        weights = make(4, 3, 5, 7, gated=gated)
        x, keep = torch.randn(1, 5, dtype=torch.float64), torch.tensor([[True, False, True, True]])
        with torch.no_grad():
            close(executors.dense_without(weights, x, [1]), reference(weights, x, keep), 1e-12)
            close(executors.dense_without(weights, x, []), reference(weights, x, torch.ones_like(keep)), 1e-12)


@pytest.mark.parametrize("threads", [2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 5, 100, 101])
@pytest.mark.parametrize(("gated", "biased"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parts_for_several_threads_agree_with_the_reference(monkeypatch, threads, n, gated, biased, dtype):
    weights, x = make(gated=gated, biased=biased, dtype=dtype, seed=n), torch.randn(n, 16).to(dtype)
    keep, factors = routing(n, 4), torch.rand(n, 4).to(dtype)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(split_products, "LARGE", weights.up_EHD.numel())
    with torch.no_grad():
        # 32 neurons do not divide among 3 threads; 4 threads have 400 rows of 100 tokens
        assert parts_of(x, weights.up_EHD) == (1 if threads == 3 or threads * n > 400 else threads)
        expected = reference(weights, x, keep, factors)
        torch.testing.assert_close(executors.dense(weights, x, keep, factors), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        inactive = (~keep[0]).nonzero().flatten().tolist()
        torch.testing.assert_close(
            executors.dense_without(weights, x[:1], inactive), reference(weights, x[:1], keep[:1]),
            atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype],
        )  # fmt: skip


def test_where_products_are_not_computed_in_parts(monkeypatch):
    weights, x = make(), torch.randn(3, 16).double()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(split_products, "LARGE", 0)
    assert parts_of(x, weights.up_EHD) == 1  # gradients are enabled
    with torch.no_grad():
        assert parts_of(x, weights.up_EHD) == 2
        assert parts_of(x[:0], weights.up_EHD) == parts_of(x.bfloat16(), weights.up_EHD) == 1
        assert parts_of(x.to("meta"), weights.up_EHD) == 1
        assert torch.vmap(lambda row: row * parts_of(row[None], weights.up_EHD))(x).equal(x)
        monkeypatch.setattr(split_products, "LARGE", weights.up_EHD.numel() + 1)
        assert parts_of(x, weights.up_EHD) == 1
        monkeypatch.setattr(split_products, "LARGE", 0)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        assert parts_of(x, weights.up_EHD) == 1


def test_parts_make_computing_everything_cheaper(monkeypatch):
    """Costs longhand, of one expert: 9 tokens and 3 more by 4 experts are 48, 9 x 3 pairs are 27."""
    weights, x, keep = make(), torch.randn(9, 16).double(), torch.tensor([True, True, True, False]).repeat(9, 1)
    plan = Plan(few=0, read=0, read_all=3, grouped=Costs(0, 0, 0), product=Costs(1e9, 0, 0), margin=1.0, merge=0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(split_products, "LARGE", 0)
    assert choose(weights, x, keep, plan=plan) == Choice("grouped")  # 27 < 48
    with torch.no_grad():
        for gain, name in ((48 / 27 - 0.01, "grouped"), (48 / 27 + 0.01, "dense")):
            side_by_side = 1 + (gain - 1) / (1 - 18 / 400)
            assert choose(weights, x, keep, plan=replace(plan, side_by_side=side_by_side)).name == name


def test_small_neighbors_run_together_where_tokens_keep_them_together(monkeypatch):
    monkeypatch.setattr(execute, "grouped_mm_works", lambda weights, x: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    weights, x = make(12, 2, 16, 8, dtype=torch.float32), torch.randn(9, 16)
    blocks = torch.zeros(9, 12, dtype=torch.bool)
    blocks[:, 4:8] = True
    costs = {"read": 0, "read_all": 0, "grouped": Costs(0, 50.0, 4.0)}
    plan = Plan(**costs, merge=8)
    # 36 pairs of 2 neurons: 4 * 50 + 36 * 6 * 24 MACs; 9 of 8 neurons: 50 + 9 * 12 * 24.
    assert choose(weights, x, blocks, plan=plan) == Choice("grouped", 4)
    assert choose(weights, x, blocks.roll(2, 1), plan=plan).merged == 2  # they lie across two blocks of four
    assert choose(weights, x, blocks, plan=Plan(**costs, merge=6)).merged == 2
    close(run(weights, x, blocks, plan=plan), reference(weights, x, blocks), 2e-5)
    assert count_computed_pairs(Choice("grouped", 4), blocks.roll(2, 1)) == 9 * 8
    assert count_computed_pairs(Choice("grouped"), blocks) == 36 and count_computed_pairs(Choice("dense"), blocks) == 9 * 12


@pytest.mark.parametrize(("gated", "biased", "scaled"), list(itertools.product((False, True), repeat=3)))
@pytest.mark.parametrize("many", [1, 2, 3, 6])
def test_merged_experts_agree_with_the_reference_and_its_gradients(gated, biased, scaled, many):
    weights = make(6, 3, 5, 7, gated=gated, biased=biased)
    x, keep = torch.randn(8, 5, dtype=torch.float64, requires_grad=True), routing(8, 6)
    scale = torch.rand(8, 6, dtype=torch.float64, requires_grad=True) if scaled else None
    direction = torch.randn(8, 7, dtype=torch.float64)
    own = gradients(lambda *args: merged_groups(*args, many=many), weights, x, keep, scale, direction)
    other = gradients(reference, weights, x, keep, scale, direction)
    close(own[0], other[0], 1e-12)
    for a, b in zip(own[1], other[1], strict=True):
        close(a, b, 1e-12)
    with torch.no_grad():
        close(merged_groups(weights, x, keep, scale, many=many), other[0].detach(), 1e-12)


def test_under_vmap_everything_is_computed_and_masked():
    """Gradients of samples, as importances of weights take them: nothing may branch on a value."""
    weights, x = make(4, 8, 16, 8), torch.randn(5, 3, 16, dtype=torch.float64)
    keep = routing(15, 4).view(5, 3, 4)
    y = torch.func.vmap(lambda x_ND, keep_NE: run(weights, x_ND, keep_NE))(x, keep)
    close(y, torch.stack([reference(weights, a, b) for a, b in zip(x, keep, strict=True)]), 1e-12)


def test_no_tokens():
    weights = make(4, 8, 16, 12, dtype=torch.float32)
    y = run(weights, torch.randn(0, 16), torch.zeros(0, 4, dtype=torch.bool))
    assert y.shape == (0, 12)
    y.sum().backward()
    assert float(weights.up_EHD.grad.abs().sum()) == 0
