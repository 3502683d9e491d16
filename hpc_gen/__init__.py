"""hpc-gen: train, resume, sample and score image generators on preemptible Slurm clusters."""

__version__ = "0.1.0"
