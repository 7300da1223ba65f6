"""Trellis-coded quantization: twice the levels for the same bits.

Codes of ``b`` bits select among ``2 ** (b + 1)`` levels. Which half of them a token may use follows from the lowest bits of
the two codes before it, so the encoder chooses a *path* of 32 tokens instead of 32 nearest levels: Ungerboeck's
four-state trellis (IEEE Trans. Inf. Theory 28, 1982) as used for sources by Marcellin and Fischer (IEEE Trans. Commun.
38, 1990). Per channel, with ``u[t]`` the lowest bit of the code of token ``t`` of a block and ``u[t] = 0`` before it::

    level index[t] = 4 * (code[t] >> 1) + 2 * (u[t] ^ u[t - 2]) + u[t - 1]

Reading is therefore three bit operations and the look-up there was before; the work is in the encoder, which finds the
path of least squared error with Viterbi's algorithm. A block starts in a known state and ends in any, so no bit is
stored beside the codes, and blocks stay independent of each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_calib.packing import BLOCK_TOKENS

__all__ = ["best_path", "level_index", "lowest_bits_before", "pair_index"]


def level_index(codes: Tensor) -> Tensor:
    """Which level each code stands for.

    Args:
        codes: integers ``[..., T]``, tokens in order from the first of a block on.

    Returns:
        The same dtype and shape.
    """
    free = codes & 1
    before, long_before = torch.zeros_like(free), torch.zeros_like(free)
    before[..., 1:], long_before[..., 2:] = free[..., :-1], free[..., :-2]
    place = torch.arange(codes.shape[-1], device=codes.device) % BLOCK_TOKENS
    before = before.masked_fill(place < 1, 0)
    long_before = long_before.masked_fill(place < 2, 0)
    return ((codes >> 1) << 2) | ((free ^ long_before) << 1) | before


def pair_index(width: int) -> Tensor:
    """Level indices of the two tokens whose codes share a byte, a nibble each.

    Args:
        width: of the codes, 1 to 4; bits of a nibble above are not looked at.

    Returns:
        int64 ``[1024, 2]``; row ``256 * before + byte``, with ``before`` of :func:`lowest_bits_before`.
    """
    row = torch.arange(1024)
    mask = (1 << width) - 1
    codes = torch.stack((row >> 8 & 1, row >> 9, row & mask, row >> 4 & mask), dim=-1)
    return level_index(codes)[:, 2:]


def lowest_bits_before(data: Tensor) -> Tensor:
    """Of the two codes before each pair, those of tokens ``t - 2`` and ``t - 1``, as bits 0 and 1.

    Args:
        data: uint8 ``[..., 16]``, the bytes of blocks as :func:`kvq_calib.packing.slice_bytes` returns them, tokens in
            order.

    Returns:
        The same dtype and shape.
    """
    free = data & 0x11
    free |= free >> 3
    free &= 3
    before = torch.empty_like(free)
    before.view(-1)[1:] = free.view(-1)[:-1]
    before[..., 0] = 0
    return before


def _nearest_in_subsets(levels: Tensor, bits: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest level of each of the four subsets ``levels[:, s::4]``, for ``u [C, n]``.

    One search in the boundaries of all subsets together says where ``u`` stands in each of them.

    Returns:
        Squared distance, float32 ``[C, 4, n]``; rank among all boundaries, int64 ``[C, n]``; and the place in a subset that
        each rank means, int64 ``[C, 4, ranks]``.
    """
    if levels.shape[1] < 4:  # every channel has width 0
        levels = levels[:, :1].expand(-1, 4)
    subsets = levels.unflatten(1, (-1, 4)).mT  # [C, 4, L / 4]
    boundaries = (subsets[..., :-1] + subsets[..., 1:]) * 0.5
    used = (1 << bits.to(torch.int64)) >> 1
    unused = torch.arange(1, subsets.shape[-1], device=u.device) >= used[:, None]
    boundaries = boundaries.masked_fill(unused[:, None], torch.inf).flatten(1)
    boundaries, order = boundaries.sort(dim=1)
    owner = order[:, None] // max(subsets.shape[-1] - 1, 1) == torch.arange(4, device=u.device)[:, None]
    place = torch.nn.functional.pad(owner.cumsum(-1), (1, 0))
    rank = torch.searchsorted(boundaries, u)
    distance = u[:, None] - subsets.gather(-1, place).gather(-1, rank[:, None].expand(-1, 4, -1))
    return distance * distance, rank, place


def _pair_subsets() -> tuple[list[int], list[int]]:
    """Subsets of two successive tokens on the only way between two states, ``[before * 4 + after]`` each."""
    first, second = [], []
    for before in range(4):
        for after in range(4):
            last, long_ago = before & 1, before >> 1
            now, between = after & 1, after >> 1
            first.append(2 * (between ^ long_ago) + last)
            second.append(2 * (now ^ last) + between)
    return first, second


def best_path(levels: Tensor, bits: Tensor, u: Tensor, weight: Tensor | None = None) -> Tensor:
    """Codes whose path through the trellis has the least squared error, or the least weighted one.

    A state is ``u[t] + 2 u[t - 1]``. Two tokens lead from any state to any other in one way, so Viterbi's algorithm takes
    them two at a time: to the cost of each state the sum of the two squares is added, in float32, every operation rounded.
    Ties go to the predecessor, and in the end to the state, of the lower number.

    Args:
        levels: float32 ``[C, L]``, sorted in each row; the first ``2 ** (bits + 1)`` of a row are used.
        bits: integer ``[C]``, widths of the codes; a channel of width 0 gets code 0.
        u: float32 ``[C, B, T]``, on the scale of the levels, tokens in order from the first of a block on.
        weight: float32 ``[C, B, T]``, not negative, of the squares; only their proportions within a block matter.

    Returns:
        uint8 ``[C, B, T]``.
    """
    channels, batch, tokens = u.shape
    distance, rank, place = _nearest_in_subsets(levels, bits, u.flatten(1).contiguous())
    if weight is not None:
        distance = distance * weight.flatten(1)[:, None]
    # Tokens that are not there cost nothing, so they leave the choice of the path to those that are.
    distance = torch.nn.functional.pad(
        distance.view(channels, 4, batch, tokens), (0, -tokens % BLOCK_TOKENS)
    ).transpose(0, 1)
    first, second = distance.reshape(4, -1, BLOCK_TOKENS // 2, 2).permute(3, 2, 0, 1)  # [16, 4, N] each
    subsets = _pair_subsets()
    pair = (first[:, subsets[0]] + second[:, subsets[1]]).unflatten(1, (4, 4))
    cost = torch.full_like(first[0], torch.inf)
    cost[0] = 0
    best = []  # per two tokens the state before that leads best into each state
    for step in pair:
        cost, before = (step + cost[:, None]).min(0)
        best.append(before)
    states = [cost.min(0, keepdim=True).indices]
    for before in reversed(best[1:]):
        states.append(before.gather(0, states[-1]))
    ends = torch.cat(states[::-1])  # [16, N]
    free = torch.stack((ends >> 1, ends & 1), -1).transpose(0, 1).reshape(channels, batch, -1)[..., :tokens]
    subset = (level_index(free) & 3).flatten(1)
    codes = place.flatten(1).gather(1, subset * place.shape[-1] + rank).view_as(free) << 1 | free
    return codes.masked_fill((bits == 0)[:, None, None], 0).to(torch.uint8)
