"""What a packed cache holds, and nothing else: no attention, no model.

A **slot** is one column of the batch, padding included; all sequences and layers share their slots. The
oldest slots are packed in blocks of 32, the others are exact (the *tail*)::

    slot      0 ........ packed_slots ........ length
              blocks 0 .. n-1         tail

A block holds 32 slots, or fewer where :meth:`SlotTable.crop` cut into it: nothing is ever re-quantized, and
the next tokens start a new block. Block ``k`` stands in page ``k // 8`` at place ``k % 8``, whatever its
fill. Which slots a block holds is the same for every layer and sequence and is kept once, in
:class:`SlotTable`.

Every token passes the storage dtype before it is quantized, also where it never rests there, and a token is
quantized by itself. So the codes of a text do not depend on how it was divided into calls (but for the last
bit of a matrix product where values are rotated).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvq_calib.codec.packing import BLOCK_TOKENS, PAGE_BLOCKS, PAGE_TOKENS, PageLayout, pack_outliers
from kvq_calib.codec.quantizer import Quantized, Quantizer
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.schema.geometry import RopeSpec

__all__ = ["LayerStorage", "PackedTensor", "Page", "SlotTable", "StorageMark"]


class SlotTable:
    """Which token stands where: blocks, positions and sinks, shared by all layers of a cache.

    Args:
        batch: sequences ``B``.
        sink_tokens: first real tokens of every sequence that stay exact, ``n``.
        recent_tokens: newest slots that stay exact.
        device: of the tensors.

    Attributes:
        length: slots in use.
        first, fill: int32 arrays, first slot and number of slots of each block.
        position_pages: int32 ``[B, 256]`` each: the RoPE position of every slot, in order of slots.
        sink_slots: int32 ``[B, n]``: the slot of each sequence's sinks, -1 where that token is not there yet.
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
        #: ``length`` before the append that last added to ``sink_slots``.
        self.sinks_found_at = -1
        #: First slot of a sink and last plus one, over all sequences; ``(0, 0)`` where there is none.
        self.sink_range = (0, 0)
        #: Whether some sequence has fewer real tokens than sinks.
        self.missing_sinks = sink_tokens > 0
        #: Counts what changes slots already there: who keeps something derived from them compares it.
        self.version = 0
        #: Cosines and sines of packed places by (RoPE, first slot, last slot + 1), each float32
        #: ``[B, 1, P, S]``: kept from the first layer of a forward pass to the last, never between passes.
        self.angles: dict[tuple[RopeSpec | None, int, int], tuple[Tensor, Tensor]] = {}
        self._ragged = False

    @property
    def blocks(self) -> int:
        """Packed blocks."""
        return len(self.first)

    @property
    def packed_slots(self) -> int:
        """Slots in blocks: the tail starts here."""
        return self.first[-1] + self.fill[-1] if self.first else 0

    @property
    def ragged(self) -> bool:
        """Whether any block but the last holds fewer than 32 slots, so that place and slot differ."""
        return self._ragged

    def append(self, positions: Tensor, real: Tensor | None) -> None:
        """Add ``T`` slots.

        Args:
            positions: integer ``[B or 1, T]``.
            real: bool ``[B, T]``, false where the slot is padding; ``None`` where there is none.
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
        while self.length - self.recent_tokens - self.packed_slots >= BLOCK_TOKENS:
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
        """Become the table with these attributes."""
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
        """The slot of every place of blocks ``start`` to ``stop - 1``: int64 ``[32 * n]``, -1 for none."""
        first = torch.tensor(self.first[start:stop], dtype=torch.int64)[:, None]
        fill = torch.tensor(self.fill[start:stop], dtype=torch.int64)[:, None]
        within = torch.arange(BLOCK_TOKENS)
        return torch.where(within < fill, first + within, -1).flatten().to(self.device)

    def crop(self, length: int, blocks: int | None = None) -> None:
        """Forget all slots from ``length`` on, and all blocks from ``blocks`` on, if given.

        Slots of a forgotten block that stay are slots of the tail again.
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
        """Keep, repeat or reorder sequences: row ``i`` becomes what row ``rows[i]`` was."""
        self.version += 1
        self.batch = len(rows)
        self.position_pages = [page[rows] for page in self.position_pages]
        self.sink_slots = self.sink_slots[rows]
        self._update_sink_range()

    def memory(self) -> dict[str, int]:
        """Bytes held, by kind."""
        return {
            "positions": sum(page.nbytes for page in self.position_pages),
            "block_table": (len(self.first) + len(self.fill)) * self.first.itemsize,
            "sink_slots": self.sink_slots.nbytes,
        }


