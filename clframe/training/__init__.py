"""Training: the Lightning module, Avalanche's loop on Lightning, checkpoints and TensorBoard."""
