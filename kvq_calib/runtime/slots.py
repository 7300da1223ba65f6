"""The slot table: blocks, positions and sinks, which all layers of a cache share.

A **slot** is one column of the batch, including padding. All sequences and layers share slots. The oldest slots are
packed in blocks of 32; the others are exact (the *tail*)::

    slot      0 ........ packed_slots ........ length
              blocks 0 .. n-1         tail

A block is listed at once, or after attention if the pass has one token per sequence (:meth:`SlotTable.add`). So
attention of such a pass reads its newest block exactly, and all layers of the pass can be packed together.

A block has 32 slots, or fewer if :meth:`SlotTable.crop` has cut it. Nothing is quantized again, and the next tokens
start a new block. Block ``k`` is in page ``k // 8`` at place ``k % 8``, even if it is not full.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from kvq_calib.codec.packing import BLOCK_TOKENS, PAGE_TOKENS
from kvq_calib.schema.geometry import RopeSpec

__all__ = ["SlotTable"]


class SlotTable:
    """The slot table: blocks, positions and sinks, which all layers of a cache share.

    Args:
        batch: number of sequences ``B``.
        sink_tokens: number ``n`` of first real tokens of every sequence that stay exact.
        recent_tokens: number of newest slots that stay exact.
        device: device of the tensors.

    Attributes:
        length: number of slots in use.
        first, fill: int32 arrays, first slot and number of slots of each block.
        position_pages: int32 ``[B, 256]`` each: RoPE positions of slots, in order.
        sink_slots: int32 ``[B, n]``: slots of each sequence's sinks, -1 for tokens that do not exist yet.
    """

    def __init__(self, batch: int, sink_tokens: int, recent_tokens: int, device: torch.device) -> None:
        self.batch = batch
        self.recent_tokens = recent_tokens
        self.device = device
        self.length = 0
        self.first = array("i")
        self.fill = array("i")
        self.position_pages: list[Tensor] = []
        self.sink_slots = torch.full((batch, sink_tokens), -1, dtype=torch.int32, device=device)
        #: ``length`` before the last append that changed ``sink_slots``.
        self.sinks_found_at = -1
        #: First slot of a sink, and last plus one, over all sequences; ``(0, 0)`` without sinks.
        self.sink_range = (0, 0)
        #: Whether some sequence has fewer real tokens than sinks.
        self.missing_sinks = sink_tokens > 0
        #: Increased when existing slots change, so that derived data can be invalidated.
        self.version = 0
        #: Cosines and sines of packed places by (RoPE, first slot, last slot + 1), each float32 ``[B, 1, P, S]``. They
        #: are kept during a forward pass.
        self.angles: dict[tuple[RopeSpec | None, int, int], tuple[Tensor, Tensor]] = {}
        self._ragged = False

    @property
    def blocks(self) -> int:
        """Number of packed blocks."""
        return len(self.first)

    @property
    def packed_slots(self) -> int:
        """Number of slots in blocks, which is where the tail starts."""
        return self.first[-1] + self.fill[-1] if self.first else 0

    @property
    def ragged(self) -> bool:
        """Whether any block but the last has fewer than 32 slots, so that places and slots differ."""
        return self._ragged

    def append(self, positions: Tensor, real: Tensor | None) -> None:
        """Add slots as :meth:`add` does, and list the blocks that are complete then."""
        self.add(positions, real)
        self.close_blocks()

    def add(self, positions: Tensor, real: Tensor | None) -> None:
        """Add ``T`` slots to the tail.

        Args:
            positions: integer ``[B or 1, T]``.
            real: bool ``[B, T]``, false for padding; ``None`` without padding.
        """
        self.angles.clear()
        positions = positions.to(self.device, torch.int32).expand(self.batch, -1)
        tokens = positions.shape[1]
        if self.missing_sinks:
            self._find_sinks(tokens, real)
        done = 0
        while done < tokens:
            place = (self.length + done) % PAGE_TOKENS
            if place == 0:
                self.position_pages.append(
                    torch.zeros(self.batch, PAGE_TOKENS, dtype=torch.int32, device=self.device)
                )
            count = min(PAGE_TOKENS - place, tokens - done)
            self.position_pages[-1][:, place : place + count] = positions[:, done : done + count]
            done += count
        self.length += tokens

    @property
    def complete(self) -> bool:
        """Whether the tail has a block that :meth:`close_blocks` would list."""
        return self.length - self.recent_tokens - self.packed_slots >= BLOCK_TOKENS

    def close_blocks(self) -> None:
        """List the blocks that are complete. Every storage must then be packed, before anybody reads it."""
        while self.complete:
            self._ragged |= bool(self.fill) and self.fill[-1] < BLOCK_TOKENS
            self.first.append(self.packed_slots)
            self.fill.append(BLOCK_TOKENS)

    def _find_sinks(self, tokens: int, real: Tensor | None) -> None:
        sinks = self.sink_slots.shape[1]
        if real is None:
            real = torch.ones(self.batch, tokens, dtype=torch.bool, device=self.device)
        known = (self.sink_slots >= 0).sum(1, keepdim=True)
        rank = real.cumsum(1) - 1 + known
        row, token = (real & (rank < sinks)).nonzero(as_tuple=True)
        self.sink_slots[row, rank[row, token]] = (token + self.length).to(torch.int32)
        self.sinks_found_at = self.length
        self._update_sink_range()

    def _update_sink_range(self) -> None:
        found = self.sink_slots[self.sink_slots >= 0]
        self.sink_range = (int(found.min()), int(found.max()) + 1) if len(found) else (0, 0)
        self.missing_sinks = found.numel() < self.sink_slots.numel()

    def restore(
        self,
        length: int,
        first: array[int],
        fill: array[int],
        position_pages: list[Tensor],
        sink_slots: Tensor,
    ) -> None:
        """Set these attributes."""
        self.version += 1
        self.length, self.first, self.fill = length, first, fill
        self.position_pages, self.sink_slots = position_pages, sink_slots
        self._ragged = any(count < BLOCK_TOKENS for count in fill[:-1])
        self._update_sink_range()

    def positions(self, start: int, stop: int) -> Tensor:
        """Positions of slots ``start`` to ``stop - 1``, int32 ``[B, stop - start]``."""
        pages = range(start // PAGE_TOKENS, -(-stop // PAGE_TOKENS))
        parts = [self.position_pages[page] for page in pages]
        if not parts:
            return torch.empty(self.batch, 0, dtype=torch.int32, device=self.device)
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        offset = pages[0] * PAGE_TOKENS
        return joined[:, start - offset : stop - offset]

    def block_slots(self, start: int, stop: int) -> Tensor:
        """The slot of every place in blocks ``start`` to ``stop - 1``: int64 ``[32 * n]``, -1 for none."""
        first = torch.tensor(self.first[start:stop], dtype=torch.int64)[:, None]
        fill = torch.tensor(self.fill[start:stop], dtype=torch.int64)[:, None]
        within = torch.arange(BLOCK_TOKENS)
        return torch.where(within < fill, first + within, -1).flatten().to(self.device)

    def crop(self, length: int, blocks: int | None = None) -> None:
        """Drop all slots from ``length`` on, and if given, all blocks from ``blocks`` on.

        Remaining slots of a dropped block are in the tail again.
        """
        self.version += 1
        self.angles.clear()
        if blocks is not None:
            del self.first[blocks:], self.fill[blocks:]
        while self.first and self.first[-1] >= length:
            self.first.pop()
            self.fill.pop()
        if self.first:
            self.fill[-1] = min(self.fill[-1], length - self.first[-1])
        self._ragged = any(fill < BLOCK_TOKENS for fill in self.fill[:-1])
        self.length = length
        del self.position_pages[-(-length // PAGE_TOKENS) :]
        self.sink_slots[self.sink_slots >= length] = -1
        self._update_sink_range()

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder sequences: row ``i`` is replaced by row ``rows[i]``."""
        self.version += 1
        self.batch = len(rows)
        self.position_pages = [page[rows] for page in self.position_pages]
        self.sink_slots = self.sink_slots[rows]
        self._update_sink_range()

    def memory(self) -> dict[str, int]:
        """Bytes in use, by kind."""
        return {
            "positions": sum(page.nbytes for page in self.position_pages),
            "block_table": (len(self.first) + len(self.fill)) * self.first.itemsize,
            "sink_slots": self.sink_slots.nbytes,
        }
