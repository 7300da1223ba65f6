"""How far two predictions of the next token are apart; the same numbers for training and for evaluation."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

__all__ = ["CHUNK_TOKENS", "chunks", "kl_divergence"]

#: Tokens whose distributions over the vocabulary are compared at one time.
CHUNK_TOKENS = 256


def chunks(tokens: int, size: int = CHUNK_TOKENS) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``range(tokens)`` in order."""
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL divergence from ``p`` to ``q`` in nats: ``sum p (log p - log q)`` over the vocabulary.

    Args:
        log_p, log_q: log probabilities, float32 ``[..., V]``.

    Returns:
        float32 ``[...]``; rounding can leave it a little below 0.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)
