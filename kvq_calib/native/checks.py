"""Checks around calls of the native kernels: of every tensor before, and of the status afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["are_numbers", "check", "pointer"]

#: Values of ``KvqStatus`` in ``kernels/cpu/kvq_native.h``.
_OK, _NOT_A_NUMBER, _, _NO_MEMORY = range(4)


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a tensor's memory; ``None`` for no tensor."""
    return None if tensor is None else tensor.data_ptr()


def check(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], *, contiguous: bool = True
) -> None:
    """Refuse a tensor that a kernel would misread: wrong shape, dtype or device, or not contiguous.

    Raises:
        ValueError: the tensor is refused; the message says why.
    """
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise ValueError(f"{name}: is on {tensor.device}, layout {tensor.layout}, where the CPU reads")
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name}: is {tensor.dtype} {list(tensor.shape)} where {dtype} {list(shape)} is needed"
        )
    if (contiguous and not tensor.is_contiguous()) or tensor.is_neg():
        raise ValueError(f"{name}: is not contiguous")


def are_numbers(status: int) -> bool:
    """Whether a finished call met only finite numbers. If not, its output must not be used.

    Raises:
        MemoryError, ValueError: the call failed.
    """
    if status == _NO_MEMORY:
        raise MemoryError("the native kernels are out of memory")
    if status not in (_OK, _NOT_A_NUMBER):
        raise ValueError("the native kernels refused their arguments")
    return status == _OK
