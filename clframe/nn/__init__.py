"""Networks: backbones with taps, heads that grow, exits on taps, frozen copies."""

from clframe.nn.backbones import BACKBONES, Backbone
from clframe.nn.exits.dynamic import DynamicNetwork
from clframe.nn.fold import folded
from clframe.nn.freeze import freeze, restore
from clframe.nn.heads import CosineLinear, GrowingLinear, Head
from clframe.nn.network import FINAL, Network

__all__ = [
    "BACKBONES", "FINAL", "Backbone", "CosineLinear", "DynamicNetwork", "GrowingLinear", "Head", "Network", "folded",
    "freeze", "restore",
]  # fmt: skip
