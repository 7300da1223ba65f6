"""A quantizer's parameters in the form that the native encoders read."""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_calib.codec.error_compensation import Compensation
from kvq_calib.codec.params import Params
from kvq_calib.codec.quantizer import Quantizer
from kvq_calib.codec.thresholds import reciprocal
from kvq_calib.codec.token_weighting import size_edges
from kvq_calib.codec.trellis_params import TrellisParams
from kvq_calib.native.encode import TrellisTables
from kvq_calib.native.encode_scalar import ScalarTables
from kvq_calib.native.loader import Library, library

__all__ = ["encoding_library", "scalar_tables", "trellis_tables"]


def encoding_library(x: Tensor, params: Params) -> Library | None:
    """The native library for coding ``x``; ``None`` if torch should do it.

    That is the case if there is no library, ``x`` is not float32 on the CPU, or ``params`` are being trained.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return None
    if torch.is_grad_enabled() and any(each.requires_grad for each in params.tensors().values()):
        return None
    return library()


@torch.no_grad()
def trellis_tables(
    quantizer: Quantizer, params: TrellisParams, states: int, compensation: Compensation | None
) -> TrellisTables:
    """Tables for the trellis encoder. The parameters must be on the CPU, and must not be changed in place afterwards.

    Args:
        quantizer: a quantizer of the trellis codec.
        params, compensation: its parameters and its error compensation.
        states: number of states of the trellis.
    """
    shares = None if compensation is None else compensation.shares.contiguous()
    refinement = None if compensation is None else compensation.refinement_shares
    weight, unit = params.token_weight, params.token_size_unit
    feedback = params.error_feedback
    turned = {}
    if params.pair_angle is not None:
        assert quantizer.rope is not None
        # In the same shape as in the reference, so that rounding is the same.
        angle = params.pair_angle.float()[:, None, :]
        turned = {
            "pair": torch.tensor(quantizer.rope.pairs, dtype=torch.int32).reshape(-1, 2),
            "cosine": angle.cos()[:, 0].contiguous(),
            "sine": angle.sin()[:, 0].contiguous(),
        }
    counts = [quantizer.level_count(width) for width in quantizer.widths]
    return TrellisTables(
        heads=quantizer.shape.heads,
        size=quantizer.shape.head_dim,
        states=states,
        level_count=torch.tensor(counts, dtype=torch.int32),
        levels=quantizer.levels.contiguous(),
        shares=shares,
        refinement_shares=None if refinement is None else refinement.contiguous(),
        refinement_passes=0 if compensation is None else compensation.refinement_passes,
        size_edges=None if unit is None or weight is None else size_edges(unit).contiguous(),
        class_weight=None if weight is None else weight.float().contiguous(),
        feedback=None if feedback is None else feedback.float().contiguous(),
        **turned,
    )


@torch.no_grad()
def scalar_tables(quantizer: Quantizer, boundaries: Tensor, per_side: int) -> ScalarTables:
    """Tables for the scalar encoder. The parameters must be on the CPU, and must not be changed in place afterwards.

    Args:
        quantizer: a quantizer of the scalar codec.
        boundaries: float32 ``[L - 1]``, the boundaries between its levels.
        per_side: elements that thresholds of tokens leave out at each end.
    """
    levels = quantizer.shared_levels
    assert levels is not None
    thresholds = {}
    if quantizer.has_channel_thresholds:
        thresholds = {
            "scale": quantizer.scale.contiguous(),
            "zero_point": quantizer.zero_point.contiguous(),
            "inverse": reciprocal(quantizer.scale).contiguous(),
        }
    return ScalarTables(
        heads=quantizer.shape.heads,
        size=quantizer.shape.head_dim,
        storage=quantizer.storage,
        levels=levels.contiguous(),
        boundaries=boundaries.contiguous(),
        token_scales=quantizer.per_token,
        per_side=per_side,
        outlier_cap=quantizer.outlier_cap,
        **thresholds,
    )
