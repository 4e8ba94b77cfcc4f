"""Sweeps over masks by role: small models with known results, and every family of models."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clframe.errors import ConfigError, UnsupportedError
from clframe.nn import BACKBONES, Network
from clframe.sparsity import accuracy, analyze
from clframe.sparsity.functional import baseline_sparsity, effective_rank, keep


class Plain(nn.Module):
    def __init__(self, d=5, f=9):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(d, f), nn.ReLU(), nn.Linear(f, d)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Gated(nn.Module):
    def __init__(self, d=5, f=9):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(*s, bias=False) for s in ((d, f), (d, f), (f, d)))
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Fused(nn.Module):
    def __init__(self, gated):
        super().__init__()
        self.both, self.act, self.down = nn.Linear(5, 18, bias=False), nn.SiLU(), gated.down_proj
        self.both.weight.data = torch.cat((gated.up_proj.weight, gated.gate_proj.weight)).detach()

    def forward(self, x):
        value, gate = self.both(x).chunk(2, -1)
        return self.down(value * self.act(gate))


def closeness(dense):
    """A score per token that is 1 for the dense output and falls with the distance from it."""
    return lambda output, at: torch.exp(-(output - dense[at]).square().mean(-1))


def data(model, tokens=(3, 4), d=5, seed=1):
    x = torch.randn(*tokens, d, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return x, model(x)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(4)


def test_masks_of_a_plain_ffn_are_where_they_should_be():
    model = Plain()
    x, dense = data(model)
    report = analyze(model, [(x, 0, None)], score=closeness([dense]), sweep={"top_p": (1.0, 0.6)})
    hidden = model.up(x).relu()

    def m(v):
        return v * keep(v, 0.6, kind="top_p")

    with torch.no_grad():
        expected = {
            "input": model(m(x)),
            "intermediate": model.down(m(hidden)),
            "all inputs": model.down(m(model.up(m(x)).relu())),
        }
    zeros = {"input": m(x) == 0, "intermediate": m(hidden) == 0}
    assert report.dense == pytest.approx(1) and [c.role for c in report.curves] == list(expected)
    for curve in report.curves:
        score = closeness([dense])(expected[curve.role], 0).mean().item()
        assert curve.scores == (pytest.approx(1), pytest.approx(score, rel=1e-5))
        if curve.role in zeros:
            assert curve.achieved[1] == pytest.approx(zeros[curve.role].double().mean().item())
        assert curve.gaussian[1] == pytest.approx(baseline_sparsity(0.6, kind="top_p", neurons=9))
        assert curve.excess == pytest.approx(curve.critical - curve.critical_gaussian)
    natural = report.curves[1].achieved[0]
    assert natural == pytest.approx((hidden == 0).double().mean().item()) and 0.2 < natural < 0.8
    assert report.ranks["intermediate"][""] == pytest.approx(effective_rank(hidden), rel=1e-5)


def test_roles_of_a_gated_ffn_and_that_two_layers_or_one_make_no_difference():
    gated = Gated()
    x, dense = data(gated)
    fused = Fused(gated)
    assert torch.allclose(fused(x), dense, atol=1e-6)
    one, other = (analyze(m, [(x, 0, None)], score=closeness([dense]), sweep={"top_p": (1.0, 0.7, 0.4)}) for m in (gated, fused))
    assert [c.role for c in one.curves] == ["input", "up", "gate", "intermediate", "all inputs"]
    for a, b in zip(one.curves, other.curves, strict=True):
        assert a.scores == pytest.approx(b.scores, rel=1e-4) and a.achieved == pytest.approx(b.achieved)

    def m(v):
        return v * keep(v, 0.4, kind="top_p")

    up, gate = gated.up_proj(x), F.silu(gated.gate_proj(x))
    with torch.no_grad():
        for at, y in ((0, gated(m(x))), (1, gated.down_proj(m(up) * gate)), (2, gated.down_proj(up * m(gate)))):
            assert one.curves[at].scores[2] == pytest.approx(closeness([dense])(y, 0).mean().item(), rel=1e-4)


def test_gates_of_networks_that_share_an_activation_are_masked_one_by_one():
    model = nn.Sequential(Gated(), Gated())
    x, dense = data(model)
    call = {"score": closeness([dense]), "sweep": {"top_p": (0.7,)}, "roles": ["gate"]}
    (apart,) = analyze(model, [(x, 0, None)], **call).curves
    model[1].act = model[0].act
    (shared,) = analyze(model, [(x, 0, None)], **call).curves
    assert shared.layers == apart.layers and list(shared.layers) == ["0", "1"] and shared.scores == apart.scores
    with pytest.raises(UnsupportedError, match=r"^sparsity.roles: found gate, of which the model has none; use input, intermediate$"):
        analyze(Plain(), [(x, 0, None)], **call)


class Unused(nn.Module):
    """Has an activation as a module and computes another one."""

    def __init__(self):
        super().__init__()
        self.layer, self.act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x):
        return torch.relu(self.layer(x))


def test_activations_that_do_not_run_are_named_as_the_reason():
    with pytest.raises(UnsupportedError, match=r"^sparsity: found no feed-forward network in Unused, and its activations do not"):
        analyze(Unused(), [(torch.ones(2, 4), torch.zeros(2, dtype=torch.long), None)])


def test_critical_sparsity_lies_between_points_of_the_sweep():
    model = Plain()
    x, dense = data(model)
    curve = analyze(model, [(x, 0, None)], score=closeness([dense]), roles=["input"]).curves[0]
    assert len(curve.values) == 26 and curve.values[0] == 1 and curve.values[-1] == 0
    assert curve.achieved[0] == 0 and curve.achieved[-1] == 1 and list(curve.achieved) == sorted(curve.achieved)
    above = max(s for s, score in zip(curve.achieved, curve.scores, strict=True) if score >= 0.99)
    below = min(s for s in curve.achieved if s > above)
    assert above <= curve.critical < below
    assert curve.critical_layers[""] == pytest.approx(curve.critical)


@pytest.mark.parametrize("kind", ["top_p", "top_k", "max_p", "threshold"])
def test_every_rule_goes_from_dense_to_sparse(kind):
    model = nn.Sequential(Plain(), Plain())
    x, dense = data(model)
    curve = analyze(model, [(x, 0, None)], score=closeness([dense]), kinds=[kind], roles=["input"]).curves[0]
    first, last = (0, -1) if curve.achieved[0] < curve.achieved[-1] else (-1, 0)
    assert curve.scores[first] == pytest.approx(1, abs=1e-6) and curve.achieved[first] == pytest.approx(0, abs=0.05)
    assert curve.achieved[last] >= 0.7 and set(curve.layers) == {"0", "1"}


def test_padding_is_left_out_and_parts_are_apart():
    model = Plain()
    x, dense = data(model)
    prompt = torch.zeros(3, 4, dtype=torch.bool)
    prompt[:, :2] = True
    generated = torch.zeros_like(prompt)
    generated[:2, 2:] = True
    batch = (x, 0, {"prompt": prompt, "generated": generated})
    curve = analyze(model, [batch], score=closeness([dense]), roles=["intermediate"], sweep={"top_p": (0.8,)}).curves[0]
    hidden = model.up(x).relu()
    zero = (hidden * keep(hidden, 0.8, kind="top_p") == 0).double()
    assert curve.parts["prompt"][0] == pytest.approx(zero[:, :2].mean().item())
    assert curve.parts["generated"][0] == pytest.approx(zero[:2, 2:].mean().item())
    assert curve.achieved[0] == pytest.approx(torch.cat((zero[:, :2].flatten(), zero[:2, 2:].flatten())).mean().item())


def test_batches_of_any_size_give_the_same():
    model = Plain()
    x, dense = data(model)
    whole = analyze(model, [(x, 0, None)], score=closeness([dense]), roles=["input"])
    parts = [(x[i : i + 1], i, None) for i in range(3)] + [(x[:0], 0, None)]
    split = analyze(model, parts, score=lambda y, i: closeness([d[None] for d in dense])(y, i), roles=["input"])
    assert split.curves[0].scores == pytest.approx(whole.curves[0].scores, abs=1e-6)
    assert split.curves[0].achieved == pytest.approx(whole.curves[0].achieved)


def test_our_networks_and_half_precision():
    network = Network(BACKBONES.get("small_cnn")((1, 8, 8), width=4))
    network.grow([0, 1])
    x = torch.randn(6, 1, 8, 8)
    with torch.no_grad():
        y = network(x).last.argmax(1)
    report = analyze(network, [(x, y, None)])
    assert report.dense == 1 and [c.role for c in report.curves][-1] == "all inputs"
    conv = network.backbone.stages[0][0]
    natural = report.curves[0].layers["backbone.stages.0.1"][0]
    assert natural == pytest.approx((conv(x).relu() == 0).double().mean().item())
    half = Plain().bfloat16()
    x = torch.randn(2, 5).bfloat16()
    with torch.no_grad():
        dense = half(x)
    assert analyze(half, [(x, 0, None)], score=closeness([dense])).dense == 1


@pytest.mark.parametrize("kind", ["Bert", "Llama", "Vit", "torchvision"])
def test_models_of_the_hubs(kind):
    x = torch.randint(1, 30, (2, 6))
    if kind == "torchvision":
        from torchvision.models import VisionTransformer

        model, x = VisionTransformer(image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=3), torch.randn(4, 3, 8, 8)
    elif kind == "Vit":
        model, x = pytest.importorskip("timm").create_model("vit_tiny_patch16_224", depth=2, img_size=32, embed_dim=24, num_heads=2, num_classes=3), torch.randn(4, 3, 32, 32)
    else:
        library = pytest.importorskip("transformers")
        options = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=30, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = getattr(library, f"{kind}Config")(**options)
            model = library.BertForTokenClassification(config) if kind == "Bert" else library.LlamaForCausalLM(config)
    images = x.is_floating_point()
    model.eval()
    mask = None if images else torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    inputs = x if images else {"input_ids": x, "attention_mask": mask}
    with torch.no_grad():
        output = model(x) if images else model(**inputs).logits
    report = analyze(model, [(inputs, output.argmax(-1), mask)], sweep={"top_p": (1.0, 0.5)})
    assert report.dense == 1 and all(0 <= c.critical <= 1 for c in report.curves)
    roles = ["input", "up", "gate", "intermediate", "all inputs"] if kind == "Llama" else ["input", "intermediate", "all inputs"]
    assert [c.role for c in report.curves] == roles and all(len(c.layers) in (2, 4) for c in report.curves)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(Plain(), nn.Dropout()).train()
    x, _ = data(model)
    with pytest.raises(RuntimeError, match="no"):
        analyze(model, [(x, 0, None)], score=lambda y, t: (_ for _ in ()).throw(RuntimeError("no")))
    assert all(part.training and not part._forward_hooks and not part._forward_pre_hooks for part in model.modules())


def test_what_is_refused():
    model = Plain()
    x, dense = data(model)
    with pytest.raises(ConfigError, match="sparsity.batches: found none"):
        analyze(model, [])
    with pytest.raises(ConfigError, match="found no samples"):
        analyze(model, [(x[:0], 0, None)], score=lambda y, t: y.sum((1, 2)))
    with pytest.raises(ConfigError, match=r"sparsity.mask: found \(2, 2\) for \(3, 4\) tokens at"):
        analyze(model, [(x, 0, torch.ones(2, 2))], score=closeness([dense]))
    with pytest.raises(ConfigError, match="found -1.0 for the dense model"):
        analyze(model, [(x, 0, None)], score=lambda y, t: -torch.ones(3))
    with pytest.raises(UnsupportedError, match="found neither"):
        analyze(nn.Linear(5, 5), [(x, 0, None)])


def test_accuracy_reads_logits_of_every_kind():
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    holder = type("Holder", (), {"logits": logits})()
    assert accuracy(logits, torch.tensor([1, 1])).tolist() == [1, 0] == accuracy(holder, torch.tensor([1, 1])).tolist()
    assert math.isclose(float(accuracy(logits, torch.tensor([1, 0])).mean()), 1)


def test_power_weighs_magnitudes_in_top_p_longhand():
    torch.manual_seed(0)
    model = Plain()
    x, y = data(model)
    values = (0.9, 0.5)
    report = analyze(model, [(x, 0, None)], score=closeness([y]), power=2.0, sweep={"top_p": values}, roles=["input"])
    (curve,) = report.curves
    for at, p in enumerate(values):
        zeros = 0
        for row in x.flatten(0, 1).tolist():
            squares = sorted((value * value for value in row), reverse=True)
            kept, mass = 0, 0.0
            while mass < p * sum(squares):
                mass += squares[kept]
                kept += 1
            zeros += len(row) - kept
        assert curve.achieved[at] == pytest.approx(zeros / x.numel())
        assert curve.gaussian[at] == baseline_sparsity(p, kind="top_p", neurons=5, power=2.0)
    plain = analyze(model, [(x, 0, None)], score=closeness([y]), sweep={"top_p": values}, roles=["input"])
    assert plain.curves[0].achieved[0] < curve.achieved[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"power": 0.0}, "sparsity.power: found 0.0; give a number above 0"),
     ({"power": float("nan")}, "sparsity.power: found nan; give a number above 0"),
     ({"power": 2.0, "kinds": ("max_p",)}, "sparsity.power: found 2.0 for max_p; use it with top_p, or leave it out")],
)  # fmt: skip
def test_a_power_out_of_range_or_without_effect_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        analyze(Plain(), [(torch.zeros(1, 2, 5), torch.zeros(1, 2), None)], **options)