@dataclass
class Page:
    """Up to 8 blocks of one layer's keys or values; see ``packing.py`` for the layout.

    Attributes:
        codes: int32 ``[B, 8 * W]``, allocated whole.
        token_params: storage dtype ``[B, 256, 2]``, scale and zero point of each token, allocated whole; or
            ``None``.
        outlier_index, outlier_residual: int16 and storage dtype ``[E]``, as many as there are; or ``None``.
        outlier_start: ``layout.start_dtype(B)`` ``[8 * B * H + 1]``: list ``(block * B + sequence) * H + head`` is entries
            ``start[i]`` to ``start[i + 1] - 1``; lists of blocks not yet written are empty. Or ``None``.
    """

    codes: Tensor
    token_params: Tensor | None = None
    outlier_index: Tensor | None = None
    outlier_residual: Tensor | None = None
    outlier_start: Tensor | None = None

    @property
    def entries(self) -> int:
        """Outlier entries ``E``."""
        return 0 if self.outlier_index is None else self.outlier_index.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def select(self, rows: Tensor, layout: PageLayout) -> Page:
        """The page of other sequences: row ``i`` is what row ``rows[i]`` was."""
        page = Page(self.codes[rows], None if self.token_params is None else self.token_params[rows])
        if self.outlier_start is not None:
            assert self.outlier_index is not None
            assert self.outlier_residual is not None
            start = self.outlier_start.to(torch.int64)
            shape = (PAGE_BLOCKS, self.codes.shape[0], layout.heads)
            counts = start.diff().view(shape)[:, rows].flatten()
            begin = start[:-1].view(shape)[:, rows].flatten()
            new_start = torch.zeros(len(counts) + 1, dtype=torch.int64, device=start.device)
            torch.cumsum(counts, 0, out=new_start[1:])
            offset = torch.repeat_interleave(begin - new_start[:-1], counts)
            source = offset + torch.arange(len(offset), device=start.device)
            page.outlier_start = new_start.to(layout.start_dtype(len(rows)))
            page.outlier_index = self.outlier_index[source]
            page.outlier_residual = self.outlier_residual[source]
        return page


