"""Runs a text through a cache, a few tokens at a time, so that the cache is measured as it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvq_calib.model.inspect import next_pass
from kvq_calib.runtime import attached

__all__ = ["SHORT_CHUNK", "AttachedHooks", "logits_through", "read_into"]

#: Tokens per pass for an artifact with a window of recent exact tokens. It is short, so that mostly the window and not
#: the chunk is exact. It equals a block of the packed cache.
SHORT_CHUNK = 32


@torch.no_grad()
def logits_through(model: Any, cache: Any, ids: Tensor, chunk: int = SHORT_CHUNK) -> Tensor:
    """Teacher-forced logits ``[B, T, V]`` of ``ids`` (int64 ``[B, T]``), which go on from what ``cache`` holds.

    The packed cache packs a block of 32 tokens as soon as its last token is stored, before attention of the same pass
    reads it; in passes of one token, after attention. The newest tokens are exact until their block is full. So a
    smaller ``chunk`` leaves slightly more tokens exact: with ``chunk=1`` every token sees up to 31 exact neighbours, as
    in generation.

    Args:
        model: the unquantized causal language model, attached if ``cache`` is packed.
        cache: any transformers cache.
        ids: the text.
        chunk: tokens per pass. If ``cache`` is packed and the model takes only single tokens, it is 1 after the first
            pass.
    """
    parts = [model(**arguments).logits for arguments in _passes(model, cache, ids, chunk)]
    return torch.cat(parts, dim=1)


@torch.no_grad()
def read_into(model: Any, cache: Any, ids: Tensor, chunk: int) -> Tensor:
    """Let ``cache`` hold ``ids`` (int64 ``[B, T]``) too; arguments as for :func:`logits_through`.

    Returns:
        Logits ``[B, V]`` of the token after them; those of all others are never made.
    """
    for arguments in _passes(model, cache, ids, chunk):
        logits: Tensor = model(**arguments, logits_to_keep=1).logits[:, -1]
    return logits


def _passes(model: Any, cache: Any, ids: Tensor, chunk: int) -> Iterator[dict[str, Any]]:
    """Arguments of each pass, to be asked for when the pass before it is done."""
    sizes: int | list[int] = chunk
    if getattr(cache, "single_tokens", False):
        # A beginning of one token would be shorter than a convolution, whose state some families then get wrong.
        first = 1 if cache.get_seq_length() else min(chunk, ids.shape[1])
        sizes = [first, *[1] * (ids.shape[1] - first)]
    for part in torch.split(ids, sizes, dim=1):
        yield next_pass(model, part, cache, cache.get_seq_length())


class AttachedHooks:
    """The hooks on the model that packed caches need."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Attach the model, and detach it on leaving."""
        with attached(self._model):
            yield
