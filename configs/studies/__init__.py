"""Studies: a grid of runs a file."""
