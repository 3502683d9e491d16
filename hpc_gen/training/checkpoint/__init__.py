"""The checkpoint chain: whole or absent, verified before it is parsed, the same layout for all engines."""
