"""A call of attention, and the slots that each of its queries may see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["AttentionRequest", "Visibility", "as_additive"]


@dataclass(frozen=True)
class Visibility:
    """The slots that each query may see.

    Attributes:
        mask: the model's mask. ``[B, 1 or Hq, T, S]``, bool (true is visible) or additive, for the last ``S`` slots; or
            ``[B, S]`` (nonzero is a real token), and causal; or ``None`` for causal.
        length: number of slots in use; the queries are the last ``tokens`` of them.
        tokens: ``T``.
        window: number of slots that a query sees, including its own, or ``None`` for all. It is only used if the mask
            is not four-dimensional, because such a mask includes it.
    """

    mask: Tensor | None
    length: int
    tokens: int
    window: int | None

    @property
    def first_slot(self) -> int:
        """The first slot that any query sees."""
        if self.mask is not None and self.mask.ndim == 4:
            first = self.length - self.mask.shape[-1]
        elif self.window is None:
            first = 0
        else:
            first = self.length - self.tokens - self.window + 1
        return max(first, 0)

    def real(self) -> Tensor | None:
        """Which of the new slots are tokens, not padding: bool ``[B or 1, T]``; ``None`` if all are."""
        if self.mask is None:
            return None
        if self.mask.ndim == 2:
            return self.mask[:, -self.tokens :] != 0
        own = self.mask[:, 0, :, -self.tokens :].diagonal(dim1=-2, dim2=-1)  # each query and itself
        return own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2

    def sees_all(self, low: int, high: int) -> bool:
        """Whether every query certainly sees slots ``low`` to ``high - 1``. Reads no tensor."""
        return (
            self.mask is None
            and high <= self.length - self.tokens + 1
            and (self.window is None or low > self.length - 1 - self.window)
        )

    def additive(self, slots: Tensor) -> Tensor:
        """The additive mask: float32, broadcastable to ``[B, Hq, T, S]``.

        Args:
            slots: int64 ``[S]`` or ``[B, S]``, -1 for "no such slot".
        """
        rows = slots if slots.ndim == 2 else slots[None]
        hidden = (rows < 0)[:, None, None]
        if self.mask is None or self.mask.ndim == 2:
            query = torch.arange(self.length - self.tokens, self.length, device=slots.device)[:, None]
            hidden = hidden | (rows[:, None, None] > query)
            if self.window is not None:
                hidden = hidden | (rows[:, None, None] <= query - self.window)
        if self.mask is None:
            return as_additive(~hidden)
        columns = rows - (self.length - self.mask.shape[-1])
        hidden = hidden | (columns < 0)[:, None, None]
        columns = columns.clamp(min=0)
        if len(rows) == 1:
            chosen = self.mask[..., columns[0]]
        else:
            shape = (*self.mask.shape[:-1], columns.shape[-1])
            index = columns.view(columns.shape[0], *[1] * (self.mask.ndim - 2), columns.shape[1])
            batch = max(self.mask.shape[0], len(columns))
            mask = self.mask.expand(batch, *self.mask.shape[1:])
            chosen = mask.gather(-1, index.expand(batch, *shape[1:]))
        if chosen.ndim == 2:
            chosen = (chosen != 0)[:, None, None]
        return as_additive(chosen).masked_fill(hidden, -torch.inf)

    def of_queries(self, slots: Tensor, queries: slice) -> Tensor:
        """The mask for some of the queries, ``[B, 1 or Hq, queries, S]``: bool (true is visible) or additive.

        Args:
            slots: int64 ``[B, S]``, -1 for "no such slot".
            queries: which of the ``T``.
        """
        mask = self.mask
        if mask is not None and mask.ndim == 4:
            part = Visibility(mask[:, :, queries], self.length, self.tokens, self.window)
            return part.additive(slots)
        start = self.length - self.tokens
        query = torch.arange(start, self.length, device=slots.device)[queries, None]
        seen = slots[:, None, None]
        visible = (seen >= 0) & (seen <= query)
        if self.window is not None:
            visible &= seen > query - self.window
        if mask is not None:
            columns = slots - (self.length - mask.shape[-1])
            real = (mask != 0).gather(-1, columns.clamp(min=0)) & (columns >= 0)
            visible &= real[:, None, None]
        return visible

    def of_one_token(self, slots: Tensor) -> Tensor:
        """Which of ``slots``, ``[S]`` or ``[B, S]``, the one new token of each sequence sees: bool ``[B or 1, S]``."""
        added = self.additive(slots)[:, 0, 0]
        mask = self.mask
        hidden = (
            -torch.inf
            if mask is None or mask.dtype == torch.bool or mask.ndim == 2
            else torch.finfo(mask.dtype).min / 2
        )
        return added > hidden


def as_additive(visible: Tensor) -> Tensor:
    """A mask in additive form, float32: for bool, 0 for true and minus infinity for false."""
    if visible.dtype != torch.bool:
        return visible.float()
    return torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -torch.inf)


@dataclass(frozen=True)
class AttentionRequest:
    """One call of the attention function.

    Attributes:
        query: ``[B, Hq, T, D]``, rotated, for the newest ``T`` slots.
        visibility: the slots that they see.
        scaling: factor on the scores.
        softcap: scores become ``softcap * tanh(score / softcap)``; ``None`` for no cap.
        sinks: ``[Hq]``, a logit per head that enters the softmax without a value (gpt-oss); or ``None``.
    """

    query: Tensor
    visibility: Visibility
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
