"""Appends new tokens to an exact tail and un-rotates their keys, in one call instead of a dozen."""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor

from kvq_calib.native.checks import are_numbers, check
from kvq_calib.native.loader import KvqJoin, Library

__all__ = ["Joiner"]


class Joiner:
    """Appends new tokens to the exact tail of a layer.

    Args:
        library: the library to call.
        storage: float16 or bfloat16.
        pair: int32 ``[P, 2]``, the coordinates of each RoPE pair; ``None`` if keys are stored as they come.
    """

    def __init__(self, library: Library, storage: torch.dtype, pair: Tensor | None) -> None:
        self.library, self.storage, self.pair = library, storage, pair
        self.least_width = 0 if pair is None or not len(pair) else int(pair.max()) + 1
        self._call = KvqJoin()
        self._call.bfloat = storage == torch.bfloat16
        self._argument = ctypes.byref(self._call)
        #: Copies of a cache share this object, and threads may have one each.
        self._lock = threading.Lock()

    def join(
        self, tail: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], angles: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor] | None:
        """The tail with the new tokens appended.

        Args:
            tail: keys and values, storage dtype ``[B, H, t, D]``, contiguous within a head.
            new: keys and values, float32 ``[B, H, T, D]``, contiguous in ``D``.
            angles: factors of the coordinates, and of their partners, which are added: float32 ``[B or 1, T, W]`` each,
                contiguous, ``W`` at most ``D``. For the first of a pair, the partner's share is subtracted.

        Returns:
            Keys and values, storage dtype ``[B, H, t + T, D]`` each; ``None`` if a number is not finite in that dtype.

        Raises:
            ValueError: a tensor has a wrong dtype, shape or layout.
        """
        with self._lock:
            call = self._call
            batch, heads, tokens, _ = new[0].shape
            held = tail[0].shape[2]
            call.batch, call.heads, call.held, call.tokens = batch, heads, held, tokens
            out = []
            for side, (x, before) in enumerate(zip(new, tail, strict=True)):
                size = x.shape[3]
                check("new", x, torch.float32, (batch, heads, tokens, size), contiguous=False)
                check("tail", before, self.storage, (batch, heads, held, size), contiguous=False)
                stride, own = x.stride(), before.stride()
                if stride[3] != 1 or (held and own[2:] != (size, 1)):
                    raise ValueError(
                        "new: coordinates, or the tail's tokens of a head, do not follow each other"
                    )
                joined = torch.empty(batch, heads, held + tokens, size, dtype=self.storage)
                call.size[side], call.x[side], call.tail[side] = size, x.data_ptr(), before.data_ptr()
                call.stride[side][:] = stride[:3]
                call.tail_stride[side][:] = own[:2]
                call.out[side] = joined.data_ptr()
                out.append(joined)
            call.pairs = 0
            if angles is not None and self.pair is not None:
                cosine, sine = angles
                width = cosine.shape[-1]
                for each in angles:
                    check("angles", each, torch.float32, (len(cosine), tokens, width))
                if not self.least_width <= width <= call.size[0] or len(cosine) not in (1, batch):
                    raise ValueError(f"angles: {width} columns of {len(cosine)} sequences")
                call.pairs, call.pair, call.width = len(self.pair), self.pair.data_ptr(), width
                call.cosine, call.sine = cosine.data_ptr(), sine.data_ptr()
                call.angle_stride = 0 if len(cosine) == 1 else tokens * width
            status = self.library.functions.kvq_join(self._argument)
            return (out[0], out[1]) if are_numbers(status) else None
