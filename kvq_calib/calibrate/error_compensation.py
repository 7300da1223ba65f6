"""Fits error compensation: how the error of a coordinate enters the coordinates that are coded after it.

An error ``e`` of a head raises the loss by ``e^T W e``, where ``W`` is the mean outer product of the gradients. If the
gradients of two coordinates are correlated, a second error can cancel the effect of a first. Let ``W = M^T D M``, with
``M`` unit lower triangular and ``D`` diagonal. Coordinate ``i`` is coded with ``sum over j < i of M[i, j] e[j]`` added,
and only the rounding errors remain, weighted by ``D``. This is the argument of GPTQ (arXiv 2210.17323) and QuIP (arXiv
2307.13304) for weights. ``D`` is never above the diagonal of ``W``, and readers of the cache are not affected.

The number of entries of ``M`` is half the square of the head size. If that is too much to store, ``W`` is approximated
by ``S (I - diag(F F^T) + F F^T) S``, where ``S`` is diagonal and ``F`` has few columns (factor analysis of the
correlations). ``M`` is then computed from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kvq_calib.calibrate.statistics import Reduction, Statistics
from kvq_calib.codec.error_compensation import error_weight_matrix, triangular_factor

__all__ = ["CompensationFactors", "GradientCovariance", "compensation_factors"]

#: Share of the diagonal that is added to it, so that entries reflect many tokens.
_DAMPING = 0.03
_INT8 = 127
#: Rounds of factor analysis, and the smallest uniqueness (unshared variance) of a coordinate.
_ROUNDS = 10
_OWN = 0.05


class GradientCovariance(Statistics):
    """Sum of the outer products of the gradients of each head.

    Args:
        heads: key-value heads ``H``.
        head_dim: coordinates ``D`` of a head.
    """

    reductions: ClassVar[Mapping[str, Reduction]] = {"sums": "sum"}

    def __init__(self, heads: int, head_dim: int) -> None:
        self.sums = torch.zeros(heads, head_dim, head_dim, dtype=torch.float64)

    def update(self, gradient: Tensor) -> None:
        """Add gradients with respect to the values to quantize, float ``[N, C]`` on the CPU."""
        heads, head_dim, _ = self.sums.shape
        split = gradient.unflatten(1, (heads, head_dim)).transpose(0, 1).double()
        self.sums += split.mT @ split


class CompensationFactors(NamedTuple):
    """The stored numbers of each head, and the reduction of error they give.

    Attributes:
        entries: int8 ``[H, n]``, of the matrix below its diagonal, or of the factor, in steps of ``scale``.
        scale: float32 ``[H]``.
        weight: float16 ``[H, D]``, cost of a rounding error of each coordinate.
        left: weight of each coordinate's rounding error after compensation, relative to that before: float64
            ``[H, D]``. The geometric mean over a head is in (0, 1].
    """

    entries: Tensor
    scale: Tensor
    weight: Tensor
    left: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all heads, including ``weight``, which the matrix form needs only for refinement passes."""
        return self.entries.nbytes + self.scale.nbytes + self.weight.nbytes


def compensation_factors(weight: Tensor, rank: int = 0) -> CompensationFactors:
    """Factor the error weights of all heads, float64 ``[H, D, D]``, symmetric and positive semidefinite.

    Args:
        weight: the error weights ``W``.
        rank: number of columns of the stored factor, or 0 for the whole matrix.
    """
    size = weight.shape[-1]
    diagonal = weight.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)[:, None, None]
    weight = torch.where(
        mean > 0, weight / mean.where(mean > 0, torch.ones_like(mean)), torch.eye(size).to(weight)
    )
    diagonal = weight.diagonal(dim1=-2, dim2=-1)
    floor = torch.finfo(torch.float32).eps  # coordinates that do not influence the loss
    weight = weight + torch.diag_embed(_DAMPING * diagonal + floor)
    diagonal = weight.diagonal(dim1=-2, dim2=-1)
    if rank == 0:
        matrix, pivots = triangular_factor(weight)
        row, column = torch.tril_indices(size, size, -1, device=weight.device)
        entries, scale = _in_steps(matrix[:, row, column])
        return CompensationFactors(entries, scale, _shares(pivots), pivots / diagonal)
    root = diagonal.sqrt()
    factor = _factor(weight / (root[:, :, None] * root[:, None, :]), min(rank, size))
    factor = torch.nn.functional.pad(factor, (0, rank - factor.shape[-1]))
    entries, scale = _in_steps(factor.flatten(1))
    # After rounding, each coordinate must still have a positive uniqueness.
    stored = scale.double()[:, None, None] * entries.view(factor.shape).double()
    most = stored.square().sum(-1).amax(-1)
    scale = (scale * ((1 - _OWN) / most.clamp(min=1 - _OWN)).sqrt()).float()
    share = _shares(diagonal).clamp(min=torch.finfo(torch.float16).smallest_normal)
    matrix, _ = triangular_factor(error_weight_matrix(entries, scale, share, rank))
    # A rounding error of coordinate i becomes an error of all coordinates that compensate for it.
    spread = torch.linalg.solve_triangular(
        matrix, torch.eye(size).to(weight).expand_as(weight), upper=False, unitriangular=True
    )
    cost = (spread * (weight @ spread)).sum(-2)
    return CompensationFactors(entries, scale, share, cost / diagonal)


def _in_steps(entries: Tensor) -> tuple[Tensor, Tensor]:
    """Entries ``[H, n]`` as multiples of their head's scale: int8 ``[H, n]`` and float32 ``[H]``."""
    largest = entries.abs().amax(-1) if entries.shape[-1] else entries.new_zeros(len(entries))
    scale = (largest / _INT8).float()
    steps = entries / scale.double().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return steps.round().clamp(-_INT8, _INT8).to(torch.int8), scale


def _shares(weight: Tensor) -> Tensor:
    """Weights relative to the largest of each head, ``[H, D]``, as stored."""
    return (weight / weight.amax(-1, keepdim=True)).half()


def _factor(correlation: Tensor, rank: int) -> Tensor:
    """The factor ``[H, D, rank]`` that best approximates the correlations ``[H, D, D]`` outside the diagonal.

    Maximum-likelihood factor analysis (Jöreskog, 1967), by a few rounds of its fixed point: the correlations are scaled
    by the uniquenesses, and the eigenvectors of their largest eigenvalues above 1 give the common factors.
    """
    own = torch.full_like(correlation[..., 0], 0.5)
    factor = correlation[..., :rank]
    for _ in range(_ROUNDS):
        root = own.sqrt()
        values, vectors = torch.linalg.eigh(correlation / (root[:, :, None] * root[:, None, :]))
        common = (values[:, -rank:] - 1).clamp(min=0).sqrt()
        factor = root[:, :, None] * vectors[:, :, -rank:] * common[:, None, :]
        own = (1 - factor.square().sum(-1)).clamp(min=_OWN)
    return factor
