"""Figures: one style, and charts that several subjects draw."""
