"""Exits: heads on taps, ensembles of them, and policies that stop early."""
