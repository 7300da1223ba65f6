"""Attention over packed pages on CUDA devices."""
