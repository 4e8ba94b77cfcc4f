"""MACs against closed forms, and counting that leaves no trace."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from clframe.accounting import MacCounter, count_macs, count_parameters, stage_macs
from clframe.accounting.macs import UncountedWarning, backbone_macs, cumulative_macs
from clframe.exits.head_kinds import make_head
from clframe.exits.placement import place_exits, published_placement
from clframe.nn import GrowingLinear, Head, Network
from clframe.nn.backbones import Backbone, mlp, resnet20, resnet32, small_cnn, vgg11, vit_tiny, wrn16_2


def grown(backbone, classes, *, exits=()):
    network = Network(backbone, exits=exits)
    network.grow(range(classes))
    return network


@pytest.mark.parametrize(
    ("width", "depth", "classes", "batch"), [(256, 2, 10, 1), (7, 3, 1, 5), (4, 1, 100, 2)]
)
def test_mlp(width, depth, classes, batch):
    expected = batch * (3 * 5 * 4 * width + (depth - 1) * width * width + width * classes)
    network = grown(mlp((3, 5, 4), width=width, depth=depth), classes)
    assert count_macs(network, (3, 5, 4), batch=batch) == expected


@pytest.mark.parametrize("width", [1, 32])
def test_small_cnn_on_an_odd_image(width):
    first = 9 * 13 * (9 * 3 * width)  # at full size; pooling follows the convolution
    second = 4 * 6 * (9 * width * 2 * width)
    hidden = (2 * width * 2 * 3) * 4 * width
    network = grown(small_cnn((3, 9, 13), width=width), 10)
    assert stage_macs(network) == {
        "block1": first, "block2": second, "hidden": hidden, "exit/final": 40 * width,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("factory", "shortcut", "classes", "expected"),
    [
        (resnet20, "pad", 10, 40_551_040),
        (resnet20, "conv", 10, 40_813_184),
        (resnet32, "pad", 10, 68_862_592),
        (resnet32, "conv", 100, 69_130_496),
    ],
)
def test_cifar_resnets(factory, shortcut, classes, expected):
    blocks = 3 if factory is resnet20 else 5
    longhand = 32 * 32 * 9 * (3 * 16 + 2 * blocks * 16 * 16)
    longhand += 16 * 16 * 9 * (16 * 32 + (2 * blocks - 1) * 32 * 32)
    longhand += 8 * 8 * 9 * (32 * 64 + (2 * blocks - 1) * 64 * 64)
    longhand += (16 * 16 * 16 * 32 + 8 * 8 * 32 * 64) if shortcut == "conv" else 0
    longhand += 64 * classes
    assert longhand == expected
    assert count_macs(grown(factory((3, 32, 32), shortcut=shortcut), classes), (3, 32, 32)) == expected


def test_resnet32_agrees_with_the_published_count_once_its_convention_is_added():
    network = grown(resnet32((3, 32, 32)), 100)
    layers = [16 * 32 * 32, 32 * 16 * 16, 64 * 8 * 8]
    normalized = 11 * sum(layers)  # the stem or the shortcut, and two in each of five blocks
    summed = 5 * sum(layers)
    longhand = 69_130_496 + 2 * normalized + summed
    assert round(longhand / 1e6, 2) == 69.90
    assert count_macs(network, (3, 32, 32), convention="fvcore") == longhand
    assert count_macs(network, (3, 32, 32), batch=2, convention="fvcore") == 2 * longhand
    assert round(count_parameters(network) / 1e6, 3) == 0.473


BUILDS = {
    "mlp": lambda: mlp((3, 17, 12), width=4),
    "small_cnn": lambda: small_cnn((3, 17, 12), width=4),
    "resnet20": lambda: resnet20((3, 17, 12), width=4),
    "resnet32": lambda: resnet32((3, 17, 12), width=4, shortcut="pad"),
    "wrn16_2": lambda: wrn16_2((3, 8, 8)),
    "vgg11": lambda: vgg11((3, 32, 32), width=4, hidden=8),
    "vit_tiny": lambda: vit_tiny((3, 8, 8), width=8, depth=2),
}


@pytest.mark.parametrize("convention", ["macs", "fvcore"])
@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_stages_and_exits_add_up(name, batch, convention):
    backbone = BUILDS[name]()
    last = backbone.names[-1]
    extra = [(last, GrowingLinear(backbone.features)), (last, GrowingLinear(backbone.features))]
    network = grown(backbone, 7, exits=extra)
    counts = stage_macs(network, batch=batch, convention=convention)
    assert list(counts) == [*backbone.names, f"exit/{last}", f"exit/{last}#2", "exit/final"]
    assert sum(counts.values()) == count_macs(network, backbone.input_shape, batch=batch, convention=convention)
    assert counts["exit/final"] == counts[f"exit/{last}#2"] == batch * backbone.features * 7
    single = cumulative_macs(network, convention=convention)
    assert single[-1] == sum(counts.values()) // batch
    assert [b - a for a, b in pairwise(single)] == [backbone.features * 7] * 2


def with_published_exits(*, per_experience: bool) -> Network:
    """ResNet32 with 6 exits and one head for each of 10 experiences of 10 classes, or one that grows."""
    backbone = resnet32((3, 32, 32))
    heads = [
        (tap, make_head("pool", backbone.tap_shapes[tap], per_experience=per_experience))
        for tap in published_placement(backbone.names).taps
    ]
    network = Network(backbone, exits=heads)
    for first in range(0, 100, 10):
        network.grow(range(first, first + 10))
    return network


@pytest.mark.parametrize(
    ("per_experience", "convention", "ratios"),
    [
        (True, "fvcore", [0.220, 0.365, 0.491, 0.631, 0.753, 0.891, 1.027]),
        (True, "macs", [0.217, 0.360, 0.484, 0.623, 0.746, 0.884, 1.021]),
        (False, "macs", [0.217, 0.360, 0.484, 0.623, 0.746, 0.884, 1.021]),
    ],
)
def test_resnet32_with_exits_costs_what_was_published(per_experience, convention, ratios):
    base = count_macs(grown(resnet32((3, 32, 32)), 100), (3, 32, 32), convention=convention)
    network = with_published_exits(per_experience=per_experience)
    assert backbone_macs(network, convention=convention) == base
    costs = cumulative_macs(network, convention=convention)
    assert [round(cost / base, 3) for cost in costs] == ratios
    # Heads by hand: pooled values times 100 classes, and three operations for each value of each head's pool.
    pooled = [16 * 16 * 16] * 2 + [32 * 8 * 8] * 2 + [64 * 4 * 4] * 2
    each = 100 + (3 * 10 if convention == "fvcore" else 0)
    assert costs[-1] == base + each * sum(pooled)
    if per_experience:
        assert round(count_parameters(network) / 1e6, 3) == 1.907


def test_costs_up_to_an_exit_by_arithmetic():
    exits = [("layer1", GrowingLinear(6)), ("layer2", GrowingLinear(6))]
    network = grown(mlp((1, 2, 5), width=6, depth=4), 3, exits=exits)
    head, layer = 6 * 3, 6 * 6
    first = 10 * 6 + head
    assert cumulative_macs(network) == (first, first + layer + head, first + 3 * layer + 2 * head)
    assert cumulative_macs(grown(mlp((1, 2, 5), width=6, depth=1), 3)) == (60 + 18,)
    network.boosted = True
    boosted = cumulative_macs(network, convention="fvcore")
    assert boosted == (first, first + layer + head + 3, first + 3 * layer + 2 * head + 6)


class Cascading(Head):
    """A linear layer on the features and the logits of the exit before."""

    cascades = True

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = GrowingLinear(features)
        self.before = nn.Parameter(torch.empty(0, 0))

    def grow(self, classes):
        grown = self.linear.grow(classes)
        self.before = nn.Parameter(torch.ones(self.linear.classes, self.linear.classes))
        return grown

    def forward(self, features, previous_BC=None):
        return self.linear(features) + (0 if previous_BC is None else previous_BC @ self.before)


def test_a_cascade_is_counted_with_the_logits_it_takes():
    exits = [("layer1", GrowingLinear(4)), ("layer2", Cascading(4))]
    network = grown(mlp((1, 2, 2), width=4, depth=3), 5, exits=exits)
    counts = stage_macs(network)
    assert (counts["exit/layer1"], counts["exit/layer2"], counts["exit/final"]) == (20, 20 + 25, 20)


@pytest.mark.parametrize(
    ("module", "shape", "operations"),
    [
        (nn.BatchNorm2d(3), (3, 4, 5), 2 * 60),
        (nn.BatchNorm1d(7, affine=False), (7,), 7),
        (nn.LayerNorm(6), (5, 6), 5 * 30),
        (nn.LayerNorm(6, elementwise_affine=False), (5, 6), 4 * 30),
        (nn.GroupNorm(2, 4), (4, 3, 3), 5 * 36),
        (nn.ReLU(), (9,), 0),
        (nn.AvgPool2d(2), (2, 4, 4), 0),
    ],
)
def test_what_the_other_convention_adds(module, shape, operations):
    for batch in (1, 3):
        assert count_macs(module, shape, batch=batch) == 0
        assert count_macs(module, shape, batch=batch, convention="fvcore") == batch * operations


class Blended(nn.Module):
    """Sums and products of activations, in place and not, with tensors and with numbers."""

    def forward(self, x):
        y = x + x * 0.5
        y += x
        y *= 2
        return torch.lerp(x, y, 0.3)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_bias_of_a_linear_layer_is_no_sum_wherever_torch_adds_it(batch):
    turned = nn.Sequential(nn.Unflatten(1, (2, 3)), Turned(), nn.Linear(2, 5))
    assert count_macs(turned, (6,), batch=batch, convention="fvcore") == batch * 3 * 2 * 5


class Turned(nn.Module):
    """A transposed view, on which a linear layer is a product and then a sum."""

    def forward(self, x):
        return x.transpose(1, 2)


def test_sums_and_products_count_one_a_value():
    assert count_macs(Blended(), (4, 5), convention="fvcore") == (1 + 1 + 1 + 1 + 3) * 20
    assert count_macs(Blended(), (4, 5)) == 0


def test_a_network_without_classes_costs_its_backbone():
    network = Network(mlp((1, 2, 2), width=10, depth=1))
    assert count_macs(network, (1, 2, 2)) == 40
    assert count_macs(nn.ReLU(), (3,)) == 0


def transformer_macs(tokens, width, hidden):
    projections = 4 * width * width + 2 * width * hidden
    return tokens * projections + 2 * tokens * tokens * width


@pytest.mark.parametrize("enabled", [True, False])
def test_attention_is_counted_whether_or_not_the_fast_path_is_on(enabled):
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=20, batch_first=True)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        assert count_macs(layer, (5, 8), batch=3) == 3 * transformer_macs(5, 8, 20)
        assert torch.backends.mha.get_fastpath_enabled() is enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch's own use of them
@pytest.mark.parametrize("lengths", [(5, 5, 5), (5, 2, 4)])
@pytest.mark.parametrize("layers", [0, 2])
def test_fused_layers_are_counted_and_compute_the_same_bits(layers, lengths):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=20, batch_first=True)
    model = nn.TransformerEncoder(layer, layers) if layers else nn.MultiheadAttention(8, 2, batch_first=True)
    model.eval().requires_grad_(False)
    x = torch.randn(3, 5, 8)
    padded = None if len(set(lengths)) == 1 else torch.arange(5) >= torch.tensor(lengths).unsqueeze(1)
    # With padding, an encoder computes a nested batch of the real tokens; attention alone computes all.
    counted = lengths if layers else (5, 5, 5)
    hidden = 20 if layers else 0

    def call():
        if layers:
            return model(x, src_key_padding_mask=padded)
        return model(x, x, x, key_padding_mask=padded, need_weights=False)[0]

    expected = call()
    with MacCounter(keep_kernels=True) as counter:
        found = call()
    assert torch.equal(found, expected)
    assert counter.macs == max(layers, 1) * sum(transformer_macs(tokens, 8, hidden) for tokens in counted)


class Noisy(nn.Module):
    """Draws random numbers in every forward pass, and may fail."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.fails = fails

    def forward(self, x):
        if self.fails:
            raise RuntimeError("broken on purpose")
        return self.drop(self.norm(x)) + torch.rand_like(x)


