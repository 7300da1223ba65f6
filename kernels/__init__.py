"""The kernels' sources, for CUDA and for the CPU, inside the wheel as ``kvq_calib._kernels``."""

# Where Python runs in a checkout this folder is importable as `kernels`, the name of a library that transformers
# looks for. It takes what it finds there by this version, and version 0 for one that is too old to use.
__version__ = "0"
