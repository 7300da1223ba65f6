"""Softmax over segments of slots that are processed one after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvq_calib.runtime.visibility import AttentionRequest

__all__ = ["OnlineSoftmax"]

#: Below every score, and finite, so that differences of running maxima are never NaN.
_FLOOR = -1e30


class OnlineSoftmax:
    """Online softmax over segments of slots.

    Args:
        request: the queries.
        heads: number of key-value heads ``H``; ``Hq / H`` query heads share one.
        size: number of channels of a value, ``D``.
    """

    def __init__(self, request: AttentionRequest, heads: int, size: int) -> None:
        query = request.query
        batch, query_heads, tokens, _ = query.shape
        self.request = request
        self.shape = (batch, heads, query_heads // heads, tokens)
        rows = (batch, heads, query_heads // heads * tokens, 1)
        if request.sinks is None:
            self.highest = torch.full(rows, _FLOOR, device=query.device)
            self.total = torch.zeros(rows, device=query.device)
        else:
            sinks = request.sinks.float().view(1, heads, -1, 1).expand(self.shape)
            self.highest = sinks.reshape(rows).clamp(min=_FLOOR)
            self.total = torch.ones(rows, device=query.device)
        self.mixed = torch.zeros(*rows[:3], size, device=query.device)
        #: The sum over packed values; separate if they come without their scales.
        self.mixed_packed = self.mixed
        #: The weights of that sum.
        self.total_packed = self.total

    def split_packed(self) -> None:
        """From now on, sum packed values separately from exact ones."""
        self.mixed_packed = self.mixed.clone()
        self.total_packed = torch.zeros_like(self.total)

    def add(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, packed: bool) -> None:
        """Attend to a segment.

        Args:
            query: float32 ``[B, H, G * T, Dk]``.
            keys, values: float32 ``[B, H, Dk, S]`` and ``[B, H, D, S]``.
            mask: additive, broadcastable to ``[B, Hq, T, S]``; or ``None``.
            packed: whether the values belong to the packed sum.
        """
        scores = query @ keys
        if self.request.softcap is not None:
            scores.div_(self.request.softcap).tanh_().mul_(self.request.softcap)
        if mask is not None:
            by_group = scores.view(*self.shape, -1)
            if mask.shape[1] == 1:
                by_group += mask[:, :, None]
            else:
                by_group += mask.view(len(mask), *self.shape[1:3], *mask.shape[2:])
        highest = torch.maximum(self.highest, scores.amax(-1, keepdim=True))
        weights = scores.sub_(highest).exp_()
        shrink = (self.highest - highest).exp_()
        self.highest = highest
        weight = weights.sum(-1, keepdim=True)
        self.total.mul_(shrink).add_(weight)
        self.mixed.mul_(shrink)
        if self.mixed_packed is not self.mixed:
            self.mixed_packed.mul_(shrink)
            self.total_packed.mul_(shrink)
            if packed:
                self.total_packed.add_(weight)
        (self.mixed_packed if packed else self.mixed).add_(weights @ values.mT)

    def result(self, finish: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The attention output, ``[B, T, Hq, D]``, contiguous, in the dtype of the query; zero if nothing was visible.

        Args:
            finish: converts the packed sum and its weights to values, if it was separate.
        """
        mixed = self.mixed
        if self.mixed_packed is not mixed:
            mixed = mixed + finish(self.mixed_packed, self.total_packed)
        mixed = mixed / self.total.clamp(min=torch.finfo(torch.float32).tiny)
        by_token = mixed.view(*self.shape, -1).flatten(1, 2).transpose(1, 2)
        return by_token.to(self.request.query.dtype).contiguous()