@pytest.mark.parametrize("fails", [False, True])
def test_counting_leaves_no_trace(fails):
    module = nn.Sequential(nn.Linear(4, 4), Noisy(fails=fails), nn.Linear(4, 2))
    module.train()
    module[1].norm.eval()
    flags = [part.training for part in module.modules()]
    assert len(set(flags)) == 2
    state = {key: value.clone() for key, value in module.state_dict().items()}
    generator = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="broken on purpose"):
            count_macs(module, (4,))
    else:
        assert count_macs(module, (4,), batch=2) == 2 * (16 + 8)
    assert [part.training for part in module.modules()] == flags
    assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in module.parameters())


def test_counting_stages_restores_training_flags():
    network = grown(resnet20((3, 8, 8), width=2), 2)
    network.backbone.stages[0].eval()
    flags = [part.training for part in network.modules()]
    stage_macs(network)
    assert [part.training for part in network.modules()] == flags


def test_the_input_takes_the_modules_type():
    assert count_macs(nn.Linear(3, 2, dtype=torch.float64), (3,)) == 6
    assert count_macs(nn.Linear(3, 2, dtype=torch.bfloat16), (7, 3)) == 42


def test_shared_parameters_count_once():
    layer = nn.Linear(10, 10)
    assert count_parameters(nn.Sequential(layer, layer, nn.BatchNorm1d(10))) == 110 + 20
    assert count_macs(nn.Sequential(layer, layer), (10,)) == 200


