"""A text that goes through a cache, a few tokens at a time: what is measured is what is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvq_calib.model.compat import with_cache
from kvq_calib.runtime import attached

__all__ = ["SHORT_CHUNK", "AttachedHooks", "logits_through"]

#: Tokens per pass where a window of recent exact tokens matters: short, so that what is exact is the window and not
#: the chunk. A block of the packed cache has as many.
SHORT_CHUNK = 32


@torch.no_grad()
def logits_through(model: Any, cache: Any, ids: Tensor, chunk: int = SHORT_CHUNK) -> Tensor:
    """Teacher-forced logits ``[B, T, V]`` of ``ids`` (int64 ``[B, T]``) through an empty cache.

    The packed cache packs whole blocks of 32 tokens as soon as their last token is stored, before attention of the same
    pass reads them; the newest tokens that fill no block are still exact. So a smaller ``chunk`` leaves a little more
    exact: with ``chunk=1`` every token sees up to 31 exact neighbours, as in generation.

    Args:
        model: the unquantized causal language model, attached where ``cache`` is packed.
        cache: any cache of transformers.
        ids: the text.
        chunk: tokens per pass; single ones where ``cache`` is packed and the model takes no others.
    """
    if getattr(cache, "single_tokens", False):
        chunk = 1
    parts = [model(input_ids=part, **with_cache(cache)).logits for part in torch.split(ids, chunk, dim=1)]
    return torch.cat(parts, dim=1)


class AttachedHooks:
    """What a packed cache needs on the model."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Attach the model for a while."""
        with attached(self._model):
            yield
