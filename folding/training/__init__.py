"""A loss becomes a trained state."""
