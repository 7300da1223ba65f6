"""Calls of decode attention over packed pages. Everything is checked before a pointer is passed."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvq_calib.native.checks import are_numbers, check, pointer
from kvq_calib.native.layout import PAGE_BLOCKS, PAGE_TOKENS
from kvq_calib.native.loader import KvqAttention, KvqCodes, KvqExact, Library

__all__ = ["CodeTables", "DecodeStep", "LayerKernel", "PageRows", "Turns"]

#: Number of fields of ``KvqPage``, of eight bytes each.
PAGE_FIELDS = 8
_COEFFICIENTS = 6


@dataclass(frozen=True, eq=False)
class CodeTables:
    """What a reader of packed keys or values needs: tensors on the CPU, with ``C = H D`` channels.

    Attributes:
        heads, size: ``H`` and ``D``.
        widths: width of each channel in bits.
        trellis: whether the level of a code depends on the codes before it in the block.
        token_scales: whether tokens have scales and zero points.
        storage: dtype of these, of residuals and of exact tokens: float16 or bfloat16.
        levels: float32 ``[L]``, shared by all channels; or ``None`` if they are computed.
        coefficients: float32 ``[C, 6]`` of computed levels, see :mod:`kvq_calib.codec.computed_levels`; or ``None``.
        scale, zero_point: float32 ``[C]``, applied last; or ``None``.
    """

    heads: int
    size: int
    widths: tuple[int, ...]
    trellis: bool
    token_scales: bool
    storage: torch.dtype
    levels: Tensor | None = None
    coefficients: Tensor | None = None
    scale: Tensor | None = None
    zero_point: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a tensor has a wrong dtype, shape or device, or numbers do not fit.
        """
        channels = self.heads * self.size
        if len(self.widths) != channels or not all(0 <= width <= 8 - self.trellis for width in self.widths):
            raise ValueError(f"widths: {len(self.widths)} of {channels}, or one out of range")
        if self.storage not in (torch.float16, torch.bfloat16):
            raise ValueError(f"storage: {self.storage}")
        if (self.coefficients is None) == (self.levels is None):
            raise ValueError("levels: listed or computed, one of the two")
        if self.levels is not None:
            check("levels", self.levels, torch.float32, (len(self.levels),))
            if max(1 << width + (self.trellis and width > 0) for width in self.widths) > len(self.levels):
                raise ValueError(f"levels: {len(self.levels)} for widths up to {max(self.widths)}")
        if self.coefficients is not None:
            check("coefficients", self.coefficients, torch.float32, (channels, _COEFFICIENTS))
        if (self.scale is None) != (self.zero_point is None):
            raise ValueError("zero_point: needed with scale, and only then")
        if self.scale is not None and self.zero_point is not None:
            check("scale", self.scale, torch.float32, (channels,))
            check("zero_point", self.zero_point, torch.float32, (channels,))

    @property
    def row_words(self) -> int:
        """Number of 32-bit words of a sequence in a page."""
        return PAGE_BLOCKS * sum(self.widths)

    def described(self) -> tuple[KvqCodes, list[Tensor]]:
        """The C structure, and the tensors that it points to."""
        width = torch.tensor(self.widths, dtype=torch.uint8)
        total = torch.tensor(self.widths, dtype=torch.int64).cumsum(0).to(torch.int32)
        offset = (total - width.to(torch.int32)).contiguous()
        own = (width, offset, self.levels, self.coefficients, self.scale, self.zero_point)
        codes = KvqCodes(
            *(self.heads, self.size, self.trellis, self.token_scales, self.storage == torch.bfloat16),
            *(self.row_words, 0 if self.levels is None else len(self.levels), 0),
            *map(pointer, own),
        )
        return codes, [tensor for tensor in own if tensor is not None]


