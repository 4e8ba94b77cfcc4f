"""Importance of weights, and quadratic penalties on their change."""
