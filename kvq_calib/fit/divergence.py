"""KL divergence between predictions of the next token, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

__all__ = ["CHUNK_TOKENS", "chunks", "kl_divergence"]

#: Number of tokens to compare at a time; each has a distribution over the vocabulary.
CHUNK_TOKENS = 256


def chunks(tokens: int, size: int = CHUNK_TOKENS) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``range(tokens)``."""
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL divergence from ``p`` to ``q`` in nats: ``sum p (log p - log q)`` over the vocabulary.

    Args:
        log_p, log_q: log probabilities, float32 ``[..., V]``.

    Returns:
        float32 ``[...]``; slightly below 0 in rare cases, from rounding.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)
