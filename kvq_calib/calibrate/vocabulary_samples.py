"""Tokens that the calibration text does not have.

A few windows of text hold a tenth of a vocabulary. Keys and values of the first layer are functions of the token alone, and
those of the next few layers nearly are, so a token that another text uses often may lie far from everything that was
seen. What it would give is no secret: the model can be asked.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["drawn", "strewn"]

#: Vocabularies are numbered about in the order of how common their tokens are (merges of byte-pair encoding, scores of
#: unigram models), so tokens are drawn by Zipf's law of their number. The first thousand (bytes, special tokens and the
#: commonest words) count alike.
_ALIKE = 1000


def drawn(vocabulary: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw tokens from the vocabulary, token ``n`` in proportion to ``1 / (n + 1000)``: int64 ``[count]``."""
    odds = 1.0 / (torch.arange(vocabulary, dtype=torch.float64) + _ALIKE)
    return torch.multinomial(odds, max(count, 1), replacement=True, generator=generator)[:count]


def strewn(ids: Tensor, vocabulary: int, seed: int) -> Tensor:
    """Replace the tokens at odd places by drawn ones: int64 ``[N, T]``, as ``ids``."""
    text = ids.clone()
    places = text[:, 1::2]
    found = drawn(vocabulary, places.numel(), torch.Generator().manual_seed(seed))
    places.copy_(found.view(places.shape))
    return text
