"""Attention of one new token per sequence: the kernels of ``decode.cu``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

import torch
from torch import Tensor

from kvq_calib.codec.packing import PAGE_BLOCKS
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.runtime.cuda.decode_tables import KernelTables, unsupported
from kvq_calib.runtime.cuda.launcher import Kernel, Launcher
from kvq_calib.runtime.cuda.structs import MAX_GRID, DecodeParams, check, pointer
from kvq_calib.runtime.slot_view import DecodeContext

__all__ = ["DecodeKernel", "DecodeStep", "DecodeVariant", "PagePool"]

#: Largest number of query heads per thread block; larger groups are divided.
MAX_GROUP = 8
#: Up to this many query heads per thread block, a matrix product takes two tokens.
FEW_HEADS = 4
#: Number of exact tokens (sinks and tail) per thread block.
EXACT_TOKENS = 64
_THREADS = 128
_SOURCE = "decode.cu"


@dataclass(frozen=True)
class PagePool:
    """Pages that an engine allocates, each for 256 tokens of one sequence. They have all data of a sequence.

    Attributes:
        pages: uint8 ``[N, page bytes]``, pages contiguous and a multiple of 16 bytes.
        table: int32 ``[B, n]``, contiguous: the number of the page with tokens ``256 i`` to ``256 i + 255`` of a
            sequence. Numbers of pages without a visible token are not read.
        key_codes, value_codes, value_token: offsets in a page of the codes and of the token scales of values, in bytes;
            multiples of 16. Codes are laid out as in a page of :class:`~kvq_calib.runtime.storage.PackedTensor` with
            batch 1.
        exact: int64 ``[B, 4]``, contiguous: addresses of the keys of sinks and of the tail, then of the values of both,
            ``[H, t, D]`` each.
        exact_counts: ``t`` of sinks and of the tail. The context masks tokens that a sequence does not have.
    """

    pages: Tensor
    table: Tensor
    key_codes: int
    value_codes: int
    value_token: int
    exact: Tensor
    exact_counts: tuple[int, int]


@dataclass(eq=False)
class DecodeStep:
    """One new token of every sequence, and the tokens it attends to in one layer.

    Attributes:
        query: float16 or bfloat16 ``[B, Hq, D]``, contiguous, rotated by the model.
        key_pages, value_pages: int64 ``[n, 6]``, see :class:`~kvq_calib.runtime.cuda.pages.PageTable`.
        exact: keys and values of sinks, then of the tail: storage dtype ``[B, H, t, D]``, with contiguous ``D`` and
            ``t``. Keys are un-rotated if they are rotated when read.
        context: the visible tokens and their positions.
        scaling: factor on the scores.
        first_page: number of the first page in ``context.blocks``.
        softcap: replaces scores by ``softcap * tanh(score / softcap)``; or ``None``.
        sink_logits: float ``[Hq]``, a logit per head without a value; or ``None``.
        pool: replaces ``key_pages``, ``value_pages`` (then ``None``) and ``exact`` (then empty).
        state: ``StepState`` on the device (:mod:`kvq_calib.runtime.cuda.step`), with the number of pages that have
            blocks, and the first token in the window; or ``None``.
        page_count: number of pages that are read for each sequence.
        exact_counts: numbers of sinks and of tokens in the tail.
    """

    query: Tensor
    key_pages: Tensor | None
    value_pages: Tensor | None
    exact: Sequence[tuple[Tensor, Tensor]]
    context: DecodeContext
    scaling: float
    first_page: int = 0
    softcap: float | None = None
    sink_logits: Tensor | None = None
    pool: PagePool | None = None
    state: Tensor | None = None

    page_count: int = field(init=False)
    exact_counts: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        if self.pool is not None:
            self.page_count, self.exact_counts = self.pool.table.shape[1], self.pool.exact_counts
            return
        (sinks, _), (tail, _) = self.exact
        self.page_count = 0 if self.key_pages is None else self.key_pages.shape[0]
        self.exact_counts = sinks.shape[2], tail.shape[2]


@dataclass(frozen=True)
class DecodeVariant:
    """The compile-time constants of ``decode.cu``; they are explained there."""

    head_dim: int
    heads: int
    key_bits: int
    value_bits: int
    outliers: bool
    key_paths: bool = False
    value_paths: bool = False

    @classmethod
    def of(cls, key: KernelTables, value: KernelTables, group: int) -> DecodeVariant:
        """The variant for a layer, and for this number of query heads in a thread block."""
        return cls(
            head_dim=key.head_dim,
            heads=FEW_HEADS if group <= FEW_HEADS else MAX_GROUP,
            key_bits=key.decode.bits,
            value_bits=value.decode.bits,
            outliers=key.cap > 0 or value.cap > 0,
            key_paths=key.decode.paths,
            value_paths=value.decode.paths,
        )

    @cached_property
    def defines(self) -> tuple[str, ...]:
        """Definitions for the compiler."""
        return tuple(f"KVQ_{each.name.upper()}={int(getattr(self, each.name))}" for each in fields(self))


@dataclass(frozen=True)
class _Division:
    """The division of a step's work.

    Attributes:
        group: number of query heads of a key-value head.
        subgroups: number of thread blocks that share these heads.
        packed: number of thread blocks that share the pages.
        exact: number of thread blocks that share sinks and tail.
    """

    group: int
    subgroups: int
    packed: int
    exact: int

    @property
    def splits(self) -> int:
        """Number of partial results to join."""
        return self.packed + self.exact


@dataclass(frozen=True)
class _Compiled:
    """The kernel of a variant, bytes of shared memory per thread block, and thread blocks per multiprocessor."""

    attention: Kernel
    shared_bytes: int
    resident: int


class DecodeKernel:
    """Attention of one token per sequence over packed pages and exact tokens, in one layer.

    Args:
        launcher: runs the kernels.
        key, value: the layer's tables.

    Raises:
        RuntimeMismatchError: there is no kernel for the layer.
    """

    def __init__(self, launcher: Launcher, key: KernelTables, value: KernelTables) -> None:
        reason = unsupported(key, value)
        if reason:
            raise RuntimeMismatchError(reason)
        self.launcher, self.key, self.value = launcher, key, value
        #: By query heads of a key-value head.
        self._compiled: dict[int, _Compiled] = {}
        #: The division of the last step with its input, and the division for which the parameters were set.
        self._division_of: tuple[tuple[int, ...], _Division] | None = None
        self._divided: _Division | None = None
        #: Number of finished splits for each thread block of heads. 0 between launches.
        self._arrived = torch.zeros(0, dtype=torch.int32, device=key.device)
        #: Parameters of the last launch. The driver copies them. Those that never change are set here.
        self._launch = DecodeParams(
            key_channels=key.decode.channels.data_ptr(),
            value_channels=value.decode.channels.data_ptr(),
            key_levels=key.decode.levels.data_ptr(),
            value_levels=value.decode.levels.data_ptr(),
            key_region=key.decode.region.data_ptr(),
            value_region=value.decode.region.data_ptr(),
            key_kinds=pointer(key.decode.kinds),
            value_kinds=pointer(value.decode.kinds),
            key_angles=key.decode.angles.data_ptr(),
            key_turns=key.decode.turns.data_ptr(),
            key_pair_scale=key.decode.pair_scale.data_ptr(),
            value_affine=value.decode.affine.data_ptr(),
            exact_angles=key.frequencies.data_ptr(),
            exact_pairs=key.pairs.data_ptr(),
            key_words=key.words,
            value_words=value.words,
            kv_heads=key.heads,
            rope_scaling=key.rope_scaling,
            key_rope=int(key.rotates),
            value_token=int(value.token),
            storage_bfloat=int(key.storage_bfloat),
        )

    def attend(self, step: DecodeStep) -> Tensor:
        """Compute attention of one token per sequence.

        Args:
            step: the token, and the tokens to which it attends.

        Returns:
            ``[B, Hq, D]`` in the dtype of the query.

        Raises:
            RuntimeMismatchError: a shape, dtype, stride or device is wrong, or no variant fits.
        """
        key = self.key
        _check_layer(key, step)
        if step.pool is None:
            _check_pages(key, step)
            _check_exact(key, step)
        else:
            self._check_pool(step, step.pool)
        batch, query_heads, size = step.query.shape
        if step.page_count + sum(step.exact_counts) == 0:
            return torch.zeros_like(step.query)
        compiled = self._variant(step)
        division = self._division(step, compiled.resident)
        shares = key.heads * division.subgroups
        if self._arrived.numel() < batch * shares:
            self._arrived = torch.zeros(batch * shares, dtype=torch.int32, device=key.device)
        # One allocation: partial results, then their maxima and sums.
        partials = batch * query_heads * division.splits
        partial = torch.empty(partials * (size + 2), dtype=torch.float32, device=key.device)
        out = torch.empty_like(step.query)
        logits = step.sink_logits
        if logits is not None:
            logits = logits.to(out.device, torch.float32).contiguous()
        params = self._params(step, division)
        params.partial, params.partial_sum = partial.data_ptr(), partial.data_ptr() + 4 * partials * size
        params.arrived, params.out, params.sink_logits = (
            self._arrived.data_ptr(),
            out.data_ptr(),
            pointer(logits),
        )
        compiled.attention((division.splits, shares, batch), _THREADS, compiled.shared_bytes, params)
        return out

    def _division(self, step: DecodeStep, resident: int) -> _Division:
        batch, query_heads, _ = step.query.shape
        known = batch, query_heads, step.page_count, *step.exact_counts
        if self._division_of is None or self._division_of[0] != known:
            blocks = resident * self.launcher.multiprocessors
            shape = self.key.heads, batch, query_heads, step.page_count, sum(step.exact_counts)
            self._division_of = known, _divide(blocks, *shape)
        return self._division_of[1]

    def _variant(self, step: DecodeStep) -> _Compiled:
        group = step.query.shape[1] // self.key.heads
        if group not in self._compiled:
            self._compiled[group] = self._compile(-(-group // _subgroups(group)))
        return self._compiled[group]

    def _compile(self, group: int) -> _Compiled:
        key, launcher = self.key, self.launcher
        variant = DecodeVariant.of(key, self.value, group)
        shared = launcher.constant(_SOURCE, variant.defines, "decode_shared_bytes")
        if shared > launcher.shared_limit:
            raise RuntimeMismatchError(
                f"{group} query heads of {key.head_dim} channels need {shared} bytes of shared memory, "
                f"this GPU has {launcher.shared_limit}"
            )
        resident = launcher.constant(_SOURCE, variant.defines, "decode_resident_blocks")
        return _Compiled(
            launcher.kernel(_SOURCE, variant.defines, "decode_attention", DecodeParams),
            shared,
            # A multiprocessor reserves 1 KiB per thread block. It has 1 KiB more than one block can request.
            min(resident, (launcher.shared_limit + 1024) // (shared + 1024)),
        )

    def _params(self, step: DecodeStep, division: _Division) -> DecodeParams:
        """The parameters of the launch. The structure is reused, and only what changes between steps is set."""
        params, query_heads, context = self._launch, step.query.shape[1], step.context
        if division is not self._divided:
            self._divided = division
            params.query_heads, params.group, params.subgroups = (
                query_heads,
                division.group,
                division.subgroups,
            )
            params.pages, params.packed_splits = step.page_count, division.packed
            params.splits = division.splits
            for number, count in enumerate(step.exact_counts):
                params.exact_count[number] = count
        params.query, params.query_bfloat = step.query.data_ptr(), int(step.query.dtype == torch.bfloat16)
        params.state = pointer(step.state)
        params.blocks, params.exact_positions = context.blocks.data_ptr(), context.exact_positions.data_ptr()
        params.first_page, params.first_token = step.first_page, context.first_token
        params.scaling, params.softcap = step.scaling, step.softcap or 0.0
        params.block_stride = context.blocks.shape[1]
        if step.pool is not None:
            self._point_to_pool(params, step.pool)
            return params
        assert step.key_pages is not None
        assert step.value_pages is not None
        params.pool_table = None
        params.key_pages, params.value_pages = step.key_pages.data_ptr(), step.value_pages.data_ptr()
        (sink_keys, sink_values), (tail_keys, tail_values) = step.exact
        params.exact_key[0], params.exact_key[1] = sink_keys.data_ptr(), tail_keys.data_ptr()
        params.exact_value[0], params.exact_value[1] = sink_values.data_ptr(), tail_values.data_ptr()
        params.exact_stride[:] = *sink_keys.stride()[:2], *tail_keys.stride()[:2]
        return params

    def _check_pool(self, step: DecodeStep, pool: PagePool) -> None:
        """Check that pages of a pool have the kernel's format."""
        key, value, batch = self.key, self.value, step.query.shape[0]
        if key.cap or value.cap:
            raise RuntimeMismatchError(
                "pages of a pool have no room for outliers; use a recipe without outliers"
            )
        if step.first_page:
            raise RuntimeMismatchError("pages of a pool are read from page 0, so first_page has to be 0")
        pages = pool.pages
        if (
            pages.device != key.device
            or pages.dtype != torch.uint8
            or pages.ndim != 2
            or pages.stride(1) != 1
        ):
            raise RuntimeMismatchError(f"the pool is {pages.dtype} {tuple(pages.shape)} on {pages.device}")
        ends = pool.key_codes + 4 * key.words, pool.value_codes + 4 * value.words
        starts = pool.key_codes, pool.value_codes, pool.value_token, pages.stride(0), pages.data_ptr()
        if max(ends) > pages.shape[1] or any(start % 16 for start in starts):
            raise RuntimeMismatchError(
                f"codes and scales do not fit in pages of {pages.shape[1]} bytes, or are not aligned to 16 bytes"
            )
        check("the table of pages", pool.table, (batch, pool.table.shape[1]), torch.int32, key.device)
        check("addresses of exact tokens", pool.exact, (batch, 4), torch.int64, key.device)

    def _point_to_pool(self, params: DecodeParams, pool: PagePool) -> None:
        params.pool_table, params.pool = pool.table.data_ptr(), pool.pages.data_ptr()
        params.pool_exact = pool.exact.data_ptr()
        params.pool_bytes = pool.pages.stride(0)
        params.pool_offset[:] = pool.key_codes, pool.value_codes, pool.value_token
        params.pool_stride = pool.table.shape[1]
        size = self.key.head_dim
        params.exact_stride[:] = 0, pool.exact_counts[0] * size, 0, pool.exact_counts[1] * size


