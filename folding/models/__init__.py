"""Batches become logits.

Axes, here and in every array suffix of the library: B batch, L query
position, M key position, D width, H heads, J key/value heads, R query heads
that share a key head (H = J R), K head size, G row groups, F feed-forward
width, V vocabulary, C classes, N layers. Kernels are stored [in, out].
"""
