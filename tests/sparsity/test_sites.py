"""Feed-forward networks found by role in models of several libraries, and what is not one."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clframe.errors import UnsupportedError
from clframe.nn import BACKBONES
from clframe.sparsity import find_ffns, find_sites
from clframe.sparsity.ffn import shape_of, weight_of

SMALL = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, vocab_size=64, pad_token_id=0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GROUPED = SMALL | dict(num_key_value_heads=2, head_dim=8)  # q is 16 to 32 and o 32 to 16: an FFN by shape alone


def transformers_model(kind, options):
    library = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(library, f"{kind}Model")(getattr(library, f"{kind}Config")(**options))


def timm_model(name, **options):
    return pytest.importorskip("timm").create_model(name, **options)


class Written(nn.Module):
    """A gated FFN as in Llama's first code: no telling names, no activation module, up last."""

    def __init__(self, d=6, f=10, act=F.silu):
        super().__init__()
        self.w1, self.w2, self.w3, self.f = nn.Linear(d, f), nn.Linear(f, d), nn.Linear(d, f, bias=False), act

    def forward(self, x):
        return self.w2(self.f(self.w3(x)) * self.w1(x))


def plain_forward(ffn, x):
    """The FFN's formula, from the parts that were found."""
    act, down = ffn.activation, ffn.down
    up = ffn.up(x)
    if ffn.gate is not None:
        return down(act(ffn.gate(x)) * up)
    if ffn.fused:
        first, second = up.chunk(2, -1)
        gate, value = (first, second) if ffn.fused == "first" else (second, first)
        return down(act(gate) * value)
    return down(act(up))


def torchvision_vit():
    from torchvision.models import VisionTransformer

    return VisionTransformer(image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12)


@pytest.mark.parametrize(
    "make, sizes, names",
    [
        (torchvision_vit, (8, 12), ("mlp.0", None, "mlp.3", "mlp.1")),
        (lambda: timm_model("vit_tiny_patch16_224", depth=2, img_size=32, embed_dim=24, num_heads=2), (24, 96), ("mlp.fc1", None, "mlp.fc2", "mlp.act")),
        (lambda: timm_model("vit_giant_patch14_dinov2", depth=2, embed_dim=48, num_heads=2, img_size=28), (48, 128), ("mlp.fc1", None, "mlp.fc2", "mlp.act")),
        (lambda: transformers_model("Bert", SMALL), (16, 24), ("intermediate.dense", None, "output.dense", "intermediate.intermediate_act_fn")),
        (lambda: transformers_model("Bert", SMALL | dict(intermediate_size=16)), (16, 16), ("intermediate.dense", None, "output.dense", "intermediate.intermediate_act_fn")),
        (lambda: transformers_model("DistilBert", dict(dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=30)), (16, 24), ("ffn.lin1", None, "ffn.lin2", "ffn.activation")),
        (lambda: transformers_model("Llama", GROUPED), (16, 24), ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj", "mlp.act_fn")),
        (lambda: transformers_model("Gemma3Text", GROUPED), (16, 24), ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj", "mlp.act_fn")),
        (lambda: transformers_model("Phi3", SMALL), (16, 24), ("mlp.gate_up_proj", None, "mlp.down_proj", "mlp.activation_fn")),
        (lambda: transformers_model("GPT2", dict(n_embd=16, n_layer=2, n_head=2, vocab_size=30, bos_token_id=1, eos_token_id=2)), (16, 64), ("mlp.c_fc", None, "mlp.c_proj", "mlp.act")),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2), (16, 24), ("linear1", None, "linear2", "activation")),
    ],
)
def test_both_layers_of_every_family_have_one(make, sizes, names):
    model = make()
    ffns = find_ffns(model)
    assert len(ffns) == 2
    for ffn in ffns:
        assert (ffn.d_model, ffn.d_ff) == sizes
        found = (ffn.up_name, ffn.gate_name, ffn.down_name, ffn.activation_name)
        assert all(a is None if b is None else a.endswith(b) for a, b in zip(found, names, strict=True)), found
        assert model.get_submodule(ffn.up_name) is ffn.up and model.get_submodule(ffn.name) is ffn.owner
        assert ffn.gated == (ffn.gate is not None or shape_of(ffn.up) == (sizes[0], 2 * sizes[1]))


