"""Logits of a text that goes through the packed cache: what is measured is what the runtime does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvq_calib.artifact.artifact import KVArtifact
from kvq_calib.model.compat import with_cache
from kvq_calib.runtime import KVQCache, attached

__all__ = ["decode_logits"]


@torch.no_grad()
def decode_logits(
    model: Any,
    artifact: KVArtifact,
    ids: Tensor,
    *,
    chunk: int = 256,
    recent_tokens: int | None = None,
) -> Tensor:
    """Teacher-forced logits through a :class:`~kvq_calib.runtime.KVQCache`.

    Whole blocks of 32 tokens are packed as soon as their last token is stored, before attention of the same
    call reads them; the newest tokens that fill no block are still exact. So a smaller ``chunk`` leaves a
    little more exact: with ``chunk=1`` every token sees up to 31 exact neighbours, as in generation.

    Args:
        model: the unquantized causal language model; left as it was.
        artifact: what packs the cache.
        ids: int64 ``[B, T]``.
        chunk: tokens per call.
        recent_tokens: exact window; the artifact's by default.

    Returns:
        ``[B, T, vocabulary]`` in the dtype of the model.
    """
    with attached(model):
        cache = KVQCache(artifact, model, recent_tokens=recent_tokens)
        parts = [model(input_ids=part, **with_cache(cache)).logits for part in torch.split(ids, chunk, dim=1)]
    return torch.cat(parts, dim=1)
