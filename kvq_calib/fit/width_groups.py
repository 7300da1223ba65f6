"""Groups of channels that share a width, so that a kernel reads one width at a time.

A vector register or a warp reads several channels at once, and code for one width is faster than code for any width. So
widths are chosen for groups of channels of one head. A group of values has eight channels. A group of keys has four
RoPE pairs, whose first channels have one width, and whose second channels have the same or the next, or any width if
the first have no bits. Channels with similar errors are grouped, and regrouped when their widths are known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kvq_calib.fit.allocation import Choices

__all__ = ["WidthGroups", "channel_groups", "pair_groups"]

_PAIRS, _CHANNELS = 4, 8
#: Channels are sorted by their error at this width.
_COMPARED_AT = 2


@dataclass(frozen=True)
class WidthGroups:
    """Groups of channels, and the possible widths of a group.

    Attributes:
        members: channels, int64 ``[G, P, n]``: each group has ``P`` parts of ``n``, and each head as many groups.
        choices: the widths of the parts, int64 ``[K, P]``.
        heads: number of heads.
    """

    members: Tensor
    choices: Tensor
    heads: int

    def options(self, errors: Tensor, tokens: int) -> Choices:
        """The choices of the groups.

        Args:
            errors: error of every channel at every width, float64 ``[C, widths]``.
            tokens: number of tokens in the cache.
        """
        parts = errors[self.members].sum(2)
        cost = parts[:, torch.arange(parts.shape[1]), self.choices].sum(2)
        return Choices(cost, self.members.shape[2] * self.choices.sum(1), self.members.numel(), tokens)

    def widths(self, chosen: Tensor) -> Tensor:
        """The widths of all channels, uint8 ``[C]``, from the choices of the groups, int64 ``[G]``."""
        found = torch.empty(self.members.numel(), dtype=torch.uint8)
        found[self.members] = self.choices[chosen][..., None].expand_as(self.members).to(torch.uint8)
        return found

    def regrouped(self, widths: Tensor, errors: Tensor) -> WidthGroups:
        """The groups with the least error if each keeps its widths, and channels or pairs change places within a head.

        Args:
            widths: of all channels, uint8 ``[C]``, as :meth:`widths` returns them.
            errors: error of every channel at every width, float64 ``[C, widths]``.
        """
        size = self.members.shape[2]
        places = widths[self.members[..., 0]].to(torch.int64).unflatten(0, (self.heads, -1))
        together: Tensor = self.members.mT.unflatten(0, (self.heads, -1)).flatten(1, 2)  # [H, N, P]
        found = []
        for own, parts in zip(places, together, strict=True):
            cost = errors[parts[:, None], own].sum(-1).repeat_interleave(size, 1)
            # In float32, so that the last bits of statistics do not choose between equal solutions.
            taken = torch.from_numpy(linear_sum_assignment(cost.T.float().numpy())[1])
            found.append(parts[taken].unflatten(0, (-1, size)))
        return replace(self, members=torch.cat(found).mT.contiguous())


def channel_groups(errors: Tensor, heads: int, floor: int) -> WidthGroups:
    """Groups of up to eight channels.

    Args:
        errors: error of every channel at every width, float64 ``[C, widths]``.
        heads: number of heads.
        floor: smallest width.
    """
    channels = torch.arange(len(errors)).view(heads, -1, 1)
    choices = torch.arange(floor, errors.shape[1])[:, None]
    return _grouped(channels, errors, _CHANNELS, choices)


def pair_groups(errors: Tensor, heads: int, pairs: Sequence[tuple[int, int]], floor: int) -> WidthGroups:
    """Groups of up to four RoPE pairs. Of each pair, the channel that needs fewer bits comes first.

    Args:
        errors: error of every channel at every width, float64 ``[C, widths]``.
        heads: number of heads.
        pairs: the channels of a head in pairs.
        floor: smallest width.
    """
    size = len(errors) // heads
    both = torch.tensor(pairs) + size * torch.arange(heads)[:, None, None]
    easier = _compared(errors)[both].argsort(dim=-1, stable=True)
    widths = range(floor, errors.shape[1])
    choices = [(a, b) for a in widths for b in widths if b in (a, a + 1) or a == 0]
    return _grouped(both.gather(-1, easier), errors, _PAIRS, torch.tensor(choices))


def _compared(errors: Tensor) -> Tensor:
    return errors[:, min(_COMPARED_AT, errors.shape[1] - 1)]


def _grouped(parts: Tensor, errors: Tensor, size: int, choices: Tensor) -> WidthGroups:
    """Groups from channels ``[H, N, P]`` sorted by error, ``size`` of a head if that divides their number."""
    order = _compared(errors)[parts].sum(-1).argsort(dim=1, stable=True)
    ordered = parts.gather(1, order[..., None].expand_as(parts))
    groups = ordered.unflatten(1, (-1, math.gcd(parts.shape[1], size))).flatten(0, 1)
    return WidthGroups(groups.mT.contiguous(), choices, len(parts))
