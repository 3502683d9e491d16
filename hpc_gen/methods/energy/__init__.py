"""Diffusion on a DiT backbone after Averyyy/mar_ebwm; this version holds its standard (epsilon predicting) variant."""
