"""What layers share in a step on a GPU. The host knows lengths, but pages are only in the device's memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvq_calib.codec.packing import BLOCK_TOKENS, PAGE_BLOCKS, PAGE_TOKENS
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.integrations.vllm.pages import AHEAD, pages_of
from kvq_calib.integrations.vllm.step import NewTokens
from kvq_calib.model.rope import RopeTable
from kvq_calib.runtime.slot_view import MASKED, DecodeContext

__all__ = ["GpuRow", "GpuStep"]


@dataclass(frozen=True)
class GpuRow(NewTokens):
    """The new tokens of one sequence, and its pages.

    Attributes:
        number: number of the sequence in the step.
        table: the pages, int64 ``[n]`` on the device.
    """

    number: int
    table: Tensor

    def page_ahead(self, tokens: int) -> Tensor:
        """The page of the newest of ``tokens`` tokens: int64 ``[1]``."""
        page = tokens // PAGE_TOKENS + AHEAD
        return self.table[page : page + 1]


@dataclass(frozen=True)
class _Single:
    """Sequences with one new token each.

    Attributes:
        token: number of the token in the step, int64 ``[S]``.
        sequence, length: number and length of the sequence, int64 ``[S]`` each.
        longest: the largest length, which the host knows.
    """

    token: Tensor
    sequence: Tensor
    length: Tensor
    longest: int


@dataclass(frozen=True)
class _Kept:
    """New tokens that are stored with the newest of their sequences: numbers in the step, pages and places; int64."""

    token: Tensor
    page: Tensor
    place: Tensor


class GpuStep:
    """One step, the same object for all layers. The host sends numbers once, and never waits.

    Args:
        starts: first new token of each sequence, and the end of the last.
        lengths: exact number of tokens of each sequence, including new ones.
        tables: int32 ``[sequences, pages]`` on the device, pages of each sequence.
        sink_tokens: number of exact first tokens of a sequence.

    Raises:
        RuntimeMismatchError: a sequence has fewer pages than it needs.
    """

    def __init__(
        self, starts: Sequence[int], lengths: Sequence[int], tables: Tensor, sink_tokens: int
    ) -> None:
        self.starts, self.lengths, self.sink_tokens = starts, lengths, sink_tokens
        self.device = tables.device
        self._tables = tables
        self._wide = tables.to(torch.int64)
        self.rows = list(self._rows())
        ones, kept = [r for r in self.rows if r.count == 1], [r for r in self.rows if r.only_kept]
        lists = [
            [at for row in self.rows for at in range(row.held, row.length)],
            *([row.start for row in ones], [row.number for row in ones], [row.length for row in ones]),
            *([row.start for row in kept], [row.number for row in kept], [row.held for row in kept]),
        ]
        sent = _sent(lists, self.device)
        #: Positions of the new tokens, int32 ``[tokens]``.
        self.positions = sent[0].to(torch.int32)
        self.single: _Single | None = None
        self.kept: _Kept | None = None
        if ones:
            self.single = _Single(sent[1], sent[2], sent[3], max(row.length for row in ones))
        if kept:
            token, sequence, held = sent[4:]
            page = self._wide[sequence, held // PAGE_TOKENS + AHEAD]
            self.kept = _Kept(token, page, held % BLOCK_TOKENS)
        self._unturning: dict[int, tuple[RopeTable, Tensor, Tensor]] = {}

    def _rows(self) -> Iterator[GpuRow]:
        for number, length in enumerate(self.lengths):
            start, stop = self.starts[number], self.starts[number + 1]
            if start < stop:
                if not 0 < stop - start <= length or pages_of(length) + AHEAD > self._tables.shape[1]:
                    raise RuntimeMismatchError(f"{length} tokens do not fit {self._tables.shape[1]} pages")
                yield GpuRow(start, stop, length, self.sink_tokens, number, self._wide[number])

    @property
    def tokens(self) -> int:
        """Number of new tokens of all sequences."""
        return self.starts[-1]

    def unturning(self, rope: RopeTable, key: int) -> tuple[Tensor, Tensor]:
        """Angles for :meth:`RopeTable.rotate_` to undo RoPE in the new tokens: float32 ``[P, tokens]`` each.

        Args:
            rope: rotary embedding of a layer.
            key: the same number for layers with the same rotary embedding.
        """
        found = self._unturning.get(key)
        if found is None:
            cos, sin = rope.cos_sin(self.positions[None])
            found = self._unturning[key] = rope, cos[0, 0] / rope.scaling, -sin[0, 0] / rope.scaling
        return found[1:]

    # ---- what decode kernels read ----

    @cached_property
    def table(self) -> Tensor:
        """Pages of the sequences with one new token, int32 ``[S, n]``, contiguous."""
        assert self.single is not None
        pages = max(pages_of(self.single.longest), 1)
        return self._tables[self.single.sequence, :pages].to(torch.int32).contiguous()

    @cached_property
    def exact_pages(self) -> Tensor:
        """The pages of first and of newest tokens, int64 ``[S, 2]``."""
        single = self.single
        assert single is not None
        ahead = (single.length // PAGE_TOKENS + AHEAD).clamp(
            max=self._wide.shape[1] - 1
        )  # if no block is open
        return torch.stack((self._wide[single.sequence, 0], self._wide[single.sequence, ahead]), dim=1)

    @cached_property
    def context(self) -> DecodeContext:
        """The attended tokens and their positions."""
        single = self.single
        assert single is not None
        place = torch.arange(self.table.shape[1] * PAGE_BLOCKS, device=self.device)
        packed = single.length // BLOCK_TOKENS
        hidden = (self.sink_tokens - BLOCK_TOKENS * place).clamp(0, BLOCK_TOKENS)
        own = torch.where(hidden == BLOCK_TOKENS, 0, -1 << hidden.clamp(max=BLOCK_TOKENS - 1))
        bits = torch.where(place < packed[:, None], own, 0)
        first = (BLOCK_TOKENS * place).expand_as(bits)
        start = BLOCK_TOKENS * packed[:, None]
        sinks = torch.arange(self.sink_tokens, device=self.device).expand(len(bits), -1)
        newest = start + torch.arange(BLOCK_TOKENS, device=self.device)
        exact = torch.cat(
            (
                sinks.masked_fill(sinks >= start, MASKED),
                newest.masked_fill(newest >= single.length[:, None], MASKED),
            ),
            dim=1,
        )
        blocks = torch.stack((first, bits), dim=-1)
        return DecodeContext(blocks.to(torch.int32).contiguous(), exact.to(torch.int32).contiguous())


def _sent(lists: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Lists of numbers as tensors on the device, in one copy without waiting."""
    whole = torch.tensor([number for each in lists for number in each], dtype=torch.int64)
    return list(whole.to(device, non_blocking=True).split([len(each) for each in lists]))
