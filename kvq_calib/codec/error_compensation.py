"""Error compensation: rounding errors of a head's coordinates that make good for each other.

Errors ``e`` of a head are taken to cost ``e^T W e``. With ``W = M^T D M``, ``M`` unit lower triangular and ``D``
diagonal, coordinate ``i`` is coded as ``t[i] = y[i] + sum over j < i of (M - I)[i, j] (y[j] - y'[j])``: what is left
to weigh are the rounding errors ``t - y' = M e`` alone, by ``D``. (The rounding of GPTQ, arXiv 2210.17323, and QuIP,
arXiv 2307.13304, applied to the cache.) The coordinates coded first know nothing of the errors to come, so each may be
coded again, given the errors that all others have by then: coordinate descent on the same weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Compensation", "error_weight_matrix", "matrix_of_entries", "triangular_factor"]


def matrix_of_entries(entries: Tensor, step: Tensor, size: int) -> Tensor:
    """Strictly lower triangular matrices from what is stored.

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
    """The weight ``W`` of the errors of each head as it is stored.

    Args:
        entries, step: int8 ``[H, n]`` and float32 ``[H]``.
        weight: float16 ``[H, D]``.
        rank: 0 where ``W = M^T D M``, with ``M`` the matrix of ``entries`` with ones on its diagonal and ``D`` of
            ``weight``; otherwise the correlations are those of a factor ``F [D, rank]``, the square roots of
            ``weight`` their units: ``W = S (I - diag(F F^T) + F F^T) S``.

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
    """``M`` unit lower triangular and ``D`` of ``W = M^T diag(D) M``: ``[H, D, D]`` and ``[H, D]`` of ``[H, D, D]``."""
    # Coordinates in reverse turn Cholesky's W = C C^T into one with C upper triangular.
    upper = torch.linalg.cholesky(weight.flip(-1, -2)).flip(-1, -2)
    root = upper.diagonal(dim1=-2, dim2=-1)
    return (upper / root[:, None, :]).mT, root.square()


@dataclass(frozen=True)
class Compensation:
    """What coordinates take up of the errors of others; float32 ``[H, D, D]`` each, row ``i`` is coordinate ``i``'s.

    Attributes:
        shares: of the earlier coordinates' errors, in the first pass; zero from the diagonal on.
        refinement_shares: of all other coordinates' errors, in the passes after it, zero on the diagonal: with the
            weight ``W``, ``W[i, j] / W[i, i]``, for what the other errors ``e[j]`` cost together with ``e[i]`` is
            least where ``e[i]`` makes good for this sum of theirs. ``None`` where there are none.
        refinement_passes: how many.
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
        """From what is stored, see :func:`error_weight_matrix`.

        Args:
            entries, step, weight: ``weight`` is needed for a rank or for refinement passes.
            rank, refinement_passes: of the spec.
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
        """Everything held."""
        return [tensor for tensor in (self.shares, self.refinement_shares) if tensor is not None]

    def apply(self, y: Tensor, code: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Code all coordinates of heads.

        Sums run from ``j = 0`` on, products and sums rounded one by one; in a refinement pass that of the coordinates
        after ``i`` comes first and is added to ``y[i]`` as a whole.

        Args:
            y: float32 ``[D, H, B, T]``.
            code: codes coordinate ``i``, given what of it is to be coded ``[H, B, T]``, and returns what a reader sees
                of it, float32 ``[H, B, T]``; called for every coordinate in every pass.

        Returns:
            What was coded in the last pass, float32 ``[D, H, B, T]``.
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
