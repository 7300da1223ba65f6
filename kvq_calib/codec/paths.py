"""Trellis-coded quantization: twice the levels for the same bits.

Codes of ``b`` bits select among ``2 ** (b + 1)`` levels. The lowest bits of the two codes before a token determine
which half of the levels it may use. So the encoder chooses a *path* through 32 tokens instead of 32 nearest levels.
This is Ungerboeck's four-state trellis (IEEE Trans. Inf. Theory 28, 1982) as used for sources by Marcellin and Fischer
(IEEE Trans. Commun. 38, 1990). For each channel, let ``u[t]`` be the lowest bit of the code of token ``t`` of a block,
and 0 before the block::

    level index[t] = 4 * (code[t] >> 1) + 2 * (u[t] ^ u[t - 2]) + u[t - 1]

So reading needs three bit operations more than a look-up of levels. The work is in the encoder, which finds the path of
least squared error with Viterbi's algorithm. A block starts in a known state and may end in any, so nothing is stored
beside the codes, and blocks are independent.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from kvq_calib.codec.packing import BLOCK_TOKENS

__all__ = ["Subsets", "best_path", "level_index"]


def level_index(codes: Tensor) -> Tensor:
    """The index of the level that each code stands for.

    Args:
        codes: integers ``[..., T]``, tokens in order, starting with the first of a block.

    Returns:
        The same dtype and shape.
    """
    free = codes & 1
    before, long_before = torch.zeros_like(free), torch.zeros_like(free)
    before[..., 1:], long_before[..., 2:] = free[..., :-1], free[..., :-2]
    # A block starts in a known state.
    before[..., ::BLOCK_TOKENS] = 0
    long_before[..., ::BLOCK_TOKENS] = 0
    long_before[..., 1::BLOCK_TOKENS] = 0
    return ((codes >> 1) << 2) | ((free ^ long_before) << 1) | before


@dataclass(frozen=True)
class Subsets:
    """The levels of ``C`` channels, prepared for :func:`best_path`.

    The four subsets are ``levels[:, s::4]``. One search in the boundaries of all subsets together gives the *rank* of a
    number, from which follows the nearest level in each subset.

    Attributes:
        boundaries: float32 ``[C, R]``, sorted in each row.
        nearest: float32 ``[C, 4, R + 1]``, the nearest level of each subset for each rank.
        place: int64 ``[C, 4 (R + 1)]``, the index of that level in the subset.
        empty: bool ``[C]``, channels of width 0.
    """

    boundaries: Tensor
    nearest: Tensor
    place: Tensor
    empty: Tensor

    @classmethod
    def of(cls, levels: Tensor, bits: Tensor) -> Subsets:
        """Prepare the levels of some channels.

        Args:
            levels: float32 ``[C, L]``, sorted in each row; the first ``2 ** (bits + 1)`` are used.
            bits: integer ``[C]``, the widths.
        """
        if levels.shape[1] < 4:  # every channel has width 0
            levels = levels[:, :1].expand(-1, 4)
        subsets = levels.unflatten(1, (-1, 4)).mT  # [C, 4, L / 4]
        boundaries = (subsets[..., :-1] + subsets[..., 1:]) * 0.5
        used = (1 << bits.to(torch.int64)) >> 1
        unused = torch.arange(1, subsets.shape[-1], device=levels.device) >= used[:, None]
        boundaries = boundaries.masked_fill(unused[:, None], torch.inf).flatten(1)
        boundaries, order = boundaries.sort(dim=1)
        owner = order[:, None] // max(subsets.shape[-1] - 1, 1)
        own = owner == torch.arange(4, device=levels.device)[:, None]
        place = torch.nn.functional.pad(own.cumsum(-1), (1, 0))
        return cls(boundaries, subsets.gather(-1, place), place.flatten(1), bits == 0)

    def split(self, channels: int) -> list[Subsets]:
        """Parts of at most so many channels."""
        parts = (getattr(self, f.name).split(channels) for f in fields(self))
        return [Subsets(*part) for part in zip(*parts, strict=True)]


@lru_cache
@torch.inference_mode(False)  # the tables are kept beyond an inference mode in which they may be made
def _pair_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The subsets of two successive tokens on the only way between two states, int64.

    Returns:
        The subsets of the first and of the second token, ``[2, 16]``, at index ``4 * before + after``; and the same as
        ``[16, 2]``, with 4 times the lowest bits of the codes added.
    """
    state = torch.arange(4)
    last, long_ago = (state & 1)[:, None], (state >> 1)[:, None]
    now, between = state & 1, state >> 1
    subsets = torch.stack((2 * (between ^ long_ago) + last, 2 * (now ^ last) + between)).flatten(1)
    free = torch.stack((between, now)).repeat(1, 4)
    return subsets.to(device), (subsets + 4 * free).T.contiguous().to(device)


