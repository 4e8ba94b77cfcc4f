"""Attention projections as small networks: found by what they do, trained to match, counted by arithmetic."""

import copy

import pytest
import torch
from torch import nn

from clframe.accounting.macs import count_macs
from clframe.errors import ConfigError, UnsupportedError
from clframe.moe import TopK, routed_layers, set_gate, to_experts
from clframe.moe.distill import replace_projections
from clframe.moe.projections import (
    ConcatenatedProjections,
    Projection,
    ProjectionSite,
    UnpackedAttention,
    find_projections,
    hidden_width,
    rebuild_projections,
)
from clframe.nn import Network
from clframe.nn.backbones import mlp, vit_tiny


def wave(*shape):
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.float32).mul(1.3).sin().view(shape)


def vit(width=12, depth=2, heads=3):
    torch.manual_seed(0)
    net = Network(vit_tiny((1, 8, 8), width=width, depth=depth, heads=heads))
    net.grow(range(3))
    return net.eval()


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12,
    )  # fmt: skip
    return transformers.BertModel(config).eval()


def llama(groups=2):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=groups,
        intermediate_size=24, max_position_embeddings=12,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=12)
    ).eval()


def timm_vit():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=2, num_classes=3
    ).eval()


IDS = torch.randint(1, 30, (3, 7), generator=torch.Generator().manual_seed(0))
MODELS = {
    "torchvision": (vit, wave(2, 1, 8, 8), 8, 8),
    "bert": (bert, IDS, 8, 8),
    "llama": (llama, IDS, 4, 4),
    "gpt2": (gpt2, IDS, 4, 2),
    "timm": (timm_vit, wave(2, 3, 16, 16), 8, 4),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # libraries' own, on tiny configurations
@pytest.mark.parametrize("name", MODELS)
def test_projections_are_found_by_what_they_do_and_become_experts(name):
    make, inputs, networks, sites = MODELS[name]
    model = make()
    found = replace_projections(model, [inputs], epochs=1)
    assert len(found.sites) == sites and len(found.projections) == networks
    assert len(found.losses) == 1 and found.losses[0] > 0
    width = found.sites[0].inputs
    assert all(part.up.out_features == hidden_width(width, width) for part in found.projections.values())
    with torch.no_grad():
        before = model(inputs)
        plain = len(to_experts(copy.deepcopy(make()), experts=2))
        layers = to_experts(model, experts=2)
        assert len(layers) == plain + networks
        after = model(inputs)
        set_gate(model, TopK(k=1))
        fewer = model(inputs)
    first, last, less = (getattr(y, "last", None) if hasattr(y, "last") else _tensor(y) for y in (before, after, fewer))
    torch.testing.assert_close(last, first, rtol=1e-4, atol=1e-5)
    assert less.shape == first.shape and not torch.allclose(less, first, atol=1e-5)
    assert len(routed_layers(model)) == plain + networks


def _tensor(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_keys_of_another_width_stay():
    """Grouped queries have narrower keys and values: only the query's and the output's projection are replaced."""
    model = llama(1)
    attention = model.model.layers[0].self_attn
    kept = attention.k_proj, attention.v_proj
    found = replace_projections(model, [IDS], epochs=0)
    assert [place.name.rpartition(".")[2] for place in found.sites] == ["q_proj", "o_proj"]
    assert (attention.k_proj, attention.v_proj) == kept and isinstance(attention.q_proj, Projection)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_opened_attention_is_torchs(batch_first, bias):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(15, 3, batch_first=batch_first, bias=bias).eval()
    opened = UnpackedAttention(attention)
    q, kv = wave(2, 5, 15), wave(2, 4, 15).cos()
    padding = torch.tensor([[False, False, True, True], [False, False, False, True]])
    if not batch_first:
        q, kv = q.transpose(0, 1), kv.transpose(0, 1)
    causal = torch.ones(5, 4, dtype=torch.bool).triu(1)
    by_head = torch.where(torch.arange(4) == 2, -1.5, 0.25).expand(6, 5, 4)
    for options in (
        {}, {"key_padding_mask": padding}, {"attn_mask": causal}, {"attn_mask": by_head},
        {"attn_mask": causal.float() * -2, "key_padding_mask": padding.float() * -1e9},
        {"average_attn_weights": False},
    ):  # fmt: skip
        wanted, weights = attention(q, kv, kv, **options)
        y, own = opened(q, kv, kv, **options)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own, weights, rtol=1e-5, atol=1e-6)
        y, own = opened(q, kv, kv, need_weights=False, **options)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
        assert own is None
    one = wave(5, 15)
    wanted, weights = attention(one, one, one)
    y, own = opened(one, one, one)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_layers_take_their_own_way_with_it(padded):
    """Torch's fast path would look for the packed weights."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = wave(3, 6, 12)
    mask = torch.arange(6) >= torch.tensor([[6], [4], [5]]) if padded else None
    call = lambda model, x: model(x, src_key_padding_mask=mask)  # noqa: E731
    with torch.no_grad():
        before = call(encoder, x)
        found = replace_projections(encoder, [x], epochs=0, call=call)
        after = call(encoder, x)
    assert len(found.projections) == 8 and after.shape == before.shape
    assert torch.isfinite(after).all() and not torch.allclose(after, before)


def fit_projections_of_rank_one(seed):
    """The first and last loss, and the output's mean square error as a share of its mean square."""
    model = vit(width=8, depth=1, heads=2)
    attention = model.backbone.stages[1].self_attention
    with torch.no_grad():
        u = torch.linspace(0.5, 1, 8)
        for weight in (*attention.in_proj_weight.chunk(3), attention.out_proj.weight):
            weight.copy_(0.3 * torch.outer(u, u.flip(0)))
    x = wave(16, 1, 8, 8)
    with torch.no_grad():
        before = model(x).last
        size = float(before.square().mean())
    found = replace_projections(model, [x] * 10, epochs=60, learning_rate=1e-2, dropout=0.0, seed=seed)
    with torch.no_grad():
        return found.losses[0], found.losses[-1], float((model(x).last - before).square().mean()) / size


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(1,), (0, 1, 2)])
def test_the_error_falls_and_a_layer_that_a_network_can_be_is_matched(seeds):
    """Two of the hidden neurons suffice for a projection of rank one; from some initial weights training does not find it."""
    fits = [fit_projections_of_rank_one(seed) for seed in seeds]
    assert all(last < 2e-3 < 0.05 < first for first, last, _ in fits)
    assert sorted(error for *_, error in fits)[len(seeds) // 2] < 0.01


def test_zero_epochs_leave_networks_as_drawn():
    model, again, x = vit(), vit(), wave(2, 1, 8, 8)
    found = replace_projections(model, [x], epochs=0, seed=3)
    same = replace_projections(again, [x], epochs=0, seed=3)
    assert found.losses == () and found.sites == same.sites
    for name, part in found.projections.items():
        other = same.projections[name]
        assert torch.equal(part.up.weight, other.up.weight) and torch.equal(part.down.bias, other.down.bias)
        assert part.up.weight.abs().max() <= 12**-0.5 and part.down.weight.abs().max() <= part.up.out_features**-0.5
        token = wave(5, 12)
        longhand = (token @ part.up.weight.T + part.up.bias).clamp_min(0) @ part.down.weight.T + part.down.bias
        torch.testing.assert_close(part(token), longhand)
    assert torch.equal(model(x).last, again(x).last)


def test_widths_and_macs_by_arithmetic():
    assert [hidden_width(d, d) for d in (1, 12, 64, 384, 768)] == [1, 6, 32, 192, 384]
    assert hidden_width(768, 256) == round((768 * 256 + 256) / (768 + 256 + 1))
    model, tokens = vit(), 5  # 2 x 2 patches of 4 x 4 and the class token
    before = count_macs(model, (1, 8, 8))
    replace_projections(model, [wave(1, 1, 8, 8)], epochs=0)
    linear, network = 12 * 12, 12 * 6 + 6 * 12
    assert network == linear  # 2 d round(d / 2), here exactly d^2
    assert count_macs(model, (1, 8, 8)) == before + 2 * 4 * tokens * (network - linear)
    odd = vit(width=9, depth=1)
    before = count_macs(odd, (1, 8, 8))
    replace_projections(odd, [wave(1, 1, 8, 8)], epochs=0)
    assert count_macs(odd, (1, 8, 8)) == before + 4 * tokens * (2 * 9 * 5 - 81)


def test_training_leaves_the_rest_alone_and_is_seeded():
    model, again = vit().train(), vit()
    kept = {name: value.clone() for name, value in model.state_dict().items() if "self_attention" not in name}
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    found = replace_projections(model, [wave(4, 1, 8, 8)] * 3, epochs=2)
    assert torch.equal(torch.rand(1), drawn)
    assert model.training and all(part.training for part in found.projections.values())
    for name, value in kept.items():
        assert torch.equal(model.state_dict()[name], value)
    same = replace_projections(again, [wave(4, 1, 8, 8)] * 3, epochs=2)
    assert found.losses == same.losses


def test_shapes_alone_take_saved_weights():
    model, x = vit(), wave(3, 1, 8, 8)
    found = replace_projections(model, [x], epochs=1)
    empty = vit()
    rebuild_projections(empty, found.sites)
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty(x).last, model(x).last)
    with pytest.raises(UnsupportedError, match="no projection"):
        rebuild_projections(vit(width=9), found.sites)
    with pytest.raises(UnsupportedError, match="no projection nowhere of 3 to 6"):
        rebuild_projections(vit(), [ProjectionSite(name="nowhere", inputs=3, outputs=(3, 3))])


