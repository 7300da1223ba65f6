"""Tokens that the calibration text does not have.

A few windows of text hold a tenth of a vocabulary. Keys and values of the first layer are functions of the token
alone, and those of the next few layers nearly are, so a token that another text uses often may lie far from
everything that was seen. The model can be asked what they are: with tokens drawn from the vocabulary put into the
text.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sample_tokens", "sampled_positions", "with_vocabulary_samples"]

#: Vocabularies are numbered about in the order of how common their tokens are (merges of byte-pair encoding, scores of
#: unigram models), so tokens are drawn by Zipf's law of their number. The first thousand (bytes, special tokens and the
#: commonest words) count alike.
_ALIKE = 1000
#: Every second token is drawn, from the second on.
_FIRST = 1
_STEP = 2


def sample_tokens(vocabulary: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw tokens from the vocabulary, token ``n`` in proportion to ``1 / (n + 1000)``: int64 ``[count]``."""
    odds = 1.0 / (torch.arange(vocabulary, dtype=torch.float64) + _ALIKE)
    return torch.multinomial(odds, max(count, 1), replacement=True, generator=generator)[:count]


def with_vocabulary_samples(ids: Tensor, vocabulary: int, seed: int) -> Tensor:
    """Replace every second token of ``ids [N, T]``, from the second on, by one drawn from the vocabulary."""
    text = ids.clone()
    places = text[:, _FIRST::_STEP]
    found = sample_tokens(vocabulary, places.numel(), torch.Generator().manual_seed(seed))
    places.copy_(found.view(places.shape))
    return text


def sampled_positions(first: int) -> slice:
    """Positions of the drawn tokens of a window from ``first`` on."""
    return slice(first + (first - _FIRST) % _STEP, None, _STEP)
