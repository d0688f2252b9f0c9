"""Studies: one grid of runs per file."""
