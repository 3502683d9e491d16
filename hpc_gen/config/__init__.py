"""The typed experiment: models with units, a YAML loader that remembers lines, and errors that name them."""