class Turns:
    """RoPE in the form that readers apply it.

    Args:
        library: the library, which defines the order of tokens in :attr:`within`.
        pairs: the coordinates of each pair.
        frequency: radians per token of each pair.
        scaling: factor on rotated coordinates.

    Attributes:
        pair: int32 ``[P, 2]``.
        frequency: float64 ``[P]``.
        within: float32 ``[P, 64]``, see ``kvq_turns_within``.

    Raises:
        ValueError: a coordinate occurs twice, or a pair has no frequency.
    """

    def __init__(
        self, library: Library, pairs: Sequence[tuple[int, int]], frequency: Sequence[float], scaling: float
    ) -> None:
        self.library, self.scaling = library, scaling
        self.pair = torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2)
        self.frequency = torch.tensor(frequency, dtype=torch.float64)
        self.within = torch.empty(len(self.pair), 64)
        places = self.pair.flatten().tolist()
        if (
            len(self.frequency) != len(self.pair)
            or len(set(places)) != len(places)
            or min(places, default=0) < 0
        ):
            raise ValueError("pairs: a coordinate stands twice, or not each has a frequency")
        make = library.functions.kvq_turns_within
        are_numbers(make(self.frequency.data_ptr(), len(self.pair), self.within.data_ptr()))

    def of_blocks(self, positions: Tensor, out: Tensor) -> None:
        """Compute the cosines and sines of blocks.

        Args:
            positions: int32 ``[8 * n]``, position of the first token of each block.
            out: float32 ``[n, P, 2, 8]``, filled in place.
        """
        count = len(out)
        check("positions", positions, torch.int32, (count * PAGE_BLOCKS,))
        check("out", out, torch.float32, (count, len(self.pair), 2, PAGE_BLOCKS))
        fill = self.library.functions.kvq_turns_of_blocks
        are_numbers(
            fill(self.frequency.data_ptr(), len(self.pair), positions.data_ptr(), count, out.data_ptr())
        )

    def of_tokens(self, positions: Tensor) -> Tensor:
        """Cosines and sines of single tokens: positions int32 ``[B, S]`` to float32 ``[B, S, 2, P]``."""
        angle = positions[..., None].double() * self.frequency
        return torch.stack((angle.cos(), angle.sin()), dim=-2).float().contiguous()


class PageRows:
    """Addresses of a tensor's pages, one ``KvqPage`` per page, checked when they are set.

    Args:
        tables: how the pages are read.
        batch: number of sequences ``B``.
    """

    def __init__(self, tables: CodeTables, batch: int) -> None:
        self.tables, self.batch, self.count = tables, batch, 0
        self._rows = np.zeros((8, PAGE_FIELDS), dtype=np.int64)
        self._held: list[tuple[Tensor | None, ...]] = []

    def truncate(self, count: int) -> None:
        """Drop all pages but the first ``count``."""
        del self._held[count:]
        self.count = len(self._held)

    def append(
        self,
        codes: Tensor,
        token: Tensor | None,
        index: Tensor | None,
        residual: Tensor | None,
        start: Tensor | None,
    ) -> None:
        """Add a page.

        Args:
            codes: int32 ``[B, 8 W]``.
            token: storage dtype ``[B, 256, 2]``, if tokens have scales.
            index, residual: outliers, int16 and storage dtype ``[E]``; or ``None``.
            start: starts of their lists, int16 or int32 ``[8 * B * H + 1]``; or ``None``.

        Raises:
            ValueError: a tensor has a wrong dtype, shape or device.
        """
        tables = self.tables
        check("codes", codes, torch.int32, (self.batch, tables.row_words))
        if tables.token_scales:
            if token is None:
                raise ValueError("token: scales of tokens are missing")
            check("token", token, tables.storage, (self.batch, PAGE_TOKENS, 2))
        entries = width = 0
        if start is not None:
            if index is None or residual is None or start.dtype not in (torch.int16, torch.int32):
                raise ValueError("start: lists without entries, or of another dtype")
            entries, width = len(index), start.element_size()
            check("index", index, torch.int16, (entries,))
            check("residual", residual, tables.storage, (entries,))
            check("start", start, start.dtype, (PAGE_BLOCKS * self.batch * tables.heads + 1,))
        held = (codes, token, index, residual, start)
        if self.count == len(self._rows):
            self._rows = np.concatenate((self._rows, np.zeros_like(self._rows)))
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in held]
        self._rows[self.count] = [*addresses, width, entries, self.batch]
        self._held.append(held)
        self.count += 1

    @property
    def address(self) -> int:
        """Address of the first row."""
        return int(self._rows.ctypes.data)

    @property
    def tensor(self) -> Tensor:
        """The addresses as a tensor, to count its memory."""
        return torch.from_numpy(self._rows)


