"""Configurations: one experiment a file."""
