"""The only doors to the outside: environment, time, process groups, signals, files, randomness, journal,
tracking.
"""