def _check_pages(key: KernelTables, step: DecodeStep) -> None:
    """Check that both tables of pages have the kernel's format."""
    for name, table in (("key_pages", step.key_pages), ("value_pages", step.value_pages)):
        if table is None:
            raise RuntimeMismatchError(f"{name} are missing")
        check(name, table, (step.page_count, 6), torch.int64, key.device)


def _check_layer(key: KernelTables, step: DecodeStep) -> None:
    """Check that queries, pages and context have the kernel's format."""
    query, device = step.query, key.device
    batch, query_heads = query.shape[:2]
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeMismatchError(f"queries are {query.dtype}; the kernels take float16 and bfloat16")
    check("query", query, (batch, query_heads, key.head_dim), query.dtype, device)
    if query_heads % key.heads:
        raise RuntimeMismatchError(
            f"{query_heads} query heads are not a multiple of {key.heads} key-value heads"
        )
    pages, context = step.page_count, step.context
    blocks = context.blocks.shape[1]
    if blocks < (step.first_page + pages) * PAGE_BLOCKS:
        raise RuntimeMismatchError(f"the block table has {blocks} blocks, but the pages have more")
    # Their dtypes and strides were checked when the context was made, once for all layers.
    for name, tensor, shape in (
        ("blocks", context.blocks, (batch, blocks, 2)),
        ("exact_positions", context.exact_positions, (batch, sum(step.exact_counts))),
    ):
        if tensor.device != device or tensor.shape != shape:
            raise RuntimeMismatchError(
                f"{name} are {tuple(tensor.shape)} on {tensor.device}, expected {shape} on {device}"
            )


