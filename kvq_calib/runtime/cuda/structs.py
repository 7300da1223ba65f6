"""Parameters of the kernels, as the sources declare them, and checks of tensors.

Tests compare the sizes with those in the sources, to find missing fields.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvq_calib.errors import RuntimeMismatchError

__all__ = [
    "MAX_GRID",
    "TYPES",
    "AppendParams",
    "AppendSide",
    "DecodeParams",
    "DequantizeParams",
    "PlaceParams",
    "PlaceSide",
    "StepParams",
    "StepState",
    "check",
    "pointer",
]

#: Largest second and third dimension of a grid.
MAX_GRID = 65535
#: Numbers of dtypes in the kernels.
TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class DecodeParams(ctypes.Structure):
    """Parameters of ``decode_attention``."""

    _fields_ = (
        *(
            (name, _P)
            for name in ("query", "key_pages", "value_pages", "blocks", "key_channels", "value_channels")
        ),
        *((name, _P) for name in ("key_levels", "value_levels", "key_region", "value_region")),
        *(
            (name, _P)
            for name in (
                "key_kinds",
                "value_kinds",
                "key_angles",
                "key_turns",
                "key_pair_scale",
                "value_affine",
            )
        ),
        ("exact_key", _P * 2),
        ("exact_value", _P * 2),
        *((name, _P) for name in ("pool_table", "pool", "pool_exact")),
        ("pool_bytes", _L),
        ("pool_offset", _L * 3),
        *(
            (name, _P)
            for name in ("state", "exact_positions", "exact_angles", "exact_pairs", "partial", "partial_sum")
        ),
        *((name, _P) for name in ("arrived", "sink_logits", "out")),
        ("exact_stride", _L * 4),
        *((name, _I) for name in ("key_words", "value_words", "kv_heads", "query_heads", "subgroups")),
        *((name, _I) for name in ("first_page", "pages", "packed_splits", "splits")),
        ("exact_count", _I * 2),
        ("first_token", _I),
        ("scaling", _F),
        ("softcap", _F),
        ("rope_scaling", _F),
        *((name, _I) for name in ("key_rope", "value_token", "query_bfloat", "storage_bfloat")),
        *((name, _I) for name in ("block_stride", "pool_stride", "group")),
    )


class AppendSide(ctypes.Structure):
    """Keys or values in :class:`AppendParams`."""

    _fields_ = (
        *(
            (name, _P)
            for name in (
                "x",
                "token",
                "pages",
                "cosine",
                "sine",
                "partner",
                "scale",
                "reciprocal",
                "zero_point",
            )
        ),
        *((name, _P) for name in ("levels", "boundaries", "coefficients", "bits", "word_offset")),
        *((name, _P) for name in ("compensation", "refinement", "token_weight", "weight_edge", "feedback")),
        *((name, _P) for name in ("outlier_index", "outlier_residual", "outlier_count")),
        ("stride", _L * 3),
        ("token_stride", _L * 2),
        *((name, _I) for name in ("type", "words", "per_token", "channel_normalized", "per_side", "cap")),
        *(
            (name, _I)
            for name in ("capacity", "storage_bfloat", "paths", "refinements", "token_type", "padding")
        ),
    )


class AppendParams(ctypes.Structure):
    """Parameters of ``append_blocks``."""

    _fields_ = (
        ("side", AppendSide * 2),
        ("state", _P),
        *((name, _I) for name in ("batch", "heads", "head_dim", "first_block", "head_warps", "tail")),
    )


class PlaceSide(ctypes.Structure):
    """Keys or values in :class:`PlaceParams`."""

    _fields_ = (
        *((name, _P) for name in ("index", "residual", "count", "pages")),
        *((name, _I) for name in ("capacity", "padding")),
    )


class PlaceParams(ctypes.Structure):
    """Parameters of ``place_outliers``."""

    _fields_ = (
        ("side", PlaceSide * 2),
        ("state", _P),
        *((name, _I) for name in ("heads", "blocks", "first_block", "batch")),
    )


class StepParams(ctypes.Structure):
    """Parameters of ``advance_step``."""

    _fields_ = (
        *((name, _P) for name in ("state", "position", "exact", "sink", "sink_slot", "blocks", "seen")),
        *((name, _I) for name in ("batch", "sinks", "capacity", "block_stride", "window", "padding")),
    )


class StepState(ctypes.Structure):
    """The state of a cache, on the device; see ``step.cuh``."""

    _fields_ = (
        *((name, _I) for name in ("length", "held", "packed", "blocks", "place", "closes")),
        *((name, _I) for name in ("pages", "first_token")),
        ("faults", _I * 4),
    )


class DequantizeParams(ctypes.Structure):
    """Parameters of ``dequantize_blocks``."""

    _fields_ = (
        *((name, _P) for name in ("pages", "levels", "scale", "zero_point", "coefficients", "bits")),
        ("word_offset", _P),
        *((name, _P) for name in ("angles", "pairs", "positions", "out")),
        ("rope_scaling", _F),
        *((name, _I) for name in ("heads", "head_dim", "words", "first_block")),
        *((name, _I) for name in ("token", "channel_normalized", "storage_bfloat", "paths", "type")),
    )


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a tensor's numbers, or ``None`` if it has none."""
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Check that a tensor has the device, dtype, shape and strides that a kernel expects.

    Raises:
        RuntimeMismatchError: it differs, with what differs.
    """
    if tensor.device != device:
        raise RuntimeMismatchError(
            f"{name} is on {tensor.device}, but the cache is on {device}; move it there"
        )
    if tensor.dtype != dtype:
        raise RuntimeMismatchError(f"{name} is {tensor.dtype}, expected {dtype}; convert it")
    if tuple(tensor.shape) != shape:
        raise RuntimeMismatchError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.is_contiguous():
        raise RuntimeMismatchError(f"{name} has strides {tensor.stride()}; make it contiguous")
