"""Sampling: the plan of N images, blocks of them, image files and preview grids."""
