"""Activation sparsity inside networks: where neurons fire, what keeps them few, how a sparse input saves time."""

from clframe.nn.sparsity.sites import FFN, Site, find_ffns, find_sites
from clframe.nn.sparsity.sparse_linear import SparseLinear, break_even
from clframe.nn.sparsity.watch import swap_for_relu, watch

__all__ = ["FFN", "Site", "SparseLinear", "break_even", "find_ffns", "find_sites", "swap_for_relu", "watch"]
