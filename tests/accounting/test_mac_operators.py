"""Operators that torch's counter leaves out or counts wrongly, each against arithmetic, forward and backward."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pack_padded_sequence

from clframe.accounting.mac_counter import MacCounter, family_of
from clframe.accounting.mac_formulas import product_formulas
from clframe.accounting.macs import count_macs
from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.policies import ExitPolicy
from clframe.nn import GrowingLinear, Network
from clframe.nn.backbones import mlp


def forward_and_backward(module, *inputs):
    """MACs of both passes, one after the other."""
    with MacCounter() as counter:
        out = module(*inputs)
        forward = counter.macs
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        assert counter.uncounted() == {}
        return forward, counter.macs - forward


def flops(name, *shapes, **rest):
    return product_formulas()[getattr(torch.ops.aten, name)](*shapes, **rest)


# --- convolution -----------------------------------------------------------------------------------------------------

CONVOLUTIONS = [
    # module, input, multiply-adds: positions x window x channels in / groups x channels out
    (nn.Conv1d(4, 6, 3), (2, 4, 9), 2 * 7 * 3 * 4 * 6),
    (nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), (3, 4, 7, 5), 3 * (4 * 3) * 6 * 4 * 6),
    (nn.Conv2d(8, 12, 3, groups=4, padding=1), (1, 8, 5, 5), 25 * 9 * 2 * 12),
    (nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 4), 2 * (3 * 2) * 9 * 1 * 6),
    (nn.Conv2d(6, 12, 3, groups=6, dilation=2), (2, 6, 7, 7), 2 * 9 * 9 * 1 * 12),
    (nn.Conv3d(2, 4, 2, groups=2), (1, 2, 3, 3, 3), 8 * 8 * 1 * 4),
    # transposed: every value of the input meets every window of its group
    (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 3), 2 * 15 * 9 * 4 * 6),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 3), 2 * 15 * 9 * 4 * 3),
    (nn.ConvTranspose1d(3, 3, 2, groups=3), (1, 3, 8), 8 * 2 * 3),
]


@pytest.mark.parametrize(("module", "shape", "macs"), CONVOLUTIONS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_both_gradients_of_a_convolution_cost_a_forward_pass_each(module, shape, macs, device):
    x = torch.zeros(*shape, device=device, requires_grad=True)
    module = module if device == "cpu" else type(module)(**arguments(module), device="meta")
    assert forward_and_backward(module, x) == (macs, 2 * macs)


def arguments(module):
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    found = {name: getattr(module, name) for name in names}
    return found | ({"output_padding": module.output_padding} if module.transposed else {})


def test_gradients_that_nobody_wants_cost_nothing():
    module, macs = nn.Conv2d(8, 8, 3, groups=8), 9 * 9 * 8
    assert forward_and_backward(module, torch.zeros(1, 8, 5, 5)) == (macs, macs)
    module.weight.requires_grad = False
    assert forward_and_backward(module, torch.zeros(1, 8, 5, 5, requires_grad=True)) == (macs, macs)


def test_a_depthwise_network_trains_at_three_forward_passes():
    """Before: 34 times the forward pass, by torch's own formula."""
    block = nn.Sequential(nn.Conv2d(32, 32, 3, groups=32, bias=False), nn.ReLU(), nn.Conv2d(32, 5, 1, bias=False))
    forward, backward = forward_and_backward(block, torch.zeros(2, 32, 6, 6, requires_grad=True))
    assert forward == 2 * 16 * (9 * 32 + 32 * 5) and backward == 2 * forward


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, None])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 7)])
def test_attention_is_two_products_whatever_runs_it(backend, queries, keys):
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (queries, keys, keys))
    pair = 2 * 3 * queries * keys * 8
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        forward, backward = forward_and_backward(scaled_dot_product_attention, q, k, v)
    assert forward == 2 * pair
    # The fused one keeps no scores and has to take that product once more.
    assert backward == (4 if backend is SDPBackend.MATH else 5) * pair


@pytest.mark.parametrize(
    "name",
    [
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    ],
)  # fmt: skip
def test_attention_of_other_devices_by_shapes(name):
    q, k, v = (3, 4, 5, 6), (3, 2, 7, 6), (3, 2, 7, 9)  # two heads share their keys and values
    scores, values = 3 * 4 * 5 * 7 * 6, 3 * 4 * 5 * 7 * 9
    assert flops(name, q, k, v) == 2 * (scores + values)
    assert flops(f"{name}_backward", (3, 4, 5, 9), q, k, v) == 2 * (3 * scores + 2 * values)


