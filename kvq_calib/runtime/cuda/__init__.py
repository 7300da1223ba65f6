"""Packing and attention by CUDA kernels; ``docs/kernels.md`` says what they do and how."""
