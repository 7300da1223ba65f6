"""A machine with a GPU that is not there: torch's CUDA device, the driver's Python packages, and nvcc.

Tensors "on cuda:0" hold ordinary memory, kernels run as C++ (``tests/shim``), and nothing is fast. What would fail on a
GPU because of where a tensor is, fails here; what would make the host wait for the device is written down.
"""
