"""The kernels' sources, for CUDA and for the CPU, inside the wheel as ``kvq_calib._kernels``."""

# When Python runs in a checkout, this folder can be imported as `kernels`, which is also the name of a library that
# transformers looks for. With version 0, transformers considers the library too old and ignores it.
__version__ = "0"
