"""Exits: heads on taps, ensembles of them, and policies that stop early."""

from clframe.nn.exits.ensemble import Ensemble, EnsembleKind, make_ensemble
from clframe.nn.exits.ensemble_fit import fit_ensemble, fit_on_samples
from clframe.nn.exits.gate import Gate, fit_gate
from clframe.nn.exits.heads_by_kind import HeadKind, make_head, matched_head
from clframe.nn.exits.placement import Placement, place
from clframe.nn.exits.policies import MEASURES, ExitPolicy, Measure, patience_threshold
from clframe.nn.exits.static import STATIC, Answer, select

__all__ = [
    "MEASURES", "STATIC", "Answer", "Ensemble", "EnsembleKind", "ExitPolicy", "Gate", "HeadKind", "Measure",
    "Placement", "fit_ensemble", "fit_gate", "fit_on_samples", "make_ensemble", "make_head", "matched_head",
    "patience_threshold", "place", "select",
]  # fmt: skip