def test_fused_layers_become_three():
    model = timm_vit()
    found = replace_projections(model, [wave(1, 3, 16, 16)], epochs=0)
    side = model.blocks[0].attn.qkv
    assert isinstance(side, ConcatenatedProjections) and len(side.parts) == 3 and found.sites[0].outputs == (12, 12, 12)
    token = wave(4, 12)
    assert torch.equal(side(token)[:, 12:24], side.parts[1](token))


def test_refusals_change_nothing():
    model, x = vit(), wave(2, 1, 8, 8)
    before, parts = model(x).last, [type(part) for part in model.modules()]
    for options in ({"epochs": -1}, {"dropout": 1.0}):
        with pytest.raises(ConfigError, match="replace projections"):
            replace_projections(model, [x], **options)
    with pytest.raises(ConfigError, match="0 batches"):
        replace_projections(model, [])

    def broken(model, batch):
        model(batch)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        replace_projections(model, [x], call=broken)
    assert [type(part) for part in model.modules()] == parts and torch.equal(model(x).last, before)
    plain = Network(mlp((1, 8, 8), width=8))
    plain.grow(range(2))
    with pytest.raises(UnsupportedError, match="no attention"):
        replace_projections(plain, [x])
    with pytest.raises(UnsupportedError, match="meta device"):
        replace_projections(vit().to("meta"), [x])
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(UnsupportedError, match="half|float16"):
            replace_projections(vit().to(dtype), [x.to(dtype)])
    replace_projections(model, [x], epochs=0)
    with pytest.raises(UnsupportedError, match="with experts; give the dense model"):
        replace_projections(model, [x])
    converted = vit()
    to_experts(converted, experts=2)
    with pytest.raises(UnsupportedError, match="with experts; give the dense model"):
        replace_projections(converted, [x])
    with pytest.raises(UnsupportedError, match="another width"):
        UnpackedAttention(nn.MultiheadAttention(8, 2, add_zero_attn=True))


def test_found_once_where_layers_are_shared():
    """One layer in two blocks: one network in both."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.MultiheadAttention(6, 1, batch_first=True)
            self.second = self.first

        def forward(self, x):
            for block in (self.first, self.second):
                x = x + block(x, x, x, need_weights=False)[0]
            return x

    torch.manual_seed(0)
    model = Twice().eval()
    found = replace_projections(model, [wave(2, 3, 6)], epochs=1)
    assert len(found.projections) == 4 and model.first is model.second
    assert isinstance(model.first.query, Projection)
    assert len(find_projections(vitless(), wave(1, 3, 6))) == 4


def vitless():
    torch.manual_seed(0)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x):
            q, k, v = self.a(x), self.b(x), self.c(x)
            return self.d((q @ k.transpose(-2, -1)).softmax(-1) @ v)

    return Own().eval()