@pytest.mark.parametrize("needs_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention(needs_weights, training):
    module = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
    x = torch.randn(3, 5, 8)
    with torch.set_grad_enabled(training), MacCounter() as counter:
        module(x, x, x, need_weights=needs_weights)
    assert counter.macs == 3 * (5 * 4 * 8 * 8 + 2 * 5 * 5 * 8)
    assert counter.uncounted() == {}


@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_layer_costs_the_same_in_either_mode(training):
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=20, batch_first=True, dropout=0.0).train(training)
    with torch.set_grad_enabled(training), MacCounter() as counter:
        layer(torch.zeros(3, 5, 8))
    assert counter.macs == 3 * (5 * (4 * 8 * 8 + 2 * 8 * 20) + 2 * 5 * 5 * 8)


# --- recurrent layers ------------------------------------------------------------------------------------------------


def recurrent_macs(gates, length, batch, width, hidden, *, layers=1, directions=1):
    first = gates * hidden * (width + hidden)
    later = gates * hidden * (directions * hidden + hidden)
    return length * batch * directions * (first + (layers - 1) * later)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize(("layers", "directions", "batch", "length"), [(1, 1, 1, 1), (2, 1, 3, 4), (2, 2, 2, 5)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_recurrent_layers_forward(kind, gates, layers, directions, batch, length, device):
    module = kind(3, 5, num_layers=layers, bidirectional=directions == 2, batch_first=True, device=device)
    expected = recurrent_macs(gates, length, batch, 3, 5, layers=layers, directions=directions)
    with torch.no_grad(), MacCounter() as counter:
        module(torch.zeros(batch, length, 3, device=device))
    assert counter.macs == expected
    assert count_macs(module, (length, 3), batch=batch) == expected


def test_lstm_backward_is_both_gradients_of_both_matrices():
    """oneDNN computes all of them, that of the first hidden state among them."""
    macs = recurrent_macs(4, 4, 2, 3, 5)
    forward, backward = forward_and_backward(nn.LSTM(3, 5), torch.randn(4, 2, 3, requires_grad=True))
    assert forward == macs
    # Without oneDNN the gradient of the first hidden state, which nobody wants, is not taken.
    assert backward in (2 * macs, 2 * macs - 2 * 4 * 5 * 5)


def test_an_lstm_with_a_projection_counts_it():
    with warnings.catch_warnings(), torch.no_grad(), MacCounter() as counter:
        warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
        nn.LSTM(3, 5, proj_size=2)(torch.zeros(4, 2, 3))
    assert counter.macs == 4 * 2 * (20 * 3 + 20 * 2 + 5 * 2)


def test_packed_sequences_count_their_real_lengths():
    packed = pack_padded_sequence(torch.zeros(6, 3, 3), torch.tensor([6, 4, 1]))
    with torch.no_grad(), MacCounter() as counter:
        nn.GRU(3, 5)(packed)
    assert counter.macs == recurrent_macs(3, 11, 1, 3, 5)


def test_the_recurrent_layers_of_a_gpu_by_shapes():
    weights = [(20, 3), (20, 5), (20,), (20,)] * 2
    assert flops("_cudnn_rnn", (4, 2, 3), weights, 4) == 2 * 4 * 2 * 2 * (20 * 3 + 20 * 5)
    masked = [(4, 2, 3), weights, 4, [], (1, 2, 5), [True, False, True, True]]
    assert flops("_cudnn_rnn_backward", *masked) == 2 * flops("_cudnn_rnn", (4, 2, 3), weights, 4)
    masked[-1] = [True, False, True, False]
    assert flops("_cudnn_rnn_backward", *masked) == flops("_cudnn_rnn", (4, 2, 3), weights, 4)


# --- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("product", "macs"),
    [
        (lambda a, b: a @ b[:, 0], 3 * 4),
        (lambda a, b: torch.addmv(a[:, 0], a, b[:, 0]), 3 * 4),
        (lambda a, b: torch.dot(a[0], b[:, 0]), 4),
        (lambda a, b: torch.zeros(3, 5).addmm_(a, b), 3 * 4 * 5),
        (lambda a, b: torch.zeros(2, 3, 5).baddbmm_(a.expand(2, 3, 4), b.expand(2, 4, 5)), 2 * 3 * 4 * 5),
        (lambda a, b: torch.addbmm(torch.zeros(3, 5), a.expand(2, 3, 4), b.expand(2, 4, 5)), 2 * 3 * 4 * 5),
        (lambda a, b: torch.mm(a, b, out=torch.empty(3, 5)), 3 * 4 * 5),
        (lambda a, b: torch.einsum("bi,io->bo", a, b), 3 * 4 * 5),
        (lambda a, b: nn.Bilinear(4, 5, 6)(a, torch.ones(3, 5)), 3 * 4 * 5 * 6),
    ],
)
def test_products_of_every_kind(product, macs):
    with torch.no_grad(), MacCounter() as counter:
        product(torch.ones(3, 4), torch.ones(4, 5))
    assert counter.macs == macs
    assert counter.uncounted() == {}


def test_what_no_formula_covers_is_named():
    with torch.no_grad(), MacCounter() as counter:
        for _ in range(3):
            torch.fft.rfft(torch.ones(8)) * 2
        torch.relu(torch.ones(2)) + 1
    assert counter.macs == 0
    assert counter.uncounted() == {"aten._fft_r2c": 3}
    assert counter.by_convention()["element-wise"] == {"aten.add": 1, "aten.mul": 3, "aten.relu": 1}


# --- paths that depend on values -------------------------------------------------------------------------------------


def test_samples_that_leave_early_stop_costing():
    network = Network(mlp((3,), width=6, depth=2), exits=[("layer1", GrowingLinear(6))])
    network.grow(range(2))
    with torch.no_grad():
        head = network.heads[0]
        for parameter in head.parameters():
            parameter.zero_()
        head.weight[0, 0] = 100.0
    x = torch.randn(9, 3)
    with torch.no_grad():
        tap = network(x, taps=("layer1",)).taps["layer1"]
        sure = int((network.heads[0](tap).softmax(1).amax(1) >= 0.9).sum())
    assert 0 < sure < 9, "the case needs samples of both kinds"
    dynamic = DynamicNetwork(network, ExitPolicy(thresholds=0.9), compact=0)
    with MacCounter() as counter:
        _, exit_B = dynamic(x)
    assert int((exit_B == 0).sum()) == sure
    assert counter.macs == 9 * (3 * 6 + 6 * 2) + (9 - sure) * (6 * 6 + 6 * 2)


class Experts(nn.Module):
    """As many experts for each sample as its gate lets through."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 2)) for _ in range(3))

    def chosen(self, x):
        return self.gate(x).sigmoid() > 0.5

    def forward(self, x):
        out, chosen_BE = x.new_zeros(len(x), 2), self.chosen(x)
        for expert, module in enumerate(self.experts):
            index = chosen_BE[:, expert].nonzero().squeeze(1)
            out = out.index_add(0, index, module(x[index]))
        return out


@pytest.mark.parametrize("batch", [1, 8, 13])
def test_experts_cost_the_pairs_that_run(batch):
    torch.manual_seed(batch)
    module, x = Experts(), torch.randn(batch, 4)
    with torch.no_grad():
        pairs = int(module.chosen(x).sum())
    assert 0 < pairs < 3 * batch
    with torch.no_grad(), MacCounter() as counter:
        module(x)
    assert counter.macs == batch * 4 * 3 + pairs * (4 * 7 + 7 * 2)
    assert counter.uncounted() == {}


# --- the counter -----------------------------------------------------------------------------------------------------


def test_the_fast_path_comes_back_even_after_an_error():
    before = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError, match="on purpose"), MacCounter() as counter:
        torch.ones(2, 2) @ torch.ones(2, 2)
        raise RuntimeError("on purpose")
    assert torch.backends.mha.get_fastpath_enabled() is before
    torch.ones(2, 2) @ torch.ones(2, 2)
    assert counter.macs == 8


def test_counting_changes_no_number():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    x = torch.randn(5, 2, 5, 5)
    plain = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    with MacCounter():
        counted = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, counted, strict=True))


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU, nn.SiLU, nn.Mish])  # fmt: skip
def test_activations_in_place_count_nothing(activation):
    with MacCounter() as counter:
        nn.Sequential(nn.Linear(3, 5), activation(inplace=True))(torch.randn(2, 3)).sum().backward()
    assert counter.macs == 2 * 30 and not counter.uncounted()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no collectives")
def test_gradients_that_processes_exchange_are_no_gap():
    assert family_of(torch.ops.c10d.allreduce_.default) == "communication"
    assert family_of(torch.ops._c10d_functional.all_reduce.default) == "communication"
