"""Conversion of a trained dense model to experts with ``clframe moefy``."""
