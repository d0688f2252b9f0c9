"""A run becomes pages."""
