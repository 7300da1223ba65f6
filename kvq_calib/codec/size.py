"""Bytes of a packed cache, from the layout of its pages. Artifacts and memory reports use these formulas.

Tests compare them with the bytes of filled caches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvq_calib.codec.packing import BLOCK_TOKENS, OUTLIER_INDEX_BYTES, PAGE_TOKENS, STORAGE_BYTES, PageLayout

__all__ = ["CacheShape", "TensorShape", "cache_bytes", "packed_tokens"]


def packed_tokens(context: int, recent_tokens: int = 0, sliding_window: int | None = None) -> tuple[int, int]:
    """The tokens of a text that are in packed blocks, from ``first`` up to ``stop``: ``(first, stop)``.

    Whole blocks older than the recent window are packed. A layer with a sliding window has freed the pages of which its
    newest query sees no token.
    """
    stop = max(context - recent_tokens, 0) // BLOCK_TOKENS * BLOCK_TOKENS
    if sliding_window is None:
        return 0, stop
    return min(max(context - sliding_window, 0), stop) // PAGE_TOKENS * PAGE_TOKENS, stop


@dataclass(frozen=True)
class CacheShape:
    """The number of tokens in a cache.

    Attributes:
        context: tokens of one sequence.
        batch: sequences.
        sink_tokens, recent_tokens: first and newest tokens that stay exact.
    """

    context: int
    batch: int = 1
    sink_tokens: int = 0
    recent_tokens: int = 0

    def shared_bytes(self) -> dict[str, float]:
        """Bytes that layers share: the position of each slot, place and fill of each block, and the slots of sinks."""
        _, packed = packed_tokens(self.context, self.recent_tokens)
        return {
            "positions": 4 * PAGE_TOKENS * -(-self.context // PAGE_TOKENS) * self.batch,
            "block_table": 2 * 4 * (packed // BLOCK_TOKENS),
            "sink_slots": 4 * self.batch * self.sink_tokens,
        }


@dataclass(frozen=True)
class TensorShape:
    """What determines the bytes of one layer's keys or values.

    Attributes:
        layout: layout of the pages.
        sliding_window: sliding window of the layer in tokens, or ``None``.
        outliers_per_token: measured or expected number of outliers of a token.
        parameters: bytes of the calibrated parameters.
    """

    layout: PageLayout
    sliding_window: int | None
    outliers_per_token: float
    parameters: float

    def bytes(self, cache: CacheShape) -> dict[str, float]:
        """Bytes by kind of buffer. Pages are allocated as a whole. Tokens of an unfilled block are exact."""
        layout, batch = self.layout, cache.batch
        first, stop = packed_tokens(cache.context, cache.recent_tokens, self.sliding_window)
        pages = -(-stop // PAGE_TOKENS) - first // PAGE_TOKENS
        token_bytes = STORAGE_BYTES * layout.channels * batch
        sizes: dict[str, float] = {name: pages * size for name, size in layout.page_bytes(batch).items()}
        if layout.outlier_cap:
            entries = self.outliers_per_token * (stop - first) * batch
            sizes["outlier_entries"] = (OUTLIER_INDEX_BYTES + STORAGE_BYTES) * entries
        sizes["exact_sinks"] = cache.sink_tokens * token_bytes
        sizes["exact_recent"] = (cache.context - stop) * token_bytes
        sizes["parameters"] = self.parameters
        return sizes


def cache_bytes(tensors: Iterable[TensorShape], cache: CacheShape) -> dict[str, float]:
    """Bytes of a cache by kind of buffer: keys and values of all layers, and what layers share."""
    total: dict[str, float] = {}
    for tensor in tensors:
        for name, size in tensor.bytes(cache).items():
            total[name] = total.get(name, 0.0) + size
    return total | cache.shared_bytes()
