"""Slurm: the launcher of stages on a cluster, and `slurm.lab`, a real Slurm on one machine for tests."""
