"""Sweeps: many runs of one config with different values, each trained once.

A :class:`~clframe.sweep.space.Space` describes the values, :mod:`~clframe.sweep.cells` names one run folder for each
combination and seed, :mod:`~clframe.sweep.locks` keeps two processes from training the same one,
:mod:`~clframe.sweep.work` trains one, and launchers start many: processes of this machine (:mod:`clframe.cli.local`),
:mod:`~clframe.sweep.ray_launcher`, :mod:`~clframe.sweep.slurm_launcher`.
"""
