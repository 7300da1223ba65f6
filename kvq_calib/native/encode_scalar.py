"""Calls of the scalar encoder. Everything is checked before a pointer is passed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvq_calib.native.checks import are_numbers, check, pointer
from kvq_calib.native.loader import KvqScalar, Library

__all__ = ["EncodedTokens", "ScalarTables", "encode_scalar"]


@dataclass(frozen=True, eq=False)
class ScalarTables:
    """What the encoder needs of a quantizer: tensors on the CPU, with ``C = H D`` channels.

    Attributes:
        heads, size: ``H`` and ``D``.
        storage: float16 or bfloat16.
        levels, boundaries: float32 ``[L]`` and ``[L - 1]``, sorted.
        token_scales: whether thresholds are computed per token, leaving out ``per_side`` elements at each end.
        per_side: number of elements to leave out at each end.
        outlier_cap: largest number of outliers of a token.
        scale, zero_point, inverse: float32 ``[C]``, per channel; ``None`` if thresholds are only per token.
    """

    heads: int
    size: int
    storage: torch.dtype
    levels: Tensor
    boundaries: Tensor
    token_scales: bool
    per_side: int
    outlier_cap: int
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    inverse: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a tensor has a wrong dtype, shape or device, or numbers do not fit.
        """
        channels = self.heads * self.size
        if self.storage not in (torch.float16, torch.bfloat16):
            raise ValueError(f"storage: {self.storage}")
        check("levels", self.levels, torch.float32, (len(self.levels),))
        check("boundaries", self.boundaries, torch.float32, (len(self.levels) - 1,))
        thresholds = (self.scale, self.zero_point, self.inverse)
        if any((each is None) != (self.scale is None) for each in thresholds):
            raise ValueError("scale: needed with zero_point and inverse, and only then")
        if self.scale is None and not self.token_scales:
            raise ValueError("scale: needed without thresholds of tokens")
        for name in ("scale", "zero_point", "inverse"):
            if (tensor := getattr(self, name)) is not None:
                check(name, tensor, torch.float32, (channels,))
        if not 0 <= 2 * self.per_side < channels or self.outlier_cap < 0:
            raise ValueError(f"per_side: {self.per_side} of {channels}, outlier_cap {self.outlier_cap}")

    def described(self) -> KvqScalar:
        """The C structure."""
        return KvqScalar(
            *(self.heads, self.size, len(self.levels), self.storage == torch.bfloat16),
            *(self.token_scales, self.per_side, self.outlier_cap, 0),
            *map(pointer, (self.levels, self.boundaries, self.scale, self.zero_point, self.inverse)),
        )


class EncodedTokens(NamedTuple):
    """Result of the encoder.

    Attributes:
        codes: uint8 ``[B, T, C]``.
        outliers: bool ``[B, T, C]``; ``None`` without outliers.
        residual: storage dtype ``[B, T, C]``, 0 where ``outliers`` is not set; ``None`` without outliers.
        token: scale and zero point, storage dtype ``[B, T]`` each; ``None`` with thresholds per channel only.
    """

    codes: Tensor
    outliers: Tensor | None
    residual: Tensor | None
    token: tuple[Tensor, Tensor] | None


def encode_scalar(library: Library, tables: ScalarTables, x: Tensor) -> EncodedTokens | None:
    """Code keys or values, with the same result as torch, on as many threads as torch uses.

    Args:
        library: the library to call.
        tables: tables of the quantizer.
        x: float32 ``[B, H, T, D]`` on the CPU.

    Returns:
        ``None`` if torch must compute: gradients are needed, or some number is not finite.

    Raises:
        ValueError: a tensor has a wrong dtype, shape or device.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return None
    if x.ndim != 4:
        raise ValueError(f"x: has {x.ndim} dimensions")
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, _, tokens, _ = x.shape
    check("x", x, torch.float32, (batch, tables.heads, tokens, tables.size), contiguous=False)
    shape = (batch, tokens, tables.heads * tables.size)
    codes = torch.empty(shape, dtype=torch.uint8)
    token = torch.empty(2, batch, tokens, dtype=tables.storage) if tables.token_scales else None
    outliers = torch.empty(shape, dtype=torch.bool) if tables.outlier_cap else None
    residual = torch.empty(shape, dtype=tables.storage) if tables.outlier_cap else None
    status = library.functions.kvq_encode_scalar(
        ctypes.byref(tables.described()),
        *(x.data_ptr(), (ctypes.c_int64 * 3)(x.stride(0), x.stride(2), x.stride(1))),
        *(batch, tokens, torch.get_num_threads()),
        *(codes.data_ptr(), pointer(token), pointer(outliers), pointer(residual)),
    )
    if not are_numbers(status):
        return None
    return EncodedTokens(codes, outliers, residual, None if token is None else (token[0], token[1]))