def _check_exact(key: KernelTables, step: DecodeStep) -> None:
    """Check that sinks and tail have the kernel's format."""
    size, device, storage = key.head_dim, key.device, key.storage
    for keys, values in step.exact:
        shape, strides = keys.shape, keys.stride()
        for name, tensor in (("exact keys", keys), ("exact values", values)):
            if tensor.device != device or tensor.dtype != storage or tensor.shape != shape:
                raise RuntimeMismatchError(
                    f"{name} are {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                    f"expected {storage} {tuple(shape)} on {device}"
                )
            own = tensor.stride()
            if (own[2:] != (size, 1) or own != strides) and tensor.numel():
                raise RuntimeMismatchError(f"{name} have strides {own}; make them contiguous")


def _subgroups(group: int) -> int:
    """Number of thread blocks that share the query heads of a key-value head."""
    return -(-group // MAX_GROUP)


def _divide(
    resident: int, heads: int, batch: int, query_heads: int, pages: int, exact_tokens: int
) -> _Division:
    """Divide the work of a step, for this number of concurrent thread blocks."""
    group = query_heads // heads
    subgroups = _subgroups(group)
    blocks = heads * subgroups * batch
    if heads * subgroups > MAX_GRID or batch > MAX_GRID:
        raise RuntimeMismatchError(f"{batch} sequences of {heads} heads are more than one launch can handle")
    # All thread blocks should run at once, including those for exact tokens. Each of a block's four warps takes a page.
    exact = -(-exact_tokens // EXACT_TOKENS)
    packed = min(max(resident // blocks - exact, 1), -(-pages // 4))
    return _Division(group, subgroups, packed, exact)