@dataclass(frozen=True, eq=False)
class DecodeStep:
    """What is the same in a step for all layers that see the same tokens. Tables may have unused pages.

    Attributes:
        seen: int32 ``[B, 8 * n]``, one word per block of ``n`` pages, with a bit for each token that is attended.
        exact_seen: bool ``[B, S]``, which exact tokens are attended.
        block_turns: cosines and sines of blocks, float32 ``[B, n, P, 2, 8]``; or ``None`` without RoPE.
        exact_turns: cosines and sines of exact tokens, float32 ``[B, S, 2, P]``; or ``None`` without RoPE.
        first_token: tokens before it are hidden; tokens are counted from block 0, with 32 in each block.
    """

    seen: Tensor
    exact_seen: Tensor
    block_turns: Tensor | None
    exact_turns: Tensor | None
    first_token: int = 0

    def __post_init__(self) -> None:
        """Check that the tensors fit together.

        Raises:
            ValueError: a tensor has a wrong dtype, shape or device.
        """
        check("seen", self.seen, torch.int32, (self.batch, self.pages * PAGE_BLOCKS))
        check("exact_seen", self.exact_seen, torch.bool, (self.batch, self.exact))
        if (self.block_turns is None) != (self.exact_turns is None):
            raise ValueError("exact_turns: needed with block_turns, and only then")
        if self.block_turns is not None and self.exact_turns is not None:
            shape = (self.batch, self.pages, self.pairs, 2, PAGE_BLOCKS)
            check("block_turns", self.block_turns, torch.float32, shape)
            check("exact_turns", self.exact_turns, torch.float32, (self.batch, self.exact, 2, self.pairs))

    @property
    def batch(self) -> int:
        """Number of sequences ``B``."""
        return self.seen.shape[0]

    @property
    def pages(self) -> int:
        """Number of pages ``n`` in the tables."""
        return self.seen.shape[1] // PAGE_BLOCKS

    @property
    def exact(self) -> int:
        """Number of exact tokens ``S``."""
        return self.exact_seen.shape[1]

    @property
    def pairs(self) -> int:
        """Number of RoPE pairs."""
        return 0 if self.block_turns is None else self.block_turns.shape[2]

    @cached_property
    def numbers(self) -> tuple[int, int, int, int]:
        """Numbers of sequences, pages, exact tokens and pairs."""
        return self.batch, self.pages, self.exact, self.pairs

    @cached_property
    def pointers(self) -> tuple[int | None, ...]:
        """Pointers to the tensors, in order."""
        return tuple(map(pointer, (self.seen, self.exact_seen, self.block_turns, self.exact_turns)))


