"""llama.cpp for ``decode_speed.py``, with the same GGUF file and one of its cache types. Its weights are not converted.

It needs ``llama-cpp-python``.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

__all__ = ["CACHE_TYPES", "LlamaCpp"]

#: Cache types of llama.cpp, by name.
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
        settings.n_ctx, settings.n_batch, settings.n_ubatch = tokens, _BATCH, _BATCH
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
        """Bytes of the tokens in the cache."""
        return int(llama_cpp.llama_state_seq_get_size(self._context, 0))

    def close(self) -> None:
        """Free the cache and the weights."""
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)
