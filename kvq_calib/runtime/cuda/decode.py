"""Attention of one new token per sequence: the kernels of ``decode.cu``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from kvq_calib.codec.packing import PAGE_BLOCKS
from kvq_calib.errors import RuntimeMismatchError
from kvq_calib.runtime.cuda.decode_tables import KernelTables, unsupported
from kvq_calib.runtime.cuda.launcher import Launcher
from kvq_calib.runtime.cuda.structs import MAX_GRID, DecodeParams, ReduceParams, check, pointer
from kvq_calib.runtime.slot_view import DecodeContext

__all__ = ["DecodeStep", "DecodeVariant", "decode_attention"]

#: Query heads one thread block serves; larger groups are divided.
MAX_GROUP = 8
#: Exact tokens (sinks and tail) one thread block attends to.
EXACT_TOKENS = 64
_THREADS = 128
_SOURCE = "decode.cu"


@dataclass(frozen=True)
class DecodeStep:
    """One new token of every sequence, and what it attends to in one layer.

    Attributes:
        query: float16 or bfloat16 ``[B, Hq, D]``, contiguous, rotated by the model.
        key_pages, value_pages: int64 ``[n, 6]``, see :class:`~kvq_calib.runtime.cuda.pages.PageTable`.
        exact: two pairs of keys (un-rotated where they are rotated on read) and values: sinks, then tail;
            storage dtype ``[B, H, t, D]`` with contiguous ``D`` and ``t``.
        context: which tokens are attended, and where they stand.
        scaling: factor on the scores.
        first_page: number of the first page in ``context.blocks``.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sink_logits: float ``[Hq]``, a logit per head without a value; or ``None``.
    """

    query: Tensor
    key_pages: Tensor
    value_pages: Tensor
    exact: Sequence[tuple[Tensor, Tensor]]
    context: DecodeContext
    scaling: float
    first_page: int = 0
    softcap: float | None = None
    sink_logits: Tensor | None = None

    @property
    def exact_counts(self) -> list[int]:
        """Sinks, and tokens of the tail."""
        return [keys.shape[2] for keys, _ in self.exact]


@dataclass(frozen=True)
class DecodeVariant:
    """The compile-time constants of ``decode.cu``, see there."""

    head_dim: int
    group: int
    key_bits: int
    value_bits: int
    key_outliers: bool
    value_outliers: bool
    value_token: bool
    rope: bool
    softcap: bool
    query_bfloat: bool
    storage_bfloat: bool
    key_paths: bool = False
    value_paths: bool = False

    @property
    def defines(self) -> tuple[str, ...]:
        """As the compiler takes them."""
        return tuple(f"KVQ_{field.name.upper()}={int(getattr(self, field.name))}" for field in fields(self))


@dataclass(frozen=True)
class _Division:
    """How the work of a step is divided.

    Attributes:
        group: query heads of a key-value head.
        subgroups: thread blocks that share them.
        packed: thread blocks that share the pages.
        exact: thread blocks that share sinks and tail.
    """

    group: int
    subgroups: int
    packed: int
    exact: int

    @property
    def splits(self) -> int:
        """Partial results to be joined."""
        return self.packed + self.exact


def decode_attention(launcher: Launcher, key: KernelTables, value: KernelTables, step: DecodeStep) -> Tensor:
    """Attention of one token per sequence over packed pages and exact tokens.

    Args:
        launcher: runs the kernels.
        key, value: the layer's tables.
        step: the token, and what it attends to.

    Returns:
        ``[B, Hq, D]`` in the dtype of the query.

    Raises:
        RuntimeMismatchError: a shape, dtype, stride or device is not as promised, or has no variant.
    """
    _check_layer(key, value, step)
    _check_exact(key, step)
    division = _divide(launcher, key, step)
    if division.splits == 0:
        return torch.zeros_like(step.query)
    variant = _variant(key, value, step, division)
    shared = launcher.constant(_SOURCE, variant.defines, "decode_shared_bytes")
    if shared > launcher.shared_limit:
        raise RuntimeMismatchError(
            f"{variant.group} queries of {key.head_dim} channels per head need {shared} bytes of shared memory, "
            f"this GPU has {launcher.shared_limit}"
        )
    batch, query_heads, size = step.query.shape
    shape = (batch, query_heads, division.splits)
    partial = torch.empty(*shape, size, dtype=torch.float32, device=key.device)
    partial_sum = torch.empty(*shape, 2, dtype=torch.float32, device=key.device)
    params = _params(key, value, step, division, (partial, partial_sum))
    grid = (division.splits, key.heads * division.subgroups, batch)
    launcher.launch(_SOURCE, variant.defines, "decode_attention", grid, _THREADS, shared, params)
    return _reduce(launcher, variant, step, division, (partial, partial_sum))


def _check_layer(key: KernelTables, value: KernelTables, step: DecodeStep) -> None:
    """Queries, pages and context are as the kernel takes them."""
    reason = unsupported(key, value)
    if reason:
        raise RuntimeMismatchError(reason)
    query, device = step.query, key.device
    batch, query_heads = query.shape[:2]
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeMismatchError(f"queries are {query.dtype}; the kernels take float16 and bfloat16")
    check("query", query, (batch, query_heads, key.head_dim), query.dtype, device)
    if query_heads % key.heads:
        raise RuntimeMismatchError(
            f"{query_heads} query heads are no multiple of {key.heads} key-value heads"
        )
    pages = step.key_pages.shape[0]
    check("key_pages", step.key_pages, (pages, 6), torch.int64, device)
    check("value_pages", step.value_pages, (pages, 6), torch.int64, device)
    blocks = step.context.blocks.shape[1]
    if blocks < (step.first_page + pages) * PAGE_BLOCKS:
        raise RuntimeMismatchError(f"the block table lists {blocks} blocks, the pages hold more")
    check("blocks", step.context.blocks, (batch, blocks, 2), torch.int32, device)
    positions = step.context.exact_positions
    check("exact_positions", positions, (batch, sum(step.exact_counts)), torch.int32, device)


def _check_exact(key: KernelTables, step: DecodeStep) -> None:
    """Sinks and tail are as the kernel takes them."""
    size, device = key.head_dim, key.device
    for keys, values in step.exact:
        for name, tensor in (("exact keys", keys), ("exact values", values)):
            if tensor.device != device or tensor.dtype != key.storage or tensor.shape != keys.shape:
                raise RuntimeMismatchError(
                    f"{name} are {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                    f"expected {key.storage} {tuple(keys.shape)} on {device}"
                )
            strides = tensor.stride() if tensor.numel() else (0, 0, size, 1)
            if strides[2:] != (size, 1) or (tensor.numel() and strides != keys.stride()):
                raise RuntimeMismatchError(f"{name} have strides {strides}; make them contiguous")


def _divide(launcher: Launcher, key: KernelTables, step: DecodeStep) -> _Division:
    batch, query_heads, _ = step.query.shape
    group = query_heads // key.heads
    subgroups = -(-group // MAX_GROUP)
    blocks = key.heads * subgroups * batch
    if key.heads * subgroups > MAX_GRID or batch > MAX_GRID:
        raise RuntimeMismatchError(f"{batch} sequences of {key.heads} heads are more than one launch takes")
    # Two thread blocks share a multiprocessor; a block has four warps, which take a page each.
    packed = min(max(2 * launcher.multiprocessors // blocks, 1), -(-step.key_pages.shape[0] // 4))
    return _Division(group, subgroups, packed, -(-sum(step.exact_counts) // EXACT_TOKENS))


def _variant(key: KernelTables, value: KernelTables, step: DecodeStep, division: _Division) -> DecodeVariant:
    return DecodeVariant(
        head_dim=key.head_dim,
        group=-(-division.group // division.subgroups),
        key_bits=key.decode.bits,
        value_bits=value.decode.bits,
        key_outliers=key.cap > 0,
        value_outliers=value.cap > 0,
        value_token=value.token,
        rope=key.rotates,
        softcap=step.softcap is not None,
        query_bfloat=step.query.dtype == torch.bfloat16,
        storage_bfloat=key.storage_bfloat,
        key_paths=key.decode.paths,
        value_paths=value.decode.paths,
    )


def _params(
    key: KernelTables,
    value: KernelTables,
    step: DecodeStep,
    division: _Division,
    partial: tuple[Tensor, Tensor],
) -> DecodeParams:
    params = DecodeParams(
        query=step.query.data_ptr(),
        key_pages=pointer(step.key_pages),
        value_pages=pointer(step.value_pages),
        blocks=pointer(step.context.blocks),
        key_channels=key.decode.channels.data_ptr(),
        value_channels=value.decode.channels.data_ptr(),
        key_levels=key.decode.levels.data_ptr(),
        value_levels=value.decode.levels.data_ptr(),
        key_kinds=pointer(key.decode.kinds),
        value_kinds=pointer(value.decode.kinds),
        key_angles=key.decode.angles.data_ptr(),
        key_pair_scale=key.decode.pair_scale.data_ptr(),
        value_affine=value.decode.affine.data_ptr(),
        exact_positions=pointer(step.context.exact_positions),
        exact_angles=key.frequencies.data_ptr(),
        exact_pairs=key.pairs.data_ptr(),
        partial=partial[0].data_ptr(),
        partial_sum=partial[1].data_ptr(),
        key_words=key.words,
        value_words=value.words,
        kv_heads=key.heads,
        query_heads=step.query.shape[1],
        subgroups=division.subgroups,
        group=division.group,
        first_page=step.first_page,
        pages=step.key_pages.shape[0],
        packed_splits=division.packed,
        splits=division.splits,
        first_token=step.context.first_token,
        scaling=step.scaling,
        softcap=step.softcap or 0.0,
        rope_scaling=key.rope_scaling,
        key_rope=int(key.rotates),
        block_stride=step.context.blocks.shape[1],
    )
    for number, (keys, values) in enumerate(step.exact):
        params.exact_key[number], params.exact_value[number] = pointer(keys), pointer(values)
        params.exact_stride[2 * number], params.exact_stride[2 * number + 1] = keys.stride()[:2]
        params.exact_count[number] = keys.shape[2]
    return params


def _reduce(
    launcher: Launcher,
    variant: DecodeVariant,
    step: DecodeStep,
    division: _Division,
    partial: tuple[Tensor, Tensor],
) -> Tensor:
    """Join the partial results of the splits."""
    batch, query_heads, _ = step.query.shape
    out = torch.empty_like(step.query)
    logits = step.sink_logits
    if logits is not None:
        logits = logits.to(out.device, torch.float32).contiguous()
    params = ReduceParams(
        partial=partial[0].data_ptr(),
        partial_sum=partial[1].data_ptr(),
        sink_logits=pointer(logits),
        out=out.data_ptr(),
        packed_splits=division.packed,
        splits=division.splits,
    )
    shared = 4 * division.splits
    launcher.launch(
        _SOURCE, variant.defines, "reduce_splits", (query_heads, batch, 1), _THREADS, shared, params
    )
    return out
