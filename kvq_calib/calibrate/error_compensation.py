"""Error compensation: which share of its errors a coordinate hands on to those that are coded after it.

The loss sees an error ``e`` of a head through ``e^T W e``, with ``W`` the mean outer product of the gradients. Where
gradients of two coordinates are correlated, a second error can make good for a first. With ``W = M^T D M``, ``M``
unit lower triangular and ``D`` diagonal, coordinate ``i`` takes up ``sum over j < i of M[i, j] e[j]``, and only the
rounding errors are left, weighed by ``D`` (the argument of GPTQ, arXiv 2210.17323, and QuIP, arXiv 2307.13304, for
weights). ``D`` is never above the diagonal of ``W``, and a reader of the cache has nothing to do.

``M`` has as many entries as half the square of the head's size. Where that is too much to store, ``W`` is taken as
``S (I - diag(F F^T) + F F^T) S``, ``S`` diagonal and ``F`` of few columns (factor analysis of the correlations), and
``M`` follows from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kvq_calib.calibrate.statistics import Reduction, Statistics
from kvq_calib.codec.error_compensation import error_weight_matrix, triangular_factor

__all__ = ["CompensationFactors", "GradientCovariance", "compensation_factors"]

#: Added to the diagonal, as a share of it: entries follow what many tokens agree on.
_DAMPING = 0.03
_INT8 = 127
#: Rounds of factor analysis, and what of a coordinate at least is its own.
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
        """Add gradients, float ``[N, C]`` on the CPU, of values as they are to be quantized."""
        heads, head_dim, _ = self.sums.shape
        split = gradient.unflatten(1, (heads, head_dim)).transpose(0, 1).double()
        self.sums += split.mT @ split


class CompensationFactors(NamedTuple):
    """What is stored for each head, and what it brings.

    Attributes:
        entries: int8 ``[H, n]``, of the matrix below its diagonal or of the factor, in steps of ``scale``.
        scale: float32 ``[H]``.
        weight: float16 ``[H, D]``, what a rounding error of each coordinate costs.
        left: what compensation leaves of the weight of each coordinate's rounding error, in (0, 1] on average over a
            head in logarithms, float64 ``[H, D]``.
    """

    entries: Tensor
    scale: Tensor
    weight: Tensor
    left: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all heads, ``weight`` included, which the matrix needs for refinement passes alone."""
        return self.entries.nbytes + self.scale.nbytes + self.weight.nbytes


def compensation_factors(weight: Tensor, rank: int = 0) -> CompensationFactors:
    """Factor the weights of the errors of all heads, float64 ``[H, D, D]``, symmetric and positive semidefinite.

    Args:
        weight: of the errors.
        rank: columns of the factor that is stored, or 0 for all of the matrix.
    """
    size = weight.shape[-1]
    diagonal = weight.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)[:, None, None]
    weight = torch.where(
        mean > 0, weight / mean.where(mean > 0, torch.ones_like(mean)), torch.eye(size).to(weight)
    )
    diagonal = weight.diagonal(dim1=-2, dim2=-1)
    floor = torch.finfo(torch.float32).eps  # coordinates that nothing depends on
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
    # Rounding must leave each coordinate something of its own.
    stored = scale.double()[:, None, None] * entries.view(factor.shape).double()
    most = stored.square().sum(-1).amax(-1)
    scale = (scale * ((1 - _OWN) / most.clamp(min=1 - _OWN)).sqrt()).float()
    share = _shares(diagonal).clamp(min=torch.finfo(torch.float16).smallest_normal)
    matrix, _ = triangular_factor(error_weight_matrix(entries, scale, share, rank))
    # A rounding error of coordinate i is an error of all that takes it up.
    spread = torch.linalg.solve_triangular(
        matrix, torch.eye(size).to(weight).expand_as(weight), upper=False, unitriangular=True
    )
    cost = (spread * (weight @ spread)).sum(-2)
    return CompensationFactors(entries, scale, share, cost / diagonal)


def _in_steps(entries: Tensor) -> tuple[Tensor, Tensor]:
    """Entries ``[H, n]`` in whole steps of their head's scale: int8 ``[H, n]`` and float32 ``[H]``."""
    largest = entries.abs().amax(-1) if entries.shape[-1] else entries.new_zeros(len(entries))
    scale = (largest / _INT8).float()
    steps = entries / scale.double().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return steps.round().clamp(-_INT8, _INT8).to(torch.int8), scale


def _shares(weight: Tensor) -> Tensor:
    """Of the largest of each head, ``[H, D]``, as they are stored."""
    return (weight / weight.amax(-1, keepdim=True)).half()


def _factor(correlation: Tensor, rank: int) -> Tensor:
    """Columns whose outer products come closest to correlations ``[H, D, D]`` beside the diagonal, ``[H, D, rank]``.

    Factor analysis by maximum likelihood (Jöreskog, 1967), a few rounds of its fixed point: what a coordinate has of
    its own scales the correlations, whose largest eigenvalues beyond 1 are what coordinates have in common.
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
