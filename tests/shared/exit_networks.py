"""Untrained networks with exits whose predictions differ between samples, and the plain reference of their inference."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn.functional import layer_norm, pad

from clframe.exits.decisions import Prediction, select
from clframe.exits.ensembles import Geometric, Mean, ProductOfExperts
from clframe.exits.gate import LearnedConfidence
from clframe.exits.policies import CONFIDENCE_MEASURES, ExitPolicy
from clframe.nn import GrowingLinear, Head, Network
from clframe.nn.backbones import Backbone, mlp, small_cnn
from clframe.nn.backbones.stages import tap_of
from clframe.nn.exit_ensemble import Ensemble

UNFITTED = ("max_probability", "entropy", "margin", "patience")

CLASSES = (0, 1, 2, 4, 5)  # class 3 is not met: its column is -inf


class Pooled(Head):
    """The mean over positions, a growing classifier and, if it cascades, a map of the logits before."""

    def __init__(self, features: int, cascades: bool) -> None:
        super().__init__()
        self.linear = GrowingLinear(features)
        self.before = nn.Parameter(torch.randn(6, 6)) if cascades else None
        self.cascades = cascades
        self.calls = 0

    def grow(self, classes):
        grown = self.linear.grow(classes)
        if self.before is not None:
            new = self.linear.classes - len(self.before)  # the logits before grow as well
            self.before = nn.Parameter(pad(self.before.detach(), (0, max(0, new), 0, max(0, new)), value=0.5))
        return grown

    def forward(self, features, previous_BC=None):
        self.calls += 1
        assert previous_BC is None or (self.cascades and len(previous_BC) == len(features))
        pooled = features.flatten(2).mean(2) if features.dim() == 4 else features
        pooled = pooled[:, 0] if pooled.dim() == 3 else pooled
        # Normalized, with a large deviation, so that predictions of the untrained network differ between samples.
        logits_BC = 4 * self.linear(layer_norm(pooled, pooled.shape[1:]))
        if previous_BC is None:
            return logits_BC
        return logits_BC + previous_BC.masked_fill(previous_BC.isneginf(), 0) @ self.before


class Tokens(nn.Module):
    """Images into tokens and a mask made from them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x):
        x = x.flatten(2)
        return self.linear(x), x[..., 0] > -0.5


class Mixing(nn.Module):
    """Every token gets a share of the mean of those that its sample's mask lets through."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, value):
        x, mask = value
        allowed = mask.unsqueeze(2)
        mixed = (x * allowed).sum(1, keepdim=True) / allowed.sum(1, keepdim=True).clamp(min=1)
        return torch.tanh(self.linear(x + mixed)), mask


class First(nn.Module):
    def forward(self, value):
        return tap_of(value)[:, 0]


def backbone(kind: str) -> tuple[Backbone, list[tuple[str, int]]]:
    if kind == "mlp":
        return mlp((12,), width=8, depth=3), [("layer1", 8), ("layer2", 8), ("layer2", 8)]
    if kind == "cnn":
        return small_cnn((3, 8, 8), width=4), [("block1", 4), ("block2", 8), ("hidden", 16)]
    stages = [("in", Tokens(), (3, 8)), ("mix", Mixing(), (3, 8)), ("mix2", Mixing(), (3, 8)), ("out", First(), (8,))]
    return Backbone(stages, input_shape=(3, 2, 2)), [("in", 8), ("mix", 8), ("mix2", 8)]


def ensemble(variant: str) -> Ensemble | None:
    kinds = {"product": ProductOfExperts(4), "product to the end": ProductOfExperts(4, final="member"),
             "mean": Mean(4, final="member"), "geometric": Geometric(4, deviation=0.5)}  # fmt: skip
    return kinds.get(variant)


VARIANTS = ("plain", "cascade", "boosted", "product", "product to the end", "mean", "geometric")
# A measure that carries nothing and one that does meet every variant; the others, the plain network.
PAIRS = [("plain", name) for name in (*UNFITTED, "gate")] + [
    (variant, name) for variant in VARIANTS[1:] for name in ("max_probability", "patience")
]


def network(kind: str = "mlp", variant: str = "plain", *, classes=CLASSES, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    stages, taps = backbone(kind)
    net = Network(stages, exits=[(tap, Pooled(width, variant == "cascade")) for tap, width in taps])
    net.boosted = variant == "boosted"
    net.ensemble = ensemble(variant) or net.ensemble
    net.grow(classes)
    return net.eval()


def inputs(net: Network, batch: int) -> torch.Tensor:
    return torch.randn(batch, *net.input_shape)


@torch.no_grad()
def scores(net: Network, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return net.ensemble(net(x).logits)


def reference(net: Network, policy: ExitPolicy, x: torch.Tensor, exits=None) -> Prediction:
    return select(scores(net, x), policy, exits=exits)


def measure(name: str):
    if name != "gate":
        return CONFIDENCE_MEASURES.get(name)
    gate = LearnedConfidence(4)
    gate.weight_KD.normal_()
    gate.bias_K.normal_()
    return gate


def split(net: Network, name: str, x: torch.Tensor) -> tuple[object, tuple[float, ...]]:
    """A measure, and for each exit a threshold in the widest gap around the middle of the confidences there."""
    confidence, carried, thresholds = measure(name), (), []
    for exit, scores_BC in enumerate(scores(net, x)[:-1]):
        values_B, carried = confidence(exit, scores_BC, carried)
        values = values_B.unique().tolist()
        middle = values[len(values) // 4 : 3 * len(values) // 4 + 2]
        low, high = max(itertools.pairwise(middle), key=lambda pair: pair[1] - pair[0], default=(0.4, 0.6))
        thresholds.append((low + high) / 2)
    return confidence, tuple(thresholds)


def assert_same(answer: Prediction, expected: Prediction) -> None:
    assert answer.exit_B.tolist() == expected.exit_B.tolist()
    torch.testing.assert_close(answer.scores_BC, expected.scores_BC)


class Finer(Ensemble):
    """Scores whose type depends on the exit, as it may under autocast."""

    def step(self, exit, logits_BC, carried):
        return (logits_BC.double() if exit == 1 else logits_BC), ()
