"""The scalar encoder, called: everything is checked before a pointer is passed."""

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
    """What the encoder reads of a quantizer; tensors on the CPU, ``C = H D`` channels.

    Attributes:
        heads, size: ``H`` and ``D``.
        storage: float16 or bfloat16.
        levels, boundaries: float32 ``[L]`` and ``[L - 1]``, sorted.
        token_scales: thresholds are a token's, leaving out ``per_side`` elements at each end.
        per_side: see there.
        outlier_cap: most outliers of a token.
        scale, zero_point, inverse: float32 ``[C]``, of channels; ``None`` where thresholds are a token's alone.
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
        """Refuse what no quantizer has.

        Raises:
            ValueError: a tensor of another dtype, shape or place, or numbers that do not fit.
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
        """The same in C."""
        return KvqScalar(
            *(self.heads, self.size, len(self.levels), self.storage == torch.bfloat16),
            *(self.token_scales, self.per_side, self.outlier_cap, 0),
            *map(pointer, (self.levels, self.boundaries, self.scale, self.zero_point, self.inverse)),
        )


class EncodedTokens(NamedTuple):
    """What the encoder found.

    Attributes:
        codes: uint8 ``[B, T, C]``.
        outliers: bool ``[B, T, C]``, and
        residual: storage dtype ``[B, T, C]``, 0 elsewhere; ``None`` where there are no outliers.
        token: scale and zero point, storage dtype ``[B, T]`` each; ``None`` where thresholds are those of channels.
    """

    codes: Tensor
    outliers: Tensor | None
    residual: Tensor | None
    token: tuple[Tensor, Tensor] | None


def encode_scalar(library: Library, tables: ScalarTables, x: Tensor) -> EncodedTokens | None:
    """Codes of keys or values, those that torch finds; on as many threads as torch uses.

    Args:
        library: that computes.
        tables: of the quantizer.
        x: float32 ``[B, H, T, D]`` on the CPU.

    Returns:
        ``None`` where torch must compute: gradients are wanted, or something met on the way is no number.

    Raises:
        ValueError: a tensor of the wrong dtype, shape or device.
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
