"""llama.cpp as a peer in ``decode_speed.py``: the same GGUF file, its weights as they are, a cache of one of its types.

Needs ``llama-cpp-python``.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

__all__ = ["CACHE_TYPES", "LlamaCpp"]

#: Types of its cache, by name.
CACHE_TYPES = {
    "f16": llama_cpp.GGML_TYPE_F16,
    "q8_0": llama_cpp.GGML_TYPE_Q8_0,
    "q4_0": llama_cpp.GGML_TYPE_Q4_0,
}
_BATCH = 512
_FLASH_ATTENTION = 1  # LLAMA_FLASH_ATTN_TYPE_ENABLED


@llama_cpp.llama_log_callback
def _say_nothing(level: int, text: bytes, data: Any) -> None:
    pass


class LlamaCpp:
    """A model with a cache.

    Args:
        path: GGUF file.
        cache_type: of keys and values.
        tokens: that the cache has room for.

    Raises:
        RuntimeError: it cannot be loaded.
    """

    def __init__(self, path: Path, cache_type: str, tokens: int) -> None:
        llama_cpp.llama_log_set(_say_nothing, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = tokens, _BATCH, _BATCH
        settings.type_k = settings.type_v = CACHE_TYPES[cache_type]
        settings.flash_attn_type = _FLASH_ATTENTION
        self._context = self._model and llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot run {path.name} with a {cache_type} cache")
        self.length = 0

    def use_threads(self, threads: int) -> None:
        """Compute with so many."""
        llama_cpp.llama_set_n_threads(self._context, threads, threads)

    def decode(self, ids: np.ndarray) -> None:
        """Take in tokens, int32 ``[T]``; logits of the last one are computed.

        Raises:
            RuntimeError: there is no room for them.
        """
        for first in range(0, len(ids), _BATCH):
            part = np.ascontiguousarray(ids[first : first + _BATCH], dtype=np.int32)
            batch = llama_cpp.llama_batch_get_one(
                part.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token)), len(part)
            )
            if llama_cpp.llama_decode(self._context, batch) != 0:
                raise RuntimeError(f"llama.cpp refused tokens {self.length} to {self.length + len(part)}")
            self.length += len(part)
        llama_cpp.llama_synchronize(self._context)

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held."""
        return int(llama_cpp.llama_state_seq_get_size(self._context, 0))

    def close(self) -> None:
        """Free the cache and the weights."""
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)
