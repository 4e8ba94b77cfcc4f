"""Networks: backbones with taps, growing heads, exits on taps, frozen copies."""

from clframe.nn.backbones import BACKBONES
from clframe.nn.backbones.base import Backbone
from clframe.nn.frozen import freeze, restore
from clframe.nn.heads import CosineLinear, GrowingLinear, Head
from clframe.nn.network import FINAL, Network

__all__ = ["BACKBONES", "FINAL", "Backbone", "CosineLinear", "GrowingLinear", "Head", "Network", "freeze", "restore"]
