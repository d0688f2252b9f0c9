"""Configurations: one experiment per file."""
