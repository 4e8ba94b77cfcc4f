"""Networks: backbones with taps, heads that grow, exits on taps, frozen copies."""

from clframe.nn.backbones import BACKBONES, Backbone
from clframe.nn.freeze import freeze, restore
from clframe.nn.heads import GrowingLinear, Head
from clframe.nn.network import FINAL, Network

__all__ = ["BACKBONES", "FINAL", "Backbone", "GrowingLinear", "Head", "Network", "freeze", "restore"]