class PackedTensor:
    """The packed keys or values of one layer.

    Args:
        quantizer: what packs them.
        batch: sequences ``B``.
        device: of the tensors.

    Attributes:
        pages: the pages still held, oldest first.
        dropped_pages: how many older pages a sliding window has left behind; ``pages[i]`` is page
            ``dropped_pages + i`` of the block table.
        blocks: blocks written, those in dropped pages included.
    """

    def __init__(self, quantizer: Quantizer, batch: int, device: torch.device) -> None:
        self.quantizer = quantizer
        self.batch = batch
        self.device = device
        self.pages: list[Page] = []
        self.dropped_pages = 0
        self.blocks = 0

    @property
    def layout(self) -> PageLayout:
        """Where everything stands in a page."""
        return self.quantizer.layout

    def append(self, x: Tensor) -> None:
        """Quantize and pack whole blocks; earlier pages are not touched.

        Args:
            x: ``[B, H, 32 * n, D]`` in the storage dtype. Pre-RoPE keys where the spec says so.
        """
        done, tokens = 0, x.shape[2]
        while done < tokens:  # page by page: the work space does not grow with the prompt
            room = PAGE_TOKENS - self.blocks % PAGE_BLOCKS * BLOCK_TOKENS
            count = min(room, tokens - done)
            self.append_codes(self.quantizer.quantize(x[:, :, done : done + count]))
            done += count

    def append_codes(self, q: Quantized) -> None:
        """Pack whole blocks that are quantized already, no more than the open page has room for."""
        layout, place = self.layout, self.blocks % PAGE_BLOCKS
        if place == 0:
            self.pages.append(self._new_page())
        page = self.pages[-1]
        layout.write(page.codes, q.codes, place)
        if page.token_params is not None:
            assert q.token_scale is not None
            assert q.token_zero_point is not None
            here = slice(place * BLOCK_TOKENS, place * BLOCK_TOKENS + q.codes.shape[1])
            page.token_params[:, here, 0] = q.token_scale
            page.token_params[:, here, 1] = q.token_zero_point
        if page.outlier_start is not None:
            assert page.outlier_index is not None
            assert page.outlier_residual is not None
            assert q.outliers is not None
            assert q.residual is not None
            lists = pack_outliers(q.outliers, q.residual, layout.heads)
            ends = (page.entries + lists.counts.flatten().cumsum(0)).to(page.outlier_start.dtype)
            begin = place * self.batch * layout.heads + 1
            page.outlier_start[begin : begin + len(ends)] = ends
            page.outlier_start[begin + len(ends) :] = ends[-1]
            # At most the seven blocks before this one are copied: bounded by the page, not by the cache.
            page.outlier_index = torch.cat((page.outlier_index, lists.index))
            page.outlier_residual = torch.cat((page.outlier_residual, lists.residual))
        self.blocks += q.codes.shape[1] // BLOCK_TOKENS

    def _new_page(self) -> Page:
        layout, storage = self.layout, self.quantizer.storage
        page = Page(layout.new_page(self.batch, self.device))
        if layout.token_params:
            page.token_params = torch.zeros(self.batch, PAGE_TOKENS, 2, dtype=storage, device=self.device)
        if layout.outlier_cap:
            page.outlier_index = torch.empty(0, dtype=torch.int16, device=self.device)
            page.outlier_residual = torch.empty(0, dtype=storage, device=self.device)
            lists = PAGE_BLOCKS * self.batch * layout.heads
            starts = layout.start_dtype(self.batch)
            page.outlier_start = torch.zeros(lists + 1, dtype=starts, device=self.device)
        return page

    def truncate(self, blocks: int) -> None:
        """Forget all blocks from ``blocks`` on; codes of a page that stays are left to be overwritten."""
        self.blocks = blocks
        del self.pages[-(-blocks // PAGE_BLOCKS) - self.dropped_pages :]
        place = blocks % PAGE_BLOCKS
        if place == 0 or not self.pages:
            return
        page = self.pages[-1]
        if page.outlier_start is not None:
            assert page.outlier_index is not None
            assert page.outlier_residual is not None
            lists = place * self.batch * self.layout.heads
            entries = int(page.outlier_start[lists])
            page.outlier_start[lists + 1 :] = entries
            page.outlier_index = page.outlier_index[:entries].clone()
            page.outlier_residual = page.outlier_residual[:entries].clone()

    def pages_before(self, slot: int, table: SlotTable) -> int:
        """How many of the pages held end before ``slot``."""
        count = 0
        while (last := PAGE_BLOCKS * (self.dropped_pages + count + 1) - 1) < self.blocks and (
            table.first[last] + table.fill[last] <= slot
        ):
            count += 1
        return count

    def drop(self, count: int) -> None:
        """Free the oldest ``count`` pages held."""
        del self.pages[:count]
        self.dropped_pages += count

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder sequences."""
        self.batch = len(rows)
        self.pages = [page.select(rows, self.layout) for page in self.pages]

    @property
    def outlier_entries(self) -> int:
        """Outlier entries of all pages held."""
        return sum(page.entries for page in self.pages)

    def memory(self) -> dict[str, int]:
        """Bytes held, by kind, as :func:`kvq_calib.codec.packing.storage_bytes` names them."""
        kinds = {
            "codes": "codes",
            "token_params": "token_scales",
            "outlier_start": "outlier_starts",
            "outlier_index": "outlier_entries",
            "outlier_residual": "outlier_entries",
        }
        sizes = dict.fromkeys(self.layout.page_bytes(), 0)
        if self.layout.outlier_cap:
            sizes["outlier_entries"] = 0
        for page in self.pages:
            for name, tensor in page.tensors().items():
                sizes[kinds[name]] += tensor.nbytes
        return sizes


@dataclass(frozen=True)
class StorageMark:
    """What :meth:`LayerStorage.restore` needs to undo an append.

    Attributes:
        blocks: packed blocks.
        tail_key, tail_value: the exact tail.
        length: slots held.
    """

    blocks: int
    tail_key: Tensor
    tail_value: Tensor
    length: int


class LayerStorage:
    """Keys and values of one layer: packed blocks, exact tail, exact sinks.

    Keys are un-rotated where the layer's spec says ``pre_rope``, else as attention uses them.

    Args:
        key, value: the quantizers.
        batch: sequences ``B``.
        sink_tokens: ``n``.
        device: of the tensors.

    Attributes:
        key, value: packed blocks.
        tail_key, tail_value: storage dtype ``[B, H, t, D]``, the slots after the last block.
        sink_key, sink_value: storage dtype ``[B, H, n, D]``, at the slots ``SlotTable.sink_slots``; they
            stand for what is packed there.
        length: slots held.
    """

    def __init__(
        self, key: Quantizer, value: Quantizer, batch: int, sink_tokens: int, device: torch.device
    ) -> None:
        self.key = PackedTensor(key, batch, device)
        self.value = PackedTensor(value, batch, device)
        shape = (batch, key.geometry.num_kv_heads, 0, key.geometry.head_dim)
        self.tail_key = torch.empty(shape, dtype=key.storage, device=device)
        self.tail_value = torch.empty(shape, dtype=value.storage, device=device)
        sinks = (*shape[:2], sink_tokens, shape[3])
        self.sink_key = torch.zeros(sinks, dtype=key.storage, device=device)
        self.sink_value = torch.zeros(sinks, dtype=value.storage, device=device)
        self.length = 0

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        table: SlotTable,
        pack: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        """Add the tokens that ``table`` already knows, and pack the blocks it lists.

        Args:
            keys, values: ``[B, H, T, D]``, any float dtype.
            table: of the cache; its last ``T`` slots are these tokens.
            pack: what to pack whole blocks with, ``[B, H, 32 * n, D]`` each; :meth:`PackedTensor.append` of
                both by default.

        Raises:
            RuntimeMismatchError: a number does not fit the storage dtype; :meth:`restore` undoes what was stored.
        """
        storage = self.tail_key.dtype
        keys, values = keys.to(storage), values.to(storage)
        packed = (table.blocks - self.key.blocks) * BLOCK_TOKENS
        # To look at the numbers a host must wait for its GPU, so there they are looked at block by block.
        on_cpu = keys.device.type == "cpu"
        if packed and not on_cpu:
            self._check_finite(self.tail_key)
            self._check_finite(self.tail_value)
        if packed or on_cpu:
            self._check_finite(keys)
            self._check_finite(values)
        start = self.length
        if table.sinks_found_at == start and table.sink_slots.shape[1]:
            self._store_sinks(keys, values, table.sink_slots, start)
        keys = torch.cat((self.tail_key, keys), dim=2)
        values = torch.cat((self.tail_value, values), dim=2)
        if packed:
            if pack is None:
                self.key.append(keys[:, :, :packed])
                self.value.append(values[:, :, :packed])
            else:
                pack(keys[:, :, :packed], values[:, :, :packed])
            keys, values = keys[:, :, packed:].clone(), values[:, :, packed:].clone()
        self.tail_key, self.tail_value = keys, values
        self.length = table.length

    @staticmethod
    def _check_finite(x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise RuntimeMismatchError(
                f"keys or values are not finite in {str(x.dtype).removeprefix('torch.')}; "
                "check the model's dtype, or calibrate with storage_dtype bfloat16"
            )

    def _store_sinks(self, keys: Tensor, values: Tensor, slots: Tensor, start: int) -> None:
        row, place = (slots >= start).nonzero(as_tuple=True)
        token = slots[row, place].to(torch.int64) - start
        self.sink_key[row, :, place] = keys[row, :, token]
        self.sink_value[row, :, place] = values[row, :, token]

    def mark(self) -> StorageMark:
        """Where the storage stands; costs nothing, since an append makes a new tail."""
        return StorageMark(self.key.blocks, self.tail_key, self.tail_value, self.length)

    def restore(self, mark: StorageMark) -> None:
        """Forget what was appended since ``mark``, bit for bit; pages freed since then stay freed."""
        self.key.truncate(mark.blocks)
        self.value.truncate(mark.blocks)
        self.tail_key, self.tail_value, self.length = mark.tail_key, mark.tail_value, mark.length

    def crop(self, table: SlotTable) -> None:
        """Follow ``table`` after its :meth:`SlotTable.crop`."""
        if table.blocks < self.key.blocks:
            self.key.truncate(table.blocks)
            self.value.truncate(table.blocks)
        kept = table.length - table.packed_slots
        self.tail_key = self.tail_key[:, :, :kept].clone()
        self.tail_value = self.tail_value[:, :, :kept].clone()
        self.length = table.length

    def drop_before(self, slot: int, table: SlotTable) -> None:
        """Free the pages that hold only slots before ``slot``; their blocks stay listed in ``table``."""
        count = self.key.pages_before(slot, table)
        self.key.drop(count)
        self.value.drop(count)

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder sequences."""
        self.key.select(rows)
        self.value.select(rows)
        for name in ("tail_key", "tail_value", "sink_key", "sink_value"):
            setattr(self, name, getattr(self, name)[rows])

    def memory(self) -> Iterator[tuple[str, int]]:
        """Bytes held: (kind, bytes), kinds may repeat."""
        yield from self.key.memory().items()
        yield from self.value.memory().items()
        yield "exact_recent", self.tail_key.nbytes + self.tail_value.nbytes
        yield "exact_sinks", self.sink_key.nbytes + self.sink_value.nbytes
