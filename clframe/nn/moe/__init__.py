"""Mixtures of experts: out of a dense model, each token by as many as it needs, or trained from scratch."""

from clframe.nn.moe.convert import layer_inputs, to_experts
from clframe.nn.moe.execute import Plan
from clframe.nn.moe.experts import ExpertLayer
from clframe.nn.moe.native import MixtureOfExperts
from clframe.nn.moe.pipeline import fit_router, fit_routers, moefy
from clframe.nn.moe.routed import Macs, RoutedExperts, Usage, counting, routed_layers, set_gate, set_tau
from clframe.nn.moe.router import ActivationRouter, CumulativeShare, DynamicK, NormRouter, TopK

__all__ = [
    "ActivationRouter",
    "CumulativeShare",
    "DynamicK",
    "ExpertLayer",
    "Macs",
    "MixtureOfExperts",
    "NormRouter",
    "Plan",
    "RoutedExperts",
    "TopK",
    "Usage",
    "counting",
    "fit_router",
    "fit_routers",
    "layer_inputs",
    "moefy",
    "routed_layers",
    "set_gate",
    "set_tau",
    "to_experts",
]
