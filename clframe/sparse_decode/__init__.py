"""Decoding that skips inactive neurons of feed-forward networks, and its timing against the dense model."""

from clframe.sparse_decode.calibration import calibrate
from clframe.sparse_decode.layer import SparseFFN, sparse_decoder, sparse_layers
from clframe.sparse_decode.rules import Rule, read_share

__all__ = ["Rule", "SparseFFN", "calibrate", "read_share", "sparse_decoder", "sparse_layers"]
