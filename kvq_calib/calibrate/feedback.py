"""Error feedback: which share of its errors a coordinate hands on to those that are coded after it.

The loss sees an error ``e`` of a head through ``e^T W e``, with ``W`` the mean outer product of the gradients. Where
gradients of two coordinates are correlated, a second error can make good for a first. With ``W = M^T D M``, ``M``
unit lower triangular and ``D`` diagonal, coordinate ``i`` takes up ``sum over j < i of M[i, j] e[j]``, and only the
rounding errors are left, weighed by ``D`` (the argument of GPTQ, arXiv 2210.17323, and QuIP, arXiv 2307.13304, for
weights). ``D`` is never above the diagonal of ``W``, and a reader of the cache has nothing to do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvq_calib.calibrate.statistics import Sums

__all__ = ["ErrorFeedback", "GradientCovariance", "error_feedback"]

#: Added to the diagonal, as a share of it: entries follow what many tokens agree on.
_DAMPING = 0.03
_INT8 = 127


class GradientCovariance(Sums):
    """Sum of the outer products of the gradients of each head; two states add.

    Args:
        heads: key-value heads ``H``.
        head_dim: coordinates ``D`` of a head.
        device: where to accumulate.
    """

    def __init__(self, heads: int, head_dim: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(heads, head_dim, head_dim, dtype=torch.float64, device=device)

    def update(self, gradient: Tensor) -> None:
        """Add gradients, float ``[N, C]``, of values as they are to be quantized."""
        heads, head_dim, _ = self.sums.shape
        split = gradient.unflatten(1, (heads, head_dim)).transpose(0, 1).double()
        self.sums += (split.mT @ split).to(self.sums.device)


class ErrorFeedback(NamedTuple):
    """The factors of the weight of each head.

    Attributes:
        feedback, feedback_scale: ``M`` below its diagonal, int8 ``[H, D (D - 1) / 2]`` and float32 ``[H]``, as
            :class:`kvq_calib.quantizer.QuantParams` has them.
        feedback_weight: ``D`` over the largest of the head, float16 ``[H, D]``.
        left: what feedback leaves of the weight of each coordinate's rounding error, ``D[i] / W[i, i]`` in (0, 1], float64
            ``[H, D]``.
    """

    feedback: Tensor
    feedback_scale: Tensor
    feedback_weight: Tensor
    left: Tensor


def error_feedback(weight: Tensor) -> ErrorFeedback:
    """Factor the weights of the errors of all heads, float64 ``[H, D, D]``, symmetric and positive semidefinite."""
    size = weight.shape[-1]
    diagonal = weight.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)[:, None, None]
    weight = torch.where(
        mean > 0, weight / mean.where(mean > 0, torch.ones_like(mean)), torch.eye(size).to(weight)
    )
    diagonal = weight.diagonal(dim1=-2, dim2=-1)
    floor = torch.finfo(torch.float32).eps  # coordinates that nothing depends on
    weight = weight + torch.diag_embed(_DAMPING * diagonal + floor)
    # Coordinates in reverse turn Cholesky's W = C C^T into one with C upper triangular.
    upper = torch.linalg.cholesky(weight.flip(-1, -2)).flip(-1, -2)
    root = upper.diagonal(dim1=-2, dim2=-1)
    matrix = (upper / root[:, None, :]).mT
    row, column = torch.tril_indices(size, size, -1, device=weight.device)
    entries = matrix[:, row, column]
    largest = entries.abs().amax(-1) if entries.shape[-1] else entries.new_zeros(len(entries))
    scale = (largest / _INT8).float()
    steps = entries / scale.double().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    feedback = steps.round().clamp(-_INT8, _INT8).to(torch.int8)
    pivots = root.square()
    share = (pivots / pivots.amax(-1, keepdim=True)).half()
    return ErrorFeedback(feedback, scale, share, pivots / weight.diagonal(dim1=-2, dim2=-1))
