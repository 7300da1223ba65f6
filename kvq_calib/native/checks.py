"""Before a call of the native kernels: what every tensor must pass. After it: what its status means."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["are_numbers", "check", "pointer"]

#: ``KvqStatus`` of ``kernels/cpu/kvq_native.h``.
_OK, _NOT_A_NUMBER, _, _NO_MEMORY = range(4)


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's memory begins, or ``None`` where there is none."""
    return None if tensor is None else tensor.data_ptr()


def check(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], *, contiguous: bool = True
) -> None:
    """Refuse a tensor whose memory is not what a pointer would be taken for.

    Raises:
        ValueError: says what is wrong with it.
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
    """Whether a call that has ended met numbers alone; what it wrote is not to be used if not.

    Raises:
        MemoryError, ValueError: it did not end well.
    """
    if status == _NO_MEMORY:
        raise MemoryError("the native kernels found no memory")
    if status not in (_OK, _NOT_A_NUMBER):
        raise ValueError("the native kernels refused their arguments")
    return status == _OK
