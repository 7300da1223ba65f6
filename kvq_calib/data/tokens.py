"""Tokenization."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["Ids", "bos_token_id", "encode"]

Ids = np.ndarray[Any, np.dtype[np.int64]]
"""Token ids, int64."""


def encode(tokenizer: Any, text: str) -> Ids:
    """Tokenize a text of any length, without special tokens around it: int64 `[T]`."""
    limit = tokenizer.model_max_length
    tokenizer.model_max_length = int(1e30)  # no warning that the text is longer than the model's context
    try:
        return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
    finally:
        tokenizer.model_max_length = limit


def bos_token_id(tokenizer: Any) -> int | None:
    """Return the id of the token that the tokenizer puts before a text; None if it puts none."""
    bos: int | None = tokenizer.bos_token_id
    with_special = tokenizer("a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    if bos is not None and with_special[:1] == [bos] and without[:1] != [bos]:
        return bos
    return None
