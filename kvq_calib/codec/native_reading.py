"""A quantizer's parameters in the form that native readers of its codes take."""

from __future__ import annotations

import torch

from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.codec.trellis import TrellisQuantizer
from kvq_calib.native.attend import CodeTables

__all__ = ["CODECS", "code_tables"]

#: Codecs that native readers support.
CODECS = ("scalar", "trellis")


@torch.no_grad()
def code_tables(quantizer: Quantizer) -> CodeTables:
    """Tables for native readers. The parameters must be on the CPU, and must not be changed in place afterwards."""
    thresholds, levels = quantizer.has_channel_thresholds, quantizer.shared_levels
    return CodeTables(
        heads=quantizer.shape.heads,
        size=quantizer.shape.head_dim,
        widths=quantizer.widths,
        trellis=quantizer.codes_in_blocks,
        token_scales=quantizer.per_token,
        storage=quantizer.storage,
        levels=None if levels is None else levels.contiguous(),
        coefficients=quantizer.coefficients if isinstance(quantizer, TrellisQuantizer) else None,
        scale=quantizer.scale.contiguous() if thresholds else None,
        zero_point=quantizer.zero_point.contiguous() if thresholds else None,
    )
