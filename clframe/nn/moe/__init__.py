"""Mixtures of experts: out of a dense model, each token by as many as it needs, or trained from scratch."""

from clframe.nn.moe.convert import layer_inputs, regroup, to_experts
from clframe.nn.moe.execute import Plan
from clframe.nn.moe.experts import ExpertLayer
from clframe.nn.moe.macs import Macs, Usage
from clframe.nn.moe.native import MixtureOfExperts
from clframe.nn.moe.pipeline import fit_router, fit_routers, moefy
from clframe.nn.moe.routed import RoutedExperts, routed_layers, set_gate, set_tau
from clframe.nn.moe.router import ActivationRouter, CumulativeShare, DynamicK, NormRouter, TopK
from clframe.nn.moe.usage import LayerUsage, counting, expert_usage

__all__ = [
    "ActivationRouter",
    "CumulativeShare",
    "DynamicK",
    "ExpertLayer",
    "LayerUsage",
    "Macs",
    "MixtureOfExperts",
    "NormRouter",
    "Plan",
    "RoutedExperts",
    "TopK",
    "Usage",
    "counting",
    "expert_usage",
    "fit_router",
    "fit_routers",
    "layer_inputs",
    "moefy",
    "regroup",
    "routed_layers",
    "set_gate",
    "set_tau",
    "to_experts",
]
