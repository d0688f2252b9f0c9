"""Ratios within one run; each is `python -m benchmarks.NAME [--json]`."""
