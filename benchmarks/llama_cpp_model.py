"""A GGUF file run by llama.cpp with one of its cache types. Its weights are not converted.

It needs ``llama-cpp-python``.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

__all__ = ["BATCH", "CACHE_TYPES", "LlamaCpp"]

#: Cache types of llama.cpp, by name.
CACHE_TYPES = {
    "f16": llama_cpp.GGML_TYPE_F16,
    "q8_0": llama_cpp.GGML_TYPE_Q8_0,
    "q5_1": llama_cpp.GGML_TYPE_Q5_1,
    "q5_0": llama_cpp.GGML_TYPE_Q5_0,
    "q4_1": llama_cpp.GGML_TYPE_Q4_1,
    "iq4_nl": llama_cpp.GGML_TYPE_IQ4_NL,
    "q4_0": llama_cpp.GGML_TYPE_Q4_0,
}
#: Most tokens at a time.
BATCH = 512
_FLASH_ATTENTION = 1  # LLAMA_FLASH_ATTN_TYPE_ENABLED


@llama_cpp.llama_log_callback
def _say_nothing(level: int, text: bytes, data: Any) -> None:
    pass


class LlamaCpp:
    """A model with a cache, run by llama.cpp.

    Args:
        path: path of the GGUF file.
        cache_type: type of keys and values in the cache.
        tokens: room of the cache, in tokens.

    Raises:
        RuntimeError: the model cannot be loaded.
    """

    def __init__(self, path: Path, cache_type: str, tokens: int) -> None:
        llama_cpp.llama_log_set(_say_nothing, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = tokens, BATCH, BATCH
        settings.type_k = settings.type_v = CACHE_TYPES[cache_type]
        settings.flash_attn_type = _FLASH_ATTENTION
        self._context = self._model and llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot run {path.name} with a {cache_type} cache")
        self.length = 0

    def use_threads(self, threads: int) -> None:
        """Set the number of threads."""
        llama_cpp.llama_set_n_threads(self._context, threads, threads)

    def decode(self, ids: np.ndarray) -> None:
        """Process tokens, int32 ``[T]``, and compute the logits of the last one.

        Raises:
            RuntimeError: the cache has no room for them.
        """
        for first in range(0, len(ids), BATCH):
            part = np.ascontiguousarray(ids[first : first + BATCH], dtype=np.int32)
            batch = llama_cpp.llama_batch_get_one(
                part.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token)), len(part)
            )
            if llama_cpp.llama_decode(self._context, batch) != 0:
                raise RuntimeError(f"llama.cpp refused tokens {self.length} to {self.length + len(part)}")
            self.length += len(part)
        llama_cpp.llama_synchronize(self._context)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Process tokens, int32 ``[T]``, at most :data:`BATCH`, and return the logits of all: float32 ``[T, V]``.

        Raises:
            RuntimeError: the cache has no room for them.
        """
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = int(token), self.length + place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        refused = llama_cpp.llama_decode(self._context, batch) != 0
        llama_cpp.llama_batch_free(batch)
        if refused:
            raise RuntimeError(f"llama.cpp refused tokens {self.length} to {self.length + len(ids)}")
        self.length += len(ids)
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        found = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(found, shape=(len(ids), vocabulary)).copy()

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens in the cache."""
        return int(llama_cpp.llama_state_seq_get_size(self._context, 0))

    def close(self) -> None:
        """Free the cache and the weights."""
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)
