"""Diffusion processes and solvers that methods share; nothing here knows a network or a method."""
