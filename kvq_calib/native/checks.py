"""What every tensor must pass before its pointer is passed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check", "pointer"]


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