class LayerKernel:
    """Decode attention of one layer. Its tables are converted to C once.

    Args:
        library: the library to call.
        key, value: how packed keys and values are read. Both have the same number of heads and storage dtype.
        turns: RoPE, or ``None`` if keys are stored as attention uses them.
        own_angle: float32 ``[H, P]``, angle by which each pair was rotated before coding, or ``None``.

    Raises:
        ValueError: they do not fit together.
    """

    def __init__(
        self,
        library: Library,
        key: CodeTables,
        value: CodeTables,
        turns: Turns | None,
        own_angle: Tensor | None = None,
    ) -> None:
        if key.heads != value.heads or key.storage != value.storage:
            raise ValueError("value: has other heads or another storage dtype than key")
        self.library, self.key, self.value, self.turns = library, key, value, turns
        self.pairs = 0 if turns is None else len(turns.pair)
        self._key, self._held = key.described()
        self._value, more = value.described()
        self._held += more
        self._call = call = KvqAttention()
        if turns is not None and self.pairs:
            if int(turns.pair.max()) >= key.size:
                raise ValueError(f"turns: a pair lies outside heads of {key.size}")
            call.turns.pairs, call.turns.scaling = self.pairs, turns.scaling
            call.turns.pair, call.turns.within = turns.pair.data_ptr(), turns.within.data_ptr()
            if own_angle is not None:
                check("own_angle", own_angle, torch.float32, (key.heads, self.pairs), contiguous=False)
                cosine, sine = own_angle.cos().contiguous(), own_angle.sin().contiguous()
                call.turns.own_cosine, call.turns.own_sine = cosine.data_ptr(), sine.data_ptr()
                self._held += [cosine, sine]
        else:
            call.turns.scaling = 1.0
        self._arguments = tuple(map(ctypes.byref, (self._key, self._value, call)))
        #: Copies of a cache share this object, and threads may have one each.
        self._lock = threading.Lock()

    def tensors(self) -> list[Tensor]:
        """All tensors."""
        return self._held

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Key, value and call as the C functions take them."""
        return self._arguments

    @property
    def template(self) -> KvqAttention:
        """A call with the fields that no step changes."""
        return self._call

    def attend(
        self,
        query: Tensor,
        step: DecodeStep,
        pages: tuple[PageRows, PageRows],
        exact: Sequence[tuple[Tensor, Tensor]],
        *,
        scaling: float,
        first_page: int = 0,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Attention for one new token of each sequence.

        Args:
            query: float32 ``[B, Hq, D]``, contiguous, rotated by the model.
            step: which tokens are attended, and their cosines and sines.
            pages: pages of keys and of values.
            exact: keys and values of sinks, then of the tail, storage dtype ``[B, H, t, D]``, contiguous within a head.
            scaling: factor on the scores.
            first_page: number in ``step`` of the first page.
            softcap: scores become ``softcap * tanh(score / softcap)``; ``None`` for no cap.
            sink_logits: ``[Hq]``, a logit per head that enters the softmax without a value; or ``None``.

        Returns:
            float32 ``[B, Hq, Dv]``.

        Raises:
            ValueError: the arguments do not fit.
            MemoryError: out of memory.
        """
        with self._lock:
            call, (keys, values) = self._call, pages
            batch, query_heads = query.shape[:2]
            check("query", query, torch.float32, (batch, query_heads, self.key.size))
            step_batch, step_pages, step_exact, step_pairs = step.numbers
            if query_heads % self.key.heads or step_batch != batch or step_pairs != self.pairs:
                raise ValueError(f"query: {query_heads} heads of {batch} sequences do not fit the step")
            fits = keys.tables is self.key and values.tables is self.value and keys.count == values.count
            if (
                not fits
                or keys.batch != batch
                or values.batch != batch
                or not 0 <= first_page <= step_pages - keys.count
            ):
                raise ValueError(
                    f"pages: {keys.count} of {keys.batch} sequences from {first_page} on do not fit the step"
                )
            found = self._describe_exact(call.sinks, exact[0], batch) + self._describe_exact(
                call.tail, exact[1], batch
            )
            if found != step_exact:
                raise ValueError(f"exact: {found} tokens where the step has {step_exact}")
            if sink_logits is not None:
                sink_logits = sink_logits.to(torch.float32).contiguous()
                check("sink_logits", sink_logits, torch.float32, (query_heads,))
            out = torch.empty(batch, query_heads, self.value.size)
            call.batch, call.group, call.threads = (
                batch,
                query_heads // self.key.heads,
                torch.get_num_threads(),
            )
            call.pages, call.first_page, call.table_pages = keys.count, first_page, step_pages
            call.first_token, call.scale, call.softcap = step.first_token, scaling, softcap or 0.0
            call.query, call.out, call.sink_logit = query.data_ptr(), out.data_ptr(), pointer(sink_logits)
            call.key_page, call.value_page = keys.address, values.address
            call.seen, call.exact_seen, call.turns.block, call.turns.exact = step.pointers
            are_numbers(self.library.functions.kvq_attend(*self._arguments))
            return out

    def _describe_exact(self, to: KvqExact, part: tuple[Tensor, Tensor], batch: int) -> int:
        """Write the addresses of exact tokens, and return their number."""
        keys, values = part
        tokens = keys.shape[2]
        for name, tensor, size in (("keys", keys, self.key.size), ("values", values, self.value.size)):
            check(name, tensor, self.key.storage, (batch, self.key.heads, tokens, size), contiguous=False)
            if tokens and tensor.stride()[2:] != (size, 1):
                raise ValueError(f"{name}: exact tokens of a head do not follow each other")
        to.key, to.value, to.tokens = keys.data_ptr(), values.data_ptr(), tokens
        to.key_stride[0], to.key_stride[1] = keys.stride()[:2]
        to.value_stride[0], to.value_stride[1] = values.stride()[:2]
        return tokens
