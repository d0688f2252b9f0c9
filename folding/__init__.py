"""Small transformers in JAX: folded attention, forward propagation pruning."""
