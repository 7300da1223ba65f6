"""Packing and attention by CUDA kernels; ``docs/reference/kernels.md`` says what they do and how."""
