"""A trained state becomes answers, and files that others can serve."""
