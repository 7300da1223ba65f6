"""A simulated machine with a GPU: torch's CUDA device, the driver's Python packages, and nvcc.

Tensors "on cuda:0" have ordinary memory, kernels run as C++ (``tests/shim``), and nothing is fast. Operations that
would fail on a GPU because of a tensor's device also fail here. Operations that would make the host wait for the device
are recorded.
"""
