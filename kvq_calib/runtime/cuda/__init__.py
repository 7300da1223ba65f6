"""Packing and attention by CUDA kernels; ``docs/reference/kernels.md`` describes them."""
