"""Runs the CUDA kernels on the host: see ``cuda_shim.h``."""
