"""Sparse decoding on a GPU: every type, and inside a CUDA graph."""

import importlib.util
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from clframe.exits import make_head
from clframe.moe import TopK, set_gate, to_experts
from clframe.moe.dense import DenseFFN
from clframe.nn.backbones import BACKBONES
from clframe.nn.generation import generate, speculate
from clframe.nn.kernels import relative_error
from clframe.nn.network import Network
from clframe.sparse_decode import Rule, SparseFFN, calibrate, sparse_decoder
from clframe.sparse_decode.launch import largest_error, run
from clframe.sparse_decode.projection import compute_masked

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]

SHAPES = [(37, 71, 29), (512, 1368, 512), (2048, 8192, 2048)]
RULES = {
    "intermediate": {"intermediate": Rule("threshold", 0.3)},
    "input": {"input": Rule("threshold", 1.0)},
    "both": {"input": Rule("max_p", 0.2), "intermediate": Rule("top_p", 0.7)},
    "gate": {"gate": Rule("threshold", 0.3)},
    "up": {"up": Rule("top_k", 0.25)},
    "input and gate": {"input": Rule("threshold", 1.0), "gate": Rule("max_p", 0.2)},
}


def make(shape, rules, *, gated, dtype):
    generator = torch.Generator().manual_seed(shape[0])

    def linear(inputs, outputs):
        weight = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
        return weight.to("cuda", dtype), torch.randn(outputs, generator=generator).to("cuda", dtype)

    width, neurons, outputs = shape
    ffn = DenseFFN(
        name="", up=linear(width, neurons), gate=linear(width, neurons) if gated else None,
        down=linear(neurons, outputs), activation=F.silu if gated else F.relu, install=lambda part: None,
    )  # fmt: skip
    return SparseFFN(ffn, rules).eval(), torch.randn(1, width, generator=generator).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_agree_with_the_masked_network(shape, name, dtype):
    gated = name not in ("intermediate", "both") or shape[0] == 512
    layer, x = make(shape, RULES[name], gated=gated, dtype=dtype)
    parts = layer.parts()
    assert largest_error(parts, x) < {4: 1e-4, 2: 2e-2}[dtype.itemsize]
    # Entries next to a threshold may be on either side of it.
    assert relative_error(run(parts, x), compute_masked(parts, x)) < {4: 1e-3, 2: 5e-2}[dtype.itemsize]
    assert layer.choose(parts, x) is run and layer.choose(parts, x.expand(2, -1)) is compute_masked
    assert torch.equal(run(parts, x), run(parts, x))


@pytest.mark.parametrize("name", ["intermediate", "both", "input and gate"])
def test_a_cuda_graph_follows_new_tokens(name):
    """The number of zeros changes with the token, the graph does not."""
    layer, x = make(SHAPES[1], RULES[name], gated=True, dtype=torch.bfloat16)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer(x), layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(x)
        for scale in (0.0, 0.5, 1.0, 3.0):
            x.copy_(torch.randn(1, 512, generator=torch.Generator().manual_seed(7)) * scale)
            graph.replay()
            assert torch.equal(captured, layer(x))


def test_generation():
    torch.manual_seed(4)
    network = Network(BACKBONES.get("decoder")((65,), vocabulary=90, width=64, depth=3, heads=2)).eval()
    for weight in network.parameters():
        weight.data.mul_(6)
    ids = torch.randint(0, 90, (4, 65), generator=torch.Generator().manual_seed(5))
    (rules,) = calibrate(network, [(ids, None, None)], sparsities=[0.75])
    want = generate(sparse_decoder(network, rules), ids[0, :8].tolist(), 16).ids
    assert generate(sparse_decoder(network.cuda(), rules), ids[0, :8].tolist(), 16).ids == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["dense", "sparse", "experts"])
def test_recorded_passes_generate_the_tokens_of_plain_ones(dtype, kind, caplog):
    torch.manual_seed(6)
    heads = [("block1", make_head("token", (64, 64), per_token=True))]
    network = Network(BACKBONES.get("decoder")((65,), vocabulary=90, width=64, depth=3, heads=2), exits=heads).eval()
    for weight in network.backbone.parameters():
        weight.data.mul_(6)
    if kind == "experts":
        to_experts(network, experts=4, split=None)
        set_gate(network, TopK(k=2))
    network = network.to("cuda", dtype)
    if kind == "sparse":
        ids = torch.randint(0, 90, (4, 65), generator=torch.Generator().manual_seed(5)).cuda()
        (rules,) = calibrate(network, [(ids, None, None)], sparsities=[0.75])
        network = sparse_decoder(network, rules)
    for write in (generate, partial(generate, threshold=0.1), partial(speculate, draft=2)):
        plain = write(network, [3, 1, 4, 1, 5], 50, graphs=False)
        assert write(network, [3, 1, 4, 1, 5], 50) == plain == write(network, [3, 1, 4, 1, 5], 50)
        assert len(set(plain.ids)) > 3
    waits = kind == "experts" and dtype is torch.float64  # which the kernels do not take
    assert {r.getMessage()[:35] for r in caplog.records} == ({"generate: CUDA graphs are not used,"} if waits else set())
