"""Training: the Lightning module, Avalanche's loop on Lightning, checkpoints and TensorBoard.

Verbs that do not train use the modules here that need neither Avalanche nor Lightning, such as ``checkpoint``,
``trained`` and ``learner``; so the package itself imports neither. The others import both through
``clframe.avalanche_bridge.imports``.
"""
