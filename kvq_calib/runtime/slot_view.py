"""Slots and masks in the form for the CUDA decode kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvq_calib.codec.packing import BLOCK_TOKENS, PAGE_BLOCKS
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.runtime.exact_tokens import ExactTokens
from kvq_calib.runtime.slots import SlotTable
from kvq_calib.runtime.visibility import Visibility

__all__ = ["MASKED", "DecodeContext", "SlotView"]

#: Position that means "not attended".
MASKED = -(2**31)
#: Number of steps that are cached.
MOST_STEPS = 4


@dataclass(frozen=True)
class DecodeContext:
    """What a decode step reads beside packed pages; the same for all layers that see the same slots.

    Attributes:
        blocks: int32 ``[B, 8 * n, 2]``: position of each block's first token, and a bit for each attended token.
        exact_positions: int32 ``[B, S]``: positions of the exact tokens, -2^31 if not attended.
        first_token: tokens before it have left the window; tokens are counted from block 0, with 32 in each block.

    Raises:
        RuntimeMismatchError: a tensor has a wrong dtype, or is not contiguous.
    """

    blocks: Tensor
    exact_positions: Tensor
    first_token: int = 0

    def __post_init__(self) -> None:
        for name, tensor in (("blocks", self.blocks), ("exact_positions", self.exact_positions)):
            if tensor.dtype != torch.int32 or not tensor.is_contiguous():
                raise RuntimeMismatchError(
                    f"{name} is {tensor.dtype} with strides {tensor.stride()}, expected contiguous int32"
                )


class SlotView:
    """Converts a cache's slots and a step's mask to the form for the decode kernel; one for all layers.

    Without a mask, the table of blocks grows with the cache. With a mask, it is computed from the mask.
    """

    def __init__(self) -> None:
        self._table: tuple[Any, ...] = ()
        self._blocks: Tensor | None = None
        self._regular = True
        #: The last steps, because layers with and without a sliding window alternate.
        self._steps: list[tuple[tuple[Any, ...], DecodeContext | None]] = []

    def tensors(self) -> list[Tensor]:
        """All tensors that are kept between steps."""
        found = [] if self._blocks is None else [self._blocks]
        for known, context in self._steps:
            found += [part for part in known if isinstance(part, Tensor)]
            found += [] if context is None else [context.blocks, context.exact_positions]
        return found

    def context(self, visibility: Visibility, table: SlotTable) -> DecodeContext | None:
        """The context for one new token per sequence; ``None`` if the kernel does not support it.

        That is the case for a mask per head, for a mask with other values than "visible" and "hidden", and for
        positions that jump within a block.
        """
        step = (visibility.mask, visibility.window, table, table.version, table.length)
        for known, context in self._steps:
            if all(a is b or (isinstance(a, int) and a == b) for a, b in zip(step, known, strict=True)):
                return context
        made = self._make(visibility, table)
        # Only the same tokens: an earlier context does not include new tokens.
        same = [each for each in self._steps if each[0][2:] == step[2:]]
        self._steps = [*same[1 - MOST_STEPS :], (step, made)]
        return made

    def remembers(self, context: DecodeContext) -> bool:
        """Whether a context is from the last steps."""
        return any(context is known for _, known in self._steps)

    def _make(self, visibility: Visibility, table: SlotTable) -> DecodeContext | None:
        mask = visibility.mask
        if mask is not None and mask.ndim == 4:
            if mask.shape[1] != 1:
                return None
            if mask.dtype != torch.bool and not bool(
                ((mask == 0) | (mask <= torch.finfo(mask.dtype).min / 2)).all()
            ):
                return None
        first_token = 0
        if mask is None and not table.ragged:
            if visibility.window is not None:
                first_token = max(visibility.length - visibility.window, 0)
            blocks, regular = self._grown(table)
        else:
            blocks, regular = self._block_range(table, 0, table.blocks, visibility)
        if not regular:
            return None
        return DecodeContext(_whole_pages(blocks), _exact_positions(visibility, table), first_token)

    def _grown(self, table: SlotTable) -> tuple[Tensor, bool]:
        """All blocks without a mask. Only blocks since the last call are computed."""
        state = (table, table.version)
        known = 0
        if (
            self._blocks is None
            or not self._table
            or self._table[0] is not table
            or self._table[1] != table.version
        ):
            self._blocks, self._regular = None, True
        else:
            known = self._table[2]
        if self._blocks is None or known < table.blocks:
            new, regular = self._block_range(table, known, table.blocks, None)
            self._blocks = new if self._blocks is None else torch.cat((self._blocks, new), dim=1)
            self._regular &= regular
            self._table = (*state, table.blocks)
        return self._blocks, self._regular

    def _block_range(
        self, table: SlotTable, start: int, stop: int, visibility: Visibility | None
    ) -> tuple[Tensor, bool]:
        """Blocks ``start`` to ``stop - 1``, int32 ``[B, n, 2]``, and whether positions are consecutive in each."""
        batch, device = table.batch, table.device
        if start == stop:
            return torch.empty(batch, 0, 2, dtype=torch.int32, device=device), True
        low, high = table.first[start], table.first[stop - 1] + table.fill[stop - 1]
        slots = table.block_slots(start, stop)
        within = (slots - low).clamp(min=0)
        keep = (slots >= 0).expand(batch, -1)
        if visibility is not None:
            keep = keep & visibility.of_one_token(slots)
        sinks = table.sink_slots.to(torch.int64) - low
        inside = (sinks >= 0) & (sinks < high - low)
        is_sink = torch.zeros(batch, high - low + 1, dtype=torch.bool, device=device)
        is_sink.scatter_(1, torch.where(inside, sinks, high - low), True)
        keep = keep & ~is_sink[:, within]
        token = torch.arange(BLOCK_TOKENS, device=device)
        origin = (table.positions(low, high)[:, within].to(torch.int64)).unflatten(
            1, (-1, BLOCK_TOKENS)
        ) - token
        keep = keep.unflatten(1, (-1, BLOCK_TOKENS))
        highest = origin.masked_fill(~keep, MASKED).amax(-1)
        lowest = origin.masked_fill(~keep, -MASKED).amin(-1)
        seen = keep.any(-1)
        bits = (keep.to(torch.int64) << token).sum(-1)
        bits = torch.where(bits >= 1 << 31, bits - (1 << 32), bits)
        # The position of a hidden block is not used, but should be the same for different masks.
        position = torch.where(seen, highest, origin[..., -1])
        blocks = torch.stack((position, bits), dim=-1).to(torch.int32)
        return blocks, bool((~seen | (highest == lowest)).all())


def _exact_positions(visibility: Visibility, table: SlotTable) -> Tensor:
    exact = ExactTokens(table)
    hidden = ~visibility.of_one_token(exact.slots)
    return exact.positions.masked_fill(hidden, MASKED).contiguous()


def _whole_pages(blocks: Tensor) -> Tensor:
    """Extend ``[B, n, 2]`` with unattended blocks to a whole number of pages."""
    missing = -blocks.shape[1] % PAGE_BLOCKS
    return nn.functional.pad(blocks, (0, 0, 0, missing)).contiguous() if missing else blocks.contiguous()