def best_path(subsets: Subsets, u: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes of the path through the trellis with the least squared error, weighted if ``weight`` is given.

    A state is ``u[t] + 2 u[t - 1]``. There is exactly one way of two tokens from any state to any other, so Viterbi's
    algorithm takes two tokens at a time. It adds the sum of their two squares to the cost of each state, in float32
    with every operation rounded. Ties go to the predecessor, and at the end to the state, with the lower number.

    Args:
        subsets: the levels of the channels.
        u: float32 ``[C, B, T]``, tokens in order, starting with the first of a block.
        weight: float32 ``[C, B, T]``, not negative, weights of the squares; only ratios within a block matter.

    Returns:
        The codes, uint8 ``[C, B, T]``, 0 for channels of width 0; and ``level_index(codes)``, int64.
    """
    channels, batch, tokens = u.shape
    rank = torch.searchsorted(subsets.boundaries, u.flatten(1).contiguous())
    distance = u.flatten(1)[:, None] - subsets.nearest.gather(-1, rank[:, None].expand(-1, 4, -1))
    distance = distance * distance
    if weight is not None:
        distance = distance * weight.flatten(1)[:, None]
    # Missing tokens cost nothing, so they do not influence the path.
    distance = torch.nn.functional.pad(
        distance.view(channels, 4, batch, tokens), (0, -tokens % BLOCK_TOKENS)
    ).transpose(0, 1)
    first, second = distance.reshape(4, -1, BLOCK_TOKENS // 2, 2).permute(3, 0, 2, 1).contiguous()
    of_pair, steps_of_pair = _pair_tables(u.device)
    pair = first.index_select(0, of_pair[0]) + second.index_select(0, of_pair[1])  # [16, 16, N]
    cost = torch.full_like(first[:, 0], torch.inf)
    cost[0] = 0
    # ``amin`` is much faster than ``min`` with indices, so the best predecessors of all steps are found at once.
    other = []  # for every two tokens: whether a way into a state is not the best
    for step in pair.unflatten(0, (4, 4)).unbind(2):
        ways = step + cost[:, None]
        cost = ways.amin(0)
        other.append(ways != cost)
    states = [cost.min(0, keepdim=True).indices]
    worse = torch.stack(other[1:]).unbind(1)
    worse_too = worse[0] & worse[1]
    best = worse[0].to(torch.int64) + worse_too + (worse_too & worse[2])
    for before in best.flip(0).unbind():
        states.append(before.gather(0, states[-1]))
    states.append(torch.zeros_like(states[0]))
    ends = torch.cat(states[::-1])  # [17, N]
    steps = steps_of_pair[4 * ends[:-1] + ends[1:]]
    steps = steps.transpose(0, 1).reshape(channels, batch, -1)[..., :tokens]
    subset, free = steps & 3, steps >> 2
    place = subsets.place.gather(1, subset.flatten(1) * subsets.nearest.shape[-1] + rank).view_as(free)
    empty = subsets.empty[:, None, None]
    codes = (place << 1 | free).masked_fill(empty, 0)
    return codes.to(torch.uint8), (place << 2 | subset).masked_fill(empty, 0)
