"""Engines: how parameters, gradients and optimizer state lie over ranks."""
