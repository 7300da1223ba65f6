"""Vocabulary samples: tokens that are missing from the calibration text.

A few windows of text contain a tenth of a vocabulary. Keys and values of the first layer depend only on the token, and
those of the next few layers nearly so. So a token that is frequent in another text may have keys and values far from
all that were seen. Tokens drawn from the vocabulary are therefore put into the text.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sample_tokens", "sampled_positions", "with_vocabulary_samples"]

#: Token ids roughly follow the frequency of tokens (merges of byte-pair encoding, scores of unigram models). So tokens
#: are drawn by Zipf's law of their id, with about equal probabilities for the first thousand (bytes, special tokens and
#: the most common words).
_ALIKE = 1000
#: Every second token is replaced, starting with the second.
_FIRST = 1
_STEP = 2


def sample_tokens(vocabulary: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw tokens from the vocabulary, token ``n`` in proportion to ``1 / (n + 1000)``: int64 ``[count]``."""
    odds = 1.0 / (torch.arange(vocabulary, dtype=torch.float64) + _ALIKE)
    return torch.multinomial(odds, max(count, 1), replacement=True, generator=generator)[:count]


def with_vocabulary_samples(ids: Tensor, vocabulary: int, seed: int) -> Tensor:
    """Replace every second token of ``ids [N, T]``, starting with the second, by one drawn from the vocabulary."""
    text = ids.clone()
    places = text[:, _FIRST::_STEP]
    found = sample_tokens(vocabulary, places.numel(), torch.Generator().manual_seed(seed))
    places.copy_(found.view(places.shape))
    return text


def sampled_positions(first: int) -> slice:
    """Positions of the drawn tokens in a window, starting at ``first``."""
    return slice(first + (first - _FIRST) % _STEP, None, _STEP)
