"""Error compensation: the coding of a coordinate takes the errors of the head's other coordinates into account.

The cost of a head's errors ``e`` is modelled as ``e^T W e``. Let ``W = M^T D M``, with ``M`` unit lower triangular and
``D`` diagonal. Coordinate ``i`` is coded as ``t[i] = y[i] + sum over j < i of (M - I)[i, j] (y[j] - y'[j])``. Then the
cost is that of the rounding errors ``t - y' = M e`` alone, weighted by ``D``. This is the rounding of GPTQ (arXiv
2210.17323) and QuIP (arXiv 2307.13304), applied to the cache. Coordinates that are coded first do not know the later
errors. So each may be coded again, with the errors of all others known: coordinate descent on the same cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Compensation", "error_weight_matrix", "matrix_of_entries", "triangular_factor"]


def matrix_of_entries(entries: Tensor, step: Tensor, size: int) -> Tensor:
    """Strictly lower triangular matrices from their stored entries.

    Args:
        entries: int8 ``[H, D (D - 1) / 2]``, row by row.
        step: float32 ``[H]``.
        size: ``D``.

    Returns:
        float32 ``[H, D, D]``.
    """
    row, column = torch.tril_indices(size, size, -1, device=entries.device)
    matrix = step.new_zeros(len(entries), size, size)
    matrix[:, row, column] = step[:, None] * entries.float()
    return matrix


def error_weight_matrix(entries: Tensor, step: Tensor, weight: Tensor, rank: int) -> Tensor:
    """The weight ``W`` of the errors of each head, from its stored form.

    Args:
        entries, step: int8 ``[H, n]`` and float32 ``[H]``.
        weight: float16 ``[H, D]``.
        rank: with 0, ``W = M^T D M``, where ``M`` is the matrix of ``entries`` with ones on its diagonal, and ``D`` the
            diagonal matrix of ``weight``. Otherwise ``entries`` is a factor ``F [D, rank]`` of the correlations, and
            ``S`` the diagonal matrix of the square roots of ``weight``: ``W = S (I - diag(F F^T) + F F^T) S``.

    Returns:
        float64 ``[H, D, D]``.
    """
    heads, size = weight.shape
    if rank == 0:
        unit = matrix_of_entries(entries, step, size).double()
        unit.diagonal(dim1=1, dim2=2).fill_(1.0)
        return unit.mT @ (weight.double()[..., None] * unit)
    factor = step.double()[:, None, None] * entries.view(heads, size, rank).double()
    correlation = factor @ factor.mT
    correlation.diagonal(dim1=1, dim2=2).fill_(1.0)
    root = weight.double().sqrt()
    return root[:, :, None] * correlation * root[:, None, :]


def triangular_factor(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Factor ``W = M^T diag(D) M``: ``M`` unit lower triangular ``[H, D, D]``, ``D [H, D]``, from ``[H, D, D]``."""
    # With the coordinates reversed, Cholesky's W = C C^T has an upper triangular C.
    upper = torch.linalg.cholesky(weight.flip(-1, -2)).flip(-1, -2)
    root = upper.diagonal(dim1=-2, dim2=-1)
    return (upper / root[:, None, :]).mT, root.square()


@dataclass(frozen=True)
class Compensation:
    """How the errors of other coordinates enter each coordinate: float32 ``[H, D, D]``, row ``i`` for coordinate ``i``.

    Attributes:
        shares: factors of earlier coordinates' errors in the first pass; zero on and above the diagonal.
        refinement_shares: factors of all other coordinates' errors in refinement passes; zero on the diagonal. They
            are ``W[i, j] / W[i, i]``, since ``e^T W e`` is least where ``e[i]`` is minus the sum of these shares of the
            other errors. ``None`` without refinement passes.
        refinement_passes: number of refinement passes.
    """

    shares: Tensor
    refinement_shares: Tensor | None
    refinement_passes: int

    @classmethod
    def of(
        cls,
        entries: Tensor,
        step: Tensor,
        weight: Tensor | None,
        *,
        rank: int,
        refinement_passes: int,
        size: int,
    ) -> Compensation:
        """Make it from the stored tensors, see :func:`error_weight_matrix`.

        Args:
            entries, step, weight: the stored tensors; ``weight`` is needed with a rank or refinement passes.
            rank, refinement_passes: as in the spec.
            size: ``D``.
        """
        if weight is None:
            return cls(matrix_of_entries(entries, step, size), None, 0)
        whole = error_weight_matrix(entries, step, weight, rank)
        if rank == 0:
            shares = matrix_of_entries(entries, step, size)
        else:
            shares = triangular_factor(whole)[0].tril(-1).float()
        if refinement_passes == 0:
            return cls(shares, None, 0)
        diagonal = whole.diagonal(dim1=1, dim2=2)[..., None]
        refined = torch.where(diagonal > 0, whole / diagonal, 0.0)
        refined.diagonal(dim1=1, dim2=2).zero_()
        return cls(shares, refined.float(), refinement_passes)

    def tensors(self) -> list[Tensor]:
        """All tensors."""
        return [tensor for tensor in (self.shares, self.refinement_shares) if tensor is not None]

    def apply(self, y: Tensor, code: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Code all coordinates of heads.

        Sums run from ``j = 0`` on, and every product and sum is rounded. In a refinement pass, the sum over the
        coordinates after ``i`` is computed first and then added to ``y[i]``.

        Args:
            y: float32 ``[D, H, B, T]``.
            code: gets ``i`` and what to code of coordinate ``i``, ``[H, B, T]``, and returns the decoded numbers,
                float32 ``[H, B, T]``. It is called for every coordinate in every pass.

        Returns:
            The numbers that the last pass coded, float32 ``[D, H, B, T]``.
        """
        error = torch.zeros_like(y)

        def run(fed: Tensor, shares: Tensor) -> Tensor:
            for i in range(len(y)):
                error[i] = y[i] - code(i, fed[i])
                fed[i + 1 :] += shares[i, i + 1 :] * error[i]
            return fed

        fed = run(y.clone(), _by_source(self.shares))
        if self.refinement_shares is None:
            return fed
        shares = _by_source(self.refinement_shares)
        for _ in range(self.refinement_passes):
            later = torch.zeros_like(y)
            for j in range(1, len(y)):
                later[:j] += shares[j, :j] * error[j]
            fed = run(y + later, shares)
        return fed


def _by_source(shares: Tensor) -> Tensor:
    """``[H, to, from]`` to ``[from, to, H, 1, 1]``."""
    return shares.permute(2, 1, 0)[..., None, None].contiguous()
