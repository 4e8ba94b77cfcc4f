"""Conversion of a trained dense model to experts: the steps of ``clframe moefy``."""