class Spectral(nn.Module):
    """A stage with an operator that no formula covers."""

    def forward(self, x):
        return torch.fft.rfft(x, dim=-1).real


def test_operators_without_a_formula_are_named_whatever_function_counts():
    network = Network(Backbone.of([("first", nn.Sequential(nn.Flatten(), nn.Linear(4, 6))), ("second", Spectral())],
                                  input_shape=(1, 2, 2)))  # fmt: skip
    for count in (lambda: count_macs(network, (1, 2, 2)), lambda: sum(stage_macs(network).values()),
                  lambda: cumulative_macs(network)[-1], lambda: backbone_macs(network)):  # fmt: skip
        with pytest.warns(UncountedWarning, match=r"count as 0: aten._fft_r2c \(1 call\); costs, budgets"):
            assert count() == 4 * 6


def test_exits_placed_by_cost_name_what_their_costs_leave_out():
    stages = [("first", nn.Sequential(nn.Flatten(), nn.Linear(4, 6))), ("second", Spectral()), ("third", nn.Linear(4, 4))]
    network = Network(Backbone.of(stages, input_shape=(1, 2, 2)))
    with pytest.warns(UncountedWarning, match=r"_fft_r2c"):
        assert place_exits(network, cost_shares=[0.5]).taps == ("first",)


def test_counting_a_compiled_module_counts_its_operators_and_leaves_it_compiled():
    """In torch 2.6 a call under a mode leaves the code uncompiled for the rest of the process."""
    compiled, calls = [], []

    def backend(graph, example):
        compiled.append(graph)
        return lambda *args: calls.append(1) or graph.forward(*args)

    class Layer(nn.Linear):  # torch 2.6 leaves out classes that torch defines
        def forward(self, x):
            return super().forward(x).relu()

    layer = Layer(3, 5)
    layer.compile(backend=backend, dynamic=True)
    layer(torch.ones(2, 3))
    with MacCounter() as counter:
        layer(torch.ones(4, 3))
    assert counter.macs == 4 * 3 * 5 and len(calls) == 1
    layer(torch.ones(6, 3))
    assert len(calls) == 2 and len(compiled) == 1
