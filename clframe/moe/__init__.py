"""Mixtures of experts: conversion of dense models, routers and gates, execution, and a native layer."""

from clframe.moe.convert import layer_inputs, regroup, to_experts
from clframe.moe.dispatch import Plan
from clframe.moe.experts import ExpertLayer
from clframe.moe.native import MixtureOfExperts
from clframe.moe.pipeline import fit_router, fit_routers, moefy
from clframe.moe.routed import Macs, RoutedExperts, Usage, routed_layers, set_gate, set_tau
from clframe.moe.router import ActivationRouter, CumulativeShare, DynamicK, NormRouter, TopK
from clframe.moe.tuning import tune
from clframe.moe.usage import LayerUsage, count_usage, expert_usage

__all__ = [
    "ActivationRouter", "CumulativeShare", "DynamicK", "ExpertLayer", "LayerUsage", "Macs", "MixtureOfExperts",
    "NormRouter", "Plan", "RoutedExperts", "TopK", "Usage", "count_usage", "expert_usage", "fit_router", "fit_routers",
    "layer_inputs", "moefy", "regroup", "routed_layers", "set_gate", "set_tau", "to_experts",
    "tune",
]  # fmt: skip