@pytest.mark.parametrize("make", [
    lambda: timm_model("vit_giant_patch14_dinov2", depth=1, embed_dim=48, num_heads=2, img_size=28),
    lambda: transformers_model("Llama", GROUPED), lambda: transformers_model("Phi3", SMALL), torchvision_vit,
    lambda: nn.Sequential(Written()), lambda: nn.Sequential(Written(f=6, act=F.relu)),
])  # fmt: skip
def test_the_parts_compute_what_their_owner_does(make):
    torch.manual_seed(0)
    model = make().eval()
    try:
        ffns = find_ffns(model)
    except UnsupportedError:
        assert model[0].w2.in_features == model[0].w2.out_features  # shapes alone do not determine which layer is down
        return
    for ffn in ffns:
        x = torch.randn(3, 5, ffn.d_model)
        assert torch.allclose(plain_forward(ffn, x), ffn.owner(x), atol=1e-5)


def test_a_functional_gate_is_told_by_running_it():
    owner = Written()
    (ffn,) = find_ffns(owner)
    assert ffn.gate is owner.w3 and ffn.up is owner.w1 and ffn.name == "" and ffn.activation_name is None


def test_two_in_one_owner_and_shared_activations():
    act = nn.GELU()
    net = nn.Sequential(nn.Linear(3, 7), act, nn.Linear(7, 3), nn.Linear(3, 7), act, nn.Linear(7, 3))
    names = [(ffn.name, ffn.up_name, ffn.activation_name, ffn.down_name) for ffn in find_ffns(net)]
    assert names == [("", "0", "1", "2"), ("#2", "3", "4", "5")]
    assert [site.module for site in find_sites(net)] == [None, None]
    block = nn.Sequential(nn.Linear(3, 7), act, nn.Linear(7, 3))
    twice = nn.Sequential(block, block)
    assert [(ffn.name, ffn.activation_name) for ffn in find_ffns(twice)] == [("0", "0.1")]
    assert [site.module for site in find_sites(twice)] == [act]  # runs as often as its network


def test_what_is_none():
    deep = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    for net in (nn.Linear(2, 3), nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 2)), deep, nn.MultiheadAttention(4, 2)):
        with pytest.raises(UnsupportedError, match="found no feed-forward network"):
            find_ffns(net)
    with pytest.raises(UnsupportedError, match="found neither a feed-forward network nor an activation module in Conv2d"):
        find_sites(nn.Conv2d(1, 1, 1))
    assert [site.name for site in find_sites(deep)] == ["1", "3"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision_and_meta_device_do_not_matter(dtype):
    model = transformers_model("Llama", GROUPED)
    for other in (model.to(dtype), model.to("meta")):
        assert [(f.gate_name, f.up_name) for f in find_ffns(other)] == [
            (f"layers.{i}.mlp.gate_proj", f"layers.{i}.mlp.up_proj") for i in range(2)
        ]


def test_our_backbones_fire_where_they_rectify():
    sites = {name: find_sites(BACKBONES.get(name)((1, 8, 8))) for name in ("mlp", "small_cnn", "vit_tiny")}
    assert [(s.name, s.fused) for s in sites["mlp"]] == [("stages.0", True), ("stages.1", True)]
    assert [(s.name, s.fused) for s in sites["small_cnn"]] == [("stages.0.1", False), ("stages.1.1", False), ("stages.2", True)]
    assert [s.ffn.d_ff for s in sites["vit_tiny"]] == [256] * 6


def test_looking_changes_nothing():
    net = nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(), Written()).train()
    before, random = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    find_sites(net)
    assert torch.equal(random, torch.get_rng_state()) and all(part.training for part in net.modules())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert not any(part._forward_hooks for part in net.modules())


def test_conv1d_has_its_weight_the_other_way():
    up = find_ffns(transformers_model("GPT2", dict(n_embd=16, n_layer=1, n_head=2, vocab_size=30, bos_token_id=1, eos_token_id=2)))[0].up
    x = torch.randn(2, 16)
    assert torch.allclose(x @ weight_of(up).T + up.bias, up(x), atol=1e-6) and shape_of(up) == (16, 64)
