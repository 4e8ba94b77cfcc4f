"""Replay: which samples a buffer stores, and how they join the new data."""
