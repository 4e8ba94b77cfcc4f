"""Activation sparsity: feed-forward networks by role, penalties, critical sparsity, and sparse products."""

from clframe.sparsity.activity import Activity, activity, experience_activity, overlap
from clframe.sparsity.analysis import SparsityCurve, SparsityReport, accuracy, analyze
from clframe.sparsity.ffn import FFN
from clframe.sparsity.penalties import measure_sites, swap_for_relu
from clframe.sparsity.sites import Site, find_ffns, find_sites
from clframe.sparsity.sparse_linear import SparseLinear, break_even

__all__ = [
    "FFN", "Activity", "Site", "SparseLinear", "SparsityCurve", "SparsityReport", "accuracy", "activity", "analyze",
    "break_even", "experience_activity", "find_ffns", "find_sites", "measure_sites", "overlap", "swap_for_relu",
]  # fmt: skip
